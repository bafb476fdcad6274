"""What attention can be computed by, on which device."""

from pipeserve.errors import ConfigError


def check_attention(device: str, attention: str) -> None:
    """Raises ConfigError for an attention that `device` does not have."""
    known = ("auto", "reference") if device == "cuda" else ("auto", "cpu", "reference")
    if attention not in known:
        raise ConfigError(f"attention {attention!r} of {device} is not one of {', '.join(known)}")
