"""The highest rate that a server takes, looked for from outside (`bench --url --find-capacity`)."""

from collections.abc import Callable, Sequence

import pytest

from pipeserve.launch.inputs.load_target import Target
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.http_load import Answer
from pipeserve.launch.verbs import bench_server
from pipeserve.profiling.simulation.workloads import WorkItem

TARGET = Target(url="http://nobody", find_capacity=True, slo_ttft_s=1.0)
WORKLOAD = Workload(name="made up", lengths=((8, 2),) * 40)
LATE_S, SOON_S = 3.0, 0.1


def search(
    monkeypatch: pytest.MonkeyPatch, ttft_s: Callable[[float], float]
) -> tuple[dict, list[float]]:
    """The report, and the rates that were tried, of a server that answers after `ttft_s(rate)`;
    infinite is the rate of requests that come at once."""
    rates: list[float] = []

    def run_load(server: object, items: Sequence[WorkItem]) -> list[Answer]:
        last_s = max(item.arrival_s for item in items)
        rates.append(len(items) / last_s if last_s else float("inf"))
        first_s = ttft_s(rates[-1])
        return [
            Answer(
                item.arrival_s,
                len(item.prompt),
                [item.arrival_s + first_s, item.arrival_s + first_s + 0.01],
                2,
            )
            for item in items
        ]

    monkeypatch.setattr(bench_server, "run_load", run_load)
    report = bench_server.bench_server(TARGET, WORKLOAD, None, 1)
    return report, rates[2:]  # behind the warm-up and the requests at once


def test_the_capacity_lies_within_the_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    report, rates = search(monkeypatch, lambda rate: LATE_S if rate > 21.0 else SOON_S)
    assert report["capacity"] == pytest.approx(21.0, rel=0.3)  # Poisson times: about that rate
    served = [rate for rate in rates if rate <= 21.0]
    missed = [rate for rate in rates if rate > 21.0]
    assert min(missed) < 1.5 * max(served)
    assert report["ttft_s"]["p50"] == pytest.approx(SOON_S)


def test_limits_that_no_rate_keeps_are_soon_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial takes twice as long as the one before: sixteen of them were hours."""
    report, rates = search(monkeypatch, lambda rate: LATE_S)
    assert report["capacity"] == 0
    assert len(rates) <= 5
    assert "loosen them" in report["notes"][-1]


def test_each_trial_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, rates = search(monkeypatch, lambda rate: LATE_S if rate > 21.0 else SOON_S)
    assert capsys.readouterr().err.count("keep the limits") == len(rates)
