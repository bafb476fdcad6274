"""The engines that `versus.py` compares: with what command each runs a workload or serves, where
its figures are read, and one measurement of it. Where a peer's environment is, the command line
says.
"""

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bounded import CommandError, run, started, told

from pipeserve.profiling.recording.summary import RequestRecord, summarize

PEERS = Path(__file__).parent / "peers"
CLI = (sys.executable, "-m", "pipeserve.launch.cli")
_KV_GIB = 2
"""Of each of vLLM's stages; every workload here fits."""
_ASKS_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all sides run under."""

    model: Path
    num_stages: int
    cores: tuple[int, ...]
    peer_dtype: str
    batched_tokens: int
    max_model_len: int
    """Of the peers; ours takes the model's own."""
    passes: int
    """Within one start; that of median duration counts."""


class Side(Protocol):
    """One engine with one setting."""

    @property
    def name(self) -> str: ...

    @property
    def env(self) -> Mapping[str, str]: ...

    def offline(self, workload: Path, out: Path) -> Sequence[str]:
        """Runs the workload and writes what `figures` reads to `out`."""
        ...

    def figures(self, out: Path) -> dict[str, Any]:
        """As `pipeserve bench` reports them (docs/bench.md)."""
        ...

    def server(self, port: int) -> Sequence[str]:
        """Serves OpenAI's API until it is ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """pipeserve with its default settings, and what flags the user adds."""

    conditions: Conditions
    flags: Sequence[str] = ()
    name: str = "pipeserve"
    env: Mapping[str, str] | None = None

    def offline(self, workload: Path, out: Path) -> Sequence[str]:
        passes = str(self.conditions.passes)
        files = ("--workload", str(workload), "--json", str(out))
        return (*CLI, "bench", *self._pipeline(), *files, "--repeat", passes)

    def figures(self, out: Path) -> dict[str, Any]:
        return json.loads(out.read_text())

    def server(self, port: int) -> Sequence[str]:
        return (*CLI, "serve", *self._pipeline(), "--port", str(port))

    def _pipeline(self) -> Sequence[str]:
        stages = str(self.conditions.num_stages)
        return (str(self.conditions.model), "-pp", stages, *self.flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine that a script of `peers/` steps, with so many requests at a time."""

    conditions: Conditions
    running: int
    python: str = sys.executable

    def offline(self, workload: Path, out: Path) -> Sequence[str]:
        its = self.conditions
        return (
            *(self.python, str(PEERS / self.script)),
            *("--model", str(its.model), "--workload", str(workload), "--out", str(out)),
            *("--stages", str(its.num_stages), "--dtype", its.peer_dtype),
            *("--running", str(self.running), "--batched-tokens", str(its.batched_tokens)),
            *("--max-model-len", str(its.max_model_len), "--repeat", str(its.passes)),
        )

    def figures(self, out: Path) -> dict[str, Any]:
        runs = json.loads(out.read_text())["runs"]
        summaries = sorted(map(_summary, runs), key=lambda summary: summary["seconds"])
        return summaries[(len(summaries) - 1) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm(Peer):
    """vLLM's CPU build, a stage on its own cores."""

    script = "vllm_engine.py"

    @property
    def name(self) -> str:
        return f"vllm {self.running}"

    @property
    def env(self) -> Mapping[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": bound_cores(self.conditions),
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def server(self, port: int) -> Sequence[str]:
        its = self.conditions
        return (
            *(self.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(its.model), "--host", "127.0.0.1", "--port", str(port)),
            *("--pipeline-parallel-size", str(its.num_stages), "--dtype", its.peer_dtype),
            *("--max-num-seqs", str(self.running), "--no-enable-prefix-caching"),
            *("--max-num-batched-tokens", str(its.batched_tokens)),
            *("--max-model-len", str(its.max_model_len)),
            *(("--distributed-executor-backend", "mp") if its.num_stages > 1 else ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformers(Peer):
    """transformers' continuous batching: one process on all cores, whatever the stages."""

    script = "transformers_batching.py"
    env: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        return f"transformers {self.running}"

    def server(self, port: int) -> Sequence[str]:
        raise NotImplementedError


def bound_cores(conditions: Conditions) -> str:
    """The cores of each stage as vLLM wants them: `0,1|2,3`."""
    each = len(conditions.cores) // conditions.num_stages
    shares = [
        conditions.cores[stage * each : (stage + 1) * each]
        for stage in range(conditions.num_stages)
    ]
    return "|".join(",".join(map(str, share)) for share in shares)


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    records = [
        RequestRecord(
            num_prompt_tokens=num_prompt_tokens,
            arrival_s=run["start_s"],
            token_times_s=tuple(times_s),
        )
        for num_prompt_tokens, times_s in zip(
            run["prompt_tokens"], run["token_times_s"], strict=True
        )
    ]
    return asdict(summarize(records))


# ---- measuring ---------------------------------------------------------------------------------


def measure(side: Side, requests: Path, folder: Path, limit_s: float, http: bool) -> dict[str, Any]:
    """One run of `side`, as `pipeserve bench` reports it. Raises CommandError."""
    log, out = folder / "log", folder / "out.json"
    out.unlink(missing_ok=True)
    if http:
        return _measure_server(side, requests, out, log, limit_s)
    run(side.offline(requests, out), log, limit_s, side.env)
    return side.figures(out)


def _measure_server(
    side: Side, requests: Path, out: Path, log: Path, limit_s: float
) -> dict[str, Any]:
    ends_s = time.monotonic() + limit_s
    with serving(side, log, limit_s) as url:
        client = (*CLI, "bench", "--url", url, "--workload", str(requests), "--json", str(out))
        run(client, log.with_name("client"), max(ends_s - time.monotonic(), 1.0))
    return json.loads(out.read_text())


@contextmanager
def serving(side: Side, log: Path, limit_s: float) -> Iterator[str]:
    """The address of its server, which answers within `limit_s`. Raises CommandError."""
    port, ends_s = _free_port(), time.monotonic() + limit_s
    command, url = side.server(port), f"http://127.0.0.1:{port}"
    with started(command, log, side.env) as server:
        while not _answers(url):
            if server.poll() is not None:
                raise CommandError(f"the server has ended: {told(command, log)}")
            if time.monotonic() > ends_s:
                raise CommandError(f"no answer in {limit_s:g} s: {told(command, log)}")
            time.sleep(_ASKS_AGAIN_S)
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
