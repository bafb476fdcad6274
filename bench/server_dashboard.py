"""Whether each query of the Grafana dashboard finds data: a server, a small load, and Prometheus.

    python bench/server_dashboard.py [--model smollm2-135m] [--seconds 60] [--prometheus PROGRAM]

Debian's package `prometheus` has the program. A server of two stages starts, with a cost profile
whose numbers are made up (what it predicts does not matter here, but that it does), and Prometheus,
which scrapes it every two seconds. Clients send prompts that share a beginning; one goes away each
time, and one sends what is refused now and then. Then each expression of
configs/grafana/pipeserve.json is asked of Prometheus' HTTP API, and for each variable the series
that it names; printed is what came. The exit code is 1 where an expression gave no number.
Everything ends with the script.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
from commands import LIMITS
from report import plain_table

from pipeserve.configs.device_profiles import save_profile
from pipeserve.core.cost.device import DeviceProfile, Link
from pipeserve.core.cost.kernels import AttentionCost, Tables
from pipeserve.machine import device_name

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "configs/grafana/pipeserve.json"
_WINDOW = "30s"
"""What Grafana would put for $__rate_interval."""
_START_S = 120.0
_END_S = 30.0
_NUM_CLIENTS = 6
_SCRAPES = """\
global:
  scrape_interval: 2s
scrape_configs:
  - job_name: pipeserve
    static_configs:
      - targets: ["{server}"]
"""


def made_up_profile(model: str) -> DeviceProfile:
    """Of this machine's device, as far as the server checks it."""
    link = Link(alpha_s=1e-4, bytes_per_s=1e9)
    return DeviceProfile(
        name=device_name(),
        provenance={"made": "up"},
        memory_bytes=10**9,
        devices_per_node=2,
        attention=AttentionCost(
            prefill_overhead_s=2e-4,
            prefill_values_per_s=1e30,
            prefix_flops_per_s=50e9,
            causal_flops_per_s=20e9,
            query_tile=1,
            decode_overhead_s=0.0,
            decode_sequence_s=3e-5,
            decode_bytes_per_s=2e9,
        ),
        tables=Tables(
            model=model,
            dtype="float32",
            threads=1,
            layer=((1, 4e-4), (16, 8e-4), (128, 4e-3), (512, 14e-3)),
            head=((1, 2e-3), (32, 9e-3)),
            embedding=((1, 1e-6), (512, 512e-6)),
        ),
        intra_node=link,
        inter_node=link,
        host_s=1e-3,
    )


@contextlib.contextmanager
def running(command: list[str], said: str, log: Path) -> Iterator[re.Match]:
    """A program, from when its stderr matches `said`; it is ended at the end."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not (found := re.search(said, log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start: {log.read_text(errors='replace')}")
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def send_load(url: str, seconds: float) -> None:
    """Clients that ask one thing after the other, each in a thread."""
    stop_s = time.monotonic() + seconds
    beginning = "Once upon a time, in a land far away, there lived a king who had three daughters. "

    def client(number: int) -> None:
        turn = 0
        with httpx.Client(base_url=url, timeout=60) as session:
            while time.monotonic() < stop_s:
                turn += 1
                body: dict[str, Any] = {"prompt": f"{beginning}{number} {turn}", "max_tokens": 32}
                if number == 0:  # one whose text ends at a dot, and two samples
                    body |= {"stop": ".", "n": 2}
                if number == 1 and turn % 3 == 0:
                    body["temperature"] = -1  # which is refused
                if number == 2:  # one that goes away
                    with session.stream("POST", "/v1/completions", json=body | {"stream": True}):
                        continue
                session.post("/v1/completions", json=body)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(_NUM_CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(panel, expression), as Grafana would ask for them."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            yield f"variable {variable['name']}", f"count by ({series[2]}) ({series[1]})"
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in {"$__rate_interval": _WINDOW, "$job": ".+", "$stage": "0"}.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def ask(prometheus: str, expression: str) -> list[float]:
    """The numbers that it gives now. Raises ValueError for what Prometheus refuses."""
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    if answer["status"] != "success":
        raise ValueError(answer["error"])
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def rows(prometheus: str) -> Iterator[tuple[bool, list[str]]]:
    """Of each expression, whether it gave numbers, and its row of the table."""
    for panel, expression in expressions(json.loads(DASHBOARD.read_text("utf-8"))):
        try:
            found = ask(prometheus, expression)
        except ValueError as error:
            yield False, [panel, f"`{expression}`", "0", str(error)]
            continue
        numbers = [value for value in found if isfinite(value)]
        shown = ", ".join(f"{value:.3g}" for value in numbers[:3])
        more = f", and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        yield bool(numbers), [panel, f"`{expression}`", str(len(found)), shown + more or "**none**"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--prometheus", default=shutil.which("prometheus"))
    args = parser.parse_args()
    if args.prometheus is None:
        sys.exit("there is no prometheus; install Debian's package of that name")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as programs:
        folder = Path(name)
        profile = folder / "profile.yaml"
        save_profile(made_up_profile(args.model), profile)
        command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", args.model, "--port", "0"]
        command += ["-pp", "2", "--dtype", "float32", "--device-profile", str(profile), *LIMITS]
        said = r"at (http://(\S+))/v1"
        server = programs.enter_context(running(command, said, folder / "server.log"))
        config = folder / "prometheus.yml"
        config.write_text(_SCRAPES.format(server=server[2]))
        command = [args.prometheus, f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        command += ["--web.listen-address=127.0.0.1:0"]
        said = r"Listening on\" address=(\S+)"
        prometheus = programs.enter_context(running(command, said, folder / "prometheus.log"))
        send_load(server[1], args.seconds)
        told = list(rows(f"http://{prometheus[1]}"))
    print(plain_table(["panel", "expression", "series", "now"], [row for _, row in told]))
    num_good = sum(is_good for is_good, _ in told)
    print(f"\n{num_good} of {len(told)} expressions gave numbers")
    return 0 if num_good == len(told) else 1


if __name__ == "__main__":
    sys.exit(main())
