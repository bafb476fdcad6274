"""What the server is told beyond the run: who may call it, and how much of it one call may take."""

from dataclasses import dataclass, field

from pipeserve.errors import ConfigError


def _option(default: object, help: str, **more: object) -> object:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Field names are the flags of `pipeserve serve`."""

    host: str = _option(
        "127.0.0.1", "Address to listen at; 0.0.0.0 is every address of this machine."
    )
    port: int = _option(8000, "Port to listen at; 0 takes a free one.")
    served_model_name: tuple[str, ...] = _option(
        (), "Names that clients may call the model by; by default MODEL. May be repeated."
    )
    api_key: tuple[str, ...] = _option(
        (), "Key that clients must bring; PIPESERVE_API_KEY too. May be repeated."
    )
    api_key_file: str | None = _option(None, "File with a key on each line.")
    ssl_certfile: str | None = _option(None, "Certificate (PEM), for HTTPS.")
    ssl_keyfile: str | None = _option(None, "Its private key (PEM).")
    allowed_origins: tuple[str, ...] = _option(
        (), "Origins of web pages that may call the server (CORS); * is any. May be repeated."
    )
    max_queue: int = _option(1024, "Most requests that wait or run at once; more are answered 429.")
    request_timeout: float = _option(0.0, "Seconds after which a request is ended; 0: never.")
    shutdown_timeout: float = _option(
        30.0, "Seconds that running requests have to finish after SIGTERM or Ctrl-C."
    )
    stall_timeout: float = _option(
        60.0, "Seconds that the stages may owe a result before /health says so."
    )
    max_body_bytes: int = _option(
        4 << 20, "Most bytes of a request's body. While one is read, streams stand still."
    )
    max_samples: int = _option(128, "Most samples (n, times the prompts) of one request.")
    max_stop: int = _option(64, "Most stop strings of one request.")
    max_logprobs: int = _option(
        20, "Most log-probabilities at each position; -1: as many as a request asks for."
    )
    chat_template: str | None = _option(
        None, "Chat template, or a file with one, in place of the model's own."
    )
    trust_request_chat_template: bool = _option(
        False, "Take chat templates from requests, too; they run in a sandbox."
    )
    tool_call_parser: str | None = _option(
        None, "How the model writes tool calls.", choices=("hermes",)
    )
    response_role: str = _option("assistant", "Role that answers of a chat have.")
    log_requests: bool = _option(
        False, "Log a line for each answer: which, to whom, how long it took; not what was asked."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}, must be 0 (any free one) to 65535")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both")
        for name in ("max_queue", "max_body_bytes", "max_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}, must be at least 1"
                )
        if self.max_logprobs < -1:
            raise ConfigError(f"--max-logprobs {self.max_logprobs}, must be -1 (any) or more")
        for name in ("request_timeout", "shutdown_timeout", "max_stop"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}, must be 0 or more"
                )
