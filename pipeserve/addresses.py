"""HOST:PORT as users write it and processes tell it; an IPv6 address stands in brackets."""


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `[::1]:29600` and its like. Raises ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:  # IPv6 without brackets: where its port begins, nobody can say
        raise ValueError(text)
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(text)
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
