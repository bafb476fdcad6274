"""DistServe (OSDI'24), simulated: the attainment table (Table 2) and the placement of OPT-13B.

    python bench/reproduce_distserve.py [--seeds 8] [--trace FILE.csv[.gz]] [--published DIR]

`--trace`: another set of lengths to compare with (columns num_prefill_tokens, num_decode_tokens).
`--published`: a checkout of LLMServe/DistServe (needs simpy and pandas): its own simulator is run
on the very same requests and stands beside ours. The section that it writes goes into
docs/reproduction.md.
"""

import argparse
import marshal
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from commands import script
from published.distserve_latency import FITS, PublishedTimes, published_times
from published.distserve_lengths import Lengths, finite_arrivals, sharegpt_lengths, trace_lengths
from report import plain_table

from pipeserve.configs.model_shapes import load_shape
from pipeserve.profiling.search.goodput import Slo, attainment, find_goodput, meets_separately
from pipeserve.profiling.search.placement import (
    A100_80GB_BYTES,
    Cluster,
    Pair,
    Parallelism,
    Placement,
    instances,
    pairs,
    place_apart,
    place_together,
)
from pipeserve.profiling.search.service import Service
from pipeserve.profiling.simulation.disaggregated import KvLink
from pipeserve.profiling.simulation.simulator import Arrival, Served, Simulation

Judge = Callable[[Sequence[Served], Slo], bool]

RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
PAPER = {
    "vLLM": (96.8, 65.1, 51.0, 46.1, 38.3, 29.0, 24.1),
    "DistServe": (100.0, 100.0, 99.3, 88.3, 84.1, 77.0, 68.9),
}
"""Table 2, simulator columns; the first arXiv version prints 28.0 for vLLM at 3.5."""


@dataclass(frozen=True)
class Vintage:
    """The coefficients as of a commit, as factors on those of the last one."""

    name: str
    distserve: tuple[float, float] = (1.0, 1.0)
    """Prefill, decode."""
    vllm: tuple[float, float] = (1.0, 1.0)

    def times(self, engine: str, model: str, p: Parallelism) -> PublishedTimes:
        factors = self.vllm if engine == "vllm" else self.distserve
        published_times(engine, model, *p)  # says what there is, where this is not
        return PublishedTimes(FITS[engine, model][p.tp].scaled(*factors), p.pp)


WHICH = """\
Percent of requests within both targets. The paper does not say what the table was measured on. Its
first version (arXiv 2401.09670v1, January 2024) has the same table in a section on OPT-13B (200 ms,
100 ms; vLLM on one GPU); the last one has it in a section on OPT-66B, whose targets are 400 ms and
100 ms in the artefact. The published coefficients are of May 2024. So each reading is shown, with
the placement that the paper names for it. Requests of DistServe's own recipe (ShareGPT under 2,048
tokens), drawn from quantiles; nothing is fitted to the table here.

Run once beside the published simulator itself (LLMServe/DistServe @ 82831f1, `--published`) on the
very same requests, seed 0, ours is off it by 0.0 points for both DistServe columns, by at most 1.0
for vLLM 66B at 25 requests per GPU and 2.0 at 300 requests, and by 4.7 for vLLM 13B at 300, under
overload. Only for DistServe 13B with rates per GPU is it off by 10.3, mostly KV room, which theirs
does not model. So the published simulator, with the coefficients that were published, does not give
the paper's table on these requests either: its own worst row is 32.1 points off (vLLM) and 6.8
(DistServe 66B)."""

LAST = Vintage("4c68ed9 (2024-05-01) and since")
VINTAGES = (
    LAST,
    Vintage("87143bf (2024-04-25)", (1.05 / 1.1, 1.0), (1.2 / 1.4, 1 / 1.2)),
    Vintage("5331c99 (2024-04-25), the bare fits", (1 / 1.1, 1.0), (1 / 1.4, 1 / 1.2)),
)
"""The published code multiplies its fits by hand-set factors, and changed them twice."""


@dataclass(frozen=True)
class Reading:
    """What Table 2 may have been measured on: the paper does not say it beside the table."""

    name: str
    model: str
    slo: Slo
    vllm_tp: int
    pair: Pair
    requests: tuple[int, int] = (300, 300)
    """Of vLLM and of DistServe."""
    rate_factor: int = 1
    """DistServe's rate over the table's: its GPUs, where rates are per GPU."""
    vintage: Vintage = LAST


PAIR_13B = Pair(Parallelism(2, 1), Parallelism(1, 1))
PAIR_66B = Pair(Parallelism(4, 1), Parallelism(2, 2))
CHAT_13B, CHAT_66B = Slo(ttft_s=0.2, tpot_s=0.1), Slo(ttft_s=0.4, tpot_s=0.1)
READINGS = (
    Reading("66B", "opt-66b", CHAT_66B, 4, PAIR_66B),
    Reading("66B, 25 requests per GPU", "opt-66b", CHAT_66B, 4, PAIR_66B, (100, 200)),
    Reading("13B", "opt-13b", CHAT_13B, 1, PAIR_13B),
    Reading("13B, rates and 100 requests per GPU", "opt-13b", CHAT_13B, 1, PAIR_13B, (100, 300), 3),
)


LONGEST = [(2046, 2)]
"""The longest request there is, for services whose trials bring their own requests."""


def service(
    model: str,
    slo: Slo,
    engine: str = "distserve",
    lengths: Lengths = LONGEST,
    vintage: Vintage = LAST,
    **changes: object,
) -> Service:
    return Service(
        shape=load_shape(model),
        lengths=lengths,
        slo=slo,
        times=partial(vintage.times, engine, model),
        **changes,
    )


def colocated(reading: Reading, arrivals: list[Arrival]) -> list[Served]:
    """vLLM: one instance with the coefficients measured on it, prefill first."""
    by = service(reading.model, reading.slo, "vllm", vintage=reading.vintage)
    simulation = Simulation(by.prefill(Parallelism(reading.vllm_tp, 1)), arrivals)
    simulation.run_until()
    return simulation.served


def disaggregated(served_by: Service, pair: Pair, arrivals: list[Arrival]) -> list[Served]:
    prefill, decode = served_by.prefill(pair.prefill), served_by.decode(pair.decode)
    simulation = served_by.simulation([prefill], [decode], arrivals)
    simulation.run_until()
    return simulation.served


def column(
    reading: Reading,
    system: str,
    lengths: Lengths,
    seed: int,
    rates: Sequence[float] = RATES,
    **changes: object,
) -> list[float]:
    """Percent of requests within both targets, at each rate of the table."""
    percents = []
    for rate in rates:
        if system == "vLLM":
            arrivals = finite_arrivals(lengths, reading.requests[0], rate, seed)
            served = colocated(reading, arrivals)
        else:
            rate *= reading.rate_factor
            arrivals = finite_arrivals(lengths, reading.requests[1], rate, seed)
            by = service(reading.model, reading.slo, vintage=reading.vintage, **changes)
            served = disaggregated(by, reading.pair, arrivals)
        percents.append(100 * attainment(served, reading.slo).both)
    return percents


def worst(percents: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(percents, others, strict=True))


def figures(percents: Sequence[float]) -> list[str]:
    return [f"{percent:.1f}" for percent in percents]


def table_2(lengths: Lengths, num_seeds: int, published: Path | None) -> str:
    """Every reading against the paper, and against the published simulator where it is given."""
    parts = []
    for system, paper in PAPER.items():
        rows = [[f"{system}, paper", *figures(paper), ""]]
        for reading in READINGS:
            runs = [column(reading, system, lengths, seed) for seed in range(num_seeds)]
            by_rate = list(zip(*runs, strict=True))
            means = [mean(rate) for rate in by_rate]
            spread = [f"{min(rate):.0f}-{max(rate):.0f}" for rate in by_rate]
            rows += [
                [
                    f"ours, {reading.name}, seed 0",
                    *figures(runs[0]),
                    f"{worst(runs[0], paper):.1f}",
                ],
                [f"mean of {num_seeds} seeds", *figures(means), f"{worst(means, paper):.1f}"],
                ["lowest-highest of them", *spread, ""],
            ]
            if published is not None:
                theirs = published_column(published, reading, system, lengths)
                off = f"{worst(theirs, paper):.1f} (ours off it {worst(runs[0], theirs):.1f})"
                rows.append(["published simulator, seed 0", *figures(theirs), off])
        header = ["requests/s", *map(str, RATES), "worst row off, points"]
        parts.append(plain_table(header, rows))
    return "\n\n".join(parts)


def published_column(root: Path, reading: Reading, system: str, lengths: Lengths) -> list[float]:
    """The same from DistServe's own simulator, on the same requests."""
    sys.path.insert(0, str(root))
    from simdistserve.benchmarks.simulate_dist import parse_args, run_experiment

    is_vllm = system == "vLLM"
    prefill, decode = (Parallelism(reading.vllm_tp, 1), (0, 0)) if is_vllm else reading.pair
    names = ("tp-prefill", "pp-prefill", "tp-decode", "pp-decode")
    sizes = zip(names, (*prefill, *decode), strict=True)
    num = reading.requests[0 if is_vllm else 1]
    args = [f"--{name}={size}" for name, size in sizes]
    args += [f"--backend={system.lower()}", f"--model=facebook/{reading.model}", f"--N={num}"]
    args += [f"--prefill-target={reading.slo.ttft_s * 1e3:.0f}", "--slas=[]", "--slo-scales=[1.0]"]
    args += [f"--decode-target={reading.slo.tpot_s * 1e3:.0f}", "--workload=sharegpt", "--seed=0"]
    percents = []
    with tempfile.TemporaryDirectory() as folder:
        requests = [("", prompt, output) for prompt, output in lengths]
        Path(folder, "sharegpt.ds").write_bytes(marshal.dumps({"reqs": requests}))
        os.environ["DATASET"] = folder
        for rate in RATES:
            rate *= 1 if is_vllm else reading.rate_factor
            _, _, shares = run_experiment(parse_args([*args, f"--rate={rate}"]))
            percents.append(float(shares[shares["pd"] == "both"]["attainment"].iloc[0]))
    return percents


def optimum(lengths: Lengths, num_seeds: int) -> str:
    """OPT-13B on one node of 4 GPUs: the README's command, and stricter ways to ask."""
    by = service("opt-13b", CHAT_13B)
    candidates = pairs(by.shape, Cluster(num_nodes=1, gpus_per_node=4))

    def published_rule(judge: Judge, seed: int, pair: Pair, beat: float) -> float:
        """From empty to empty, every request counted."""

        def is_met(per_gpu: float) -> bool:
            arrivals = finite_arrivals(lengths, 300, per_gpu * pair.num_gpus, seed)
            return judge(disaggregated(by, pair, arrivals), by.slo)

        return find_goodput(is_met, highest=5, resolution=0.25, beat=beat)

    rows = [["README", "1.56", "TP2 PP1, TP1 PP1", "", ""]]
    for name, judge in (("P90 of each, as published", meets_separately), ("90 % meet both", joint)):
        start = time.process_time()
        found = [
            place_together(candidates, partial(published_rule, judge, seed), rate=5)
            for seed in range(num_seeds)
        ]
        seconds = (time.process_time() - start) / num_seeds
        rates = [placement.rate_per_gpu for placement in found]
        rows.append([f"{name}, seed 0", *described(found[0]), f"{rates[0] / 1.5625:.2f}", ""])
        same = sum(described(p)[1] == "TP2 PP1, TP1 PP1" for p in found)
        what = f"mean of {num_seeds} seeds ({min(rates):.2f}-{max(rates):.2f})"
        rows.append(
            [what, f"{mean(rates):.2f}", f"{same} of {num_seeds} the same",
             f"{mean(rates) / 1.5625:.2f}", f"{seconds:.0f}"]
        )  # fmt: skip
    drawn = [(prompt, output + 1) for prompt, output in lengths]
    steady = service("opt-13b", CHAT_13B, lengths=drawn)
    for name, place in (
        ("90 % meet both, after a ramp and under load to the end",
         lambda: place_together(candidates, steady.pair_per_gpu, rate=5)),
        ("algorithm 1: prefill and decode apart",
         lambda: place_apart(instances(by.shape, Cluster(num_nodes=1, gpus_per_node=4)),
                             steady.prefill_per_gpu, steady.decode_per_gpu, rate=5)),
    ):  # fmt: skip
        start = time.process_time()
        rate, config = described(place())
        seconds = time.process_time() - start
        rows.append([name, rate, config, f"{float(rate) / 1.5625:.2f}", f"{seconds:.0f}"])
    header = ["rule", "requests/s per GPU", "prefill, decode", "ratio", "CPU seconds to search"]
    return plain_table(header, rows)


def joint(served: Sequence[Served], slo: Slo) -> bool:
    return attainment(served, slo).both >= slo.share


def described(placement: Placement) -> tuple[str, str]:
    (p_tp, p_pp), (d_tp, d_pp) = placement.prefill, placement.decode
    return f"{placement.rate_per_gpu:.2f}", f"TP{p_tp} PP{p_pp}, TP{d_tp} PP{d_pp}"


def vintages(lengths: Lengths, num_seeds: int) -> str:
    """Table 2 by the coefficients of each commit: OPT-66B with the artefact's request numbers."""
    rows = []
    for system, paper in PAPER.items():
        rows.append([f"{system}, paper", *figures(paper), ""])
        for vintage in VINTAGES:
            reading = replace(READINGS[1], vintage=vintage)
            runs = [column(reading, system, lengths, seed) for seed in range(num_seeds)]
            means = [mean(rate) for rate in zip(*runs, strict=True)]
            rows.append(
                [f"{system}, {vintage.name}", *figures(means), f"{worst(means, paper):.1f}"]
            )
    return plain_table(["coefficients of", *map(str, RATES), "worst row off, points"], rows)


def assumptions(lengths: Lengths, traces: Sequence[Path]) -> str:
    """What moves the figures: DistServe's column of OPT-66B, seed 0, one change at a time."""
    reading = READINGS[0]
    base = column(reading, "DistServe", lengths, 0)
    changes: list[tuple[str, dict]] = [
        ("decode policy sarathi_serve: one microbatch takes all that is ready",
         {"decode_policy": "sarathi_serve"}),
        ("decode policy uniform (ours)", {"decode_policy": "uniform"}),
        ("prefill microbatches of at most 2,048 tokens, not 8,192", {"prefill_batch_tokens": 2048}),
        ("room for ten times the KV", {"bytes_per_gpu": 10 * A100_80GB_BYTES}),
        ("KV over 300 GB/s (NVLink), not at once", {"link": KvLink(bytes_per_s=300e9)}),
        ("KV over 25 Gb/s (the paper's network)", {"link": KvLink(bytes_per_s=25e9 / 8)}),
    ]  # fmt: skip
    rows = [["as above", *figures(base), ""]]
    for name, change in changes:
        percents = column(reading, "DistServe", lengths, 0, **change)
        rows.append([name, *figures(percents), f"{worst(percents, base):.1f}"])
    for path in traces:
        percents = column(reading, "DistServe", trace_lengths(path), 0)
        name = f"lengths of {path.name} under 2,048 tokens"
        rows.append([name, *figures(percents), f"{worst(percents, base):.1f}"])
    return plain_table(["one change", *map(str, RATES), "moves at most, points"], rows)


def scaled(lengths: Lengths, prompt: float, output: float) -> Lengths:
    """Every length times a factor, under 2,048 in total."""
    longer = [(max(1, round(p * prompt)), max(1, round(o * output))) for p, o in lengths]
    return [length for length in longer if sum(length) < 2048]


def fitted(lengths: Lengths) -> str:
    """Two factors on the lengths, fitted on the row of 2.0 requests/s and judged on the others."""
    rows = []
    row = RATES.index(2.0)
    for reading in READINGS:
        grid = [(p, o) for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for o in (0.25, 0.5, 1.0, 1.5, 2.0)]
        errors = {}
        for factors in grid:
            some = scaled(lengths, *factors)
            at_row = [column(reading, system, some, 0, rates=(2.0,))[0] for system in PAPER]
            errors[factors] = sum(
                (ours - paper[row]) ** 2 for ours, paper in zip(at_row, PAPER.values(), strict=True)
            )
        best = min(errors, key=errors.__getitem__)
        some = scaled(lengths, *best)
        for system, paper in PAPER.items():
            percents = column(reading, system, some, 0)
            name = f"{reading.name}, {system}: prompts x {best[0]}, outputs x {best[1]}"
            rows.append([name, *figures(percents), f"{worst(percents, paper):.1f}"])
    return plain_table(["fit", *map(str, RATES), "worst row off, points"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--trace", type=Path, action="append", default=[])
    parser.add_argument("--published", type=Path)
    args = parser.parse_args()
    lengths = sharegpt_lengths()
    print(
        f"## DistServe, simulated\n\n`python bench/reproduce_distserve.py --seeds {args.seeds}`\n"
    )
    print("### Attainment (Table 2)\n")
    print(f"{WHICH}\n")
    print(table_2(lengths, args.seeds, args.published))
    print("\n### OPT-13B, 4 GPUs, ShareGPT, 200 ms and 100 ms\n")
    print(optimum(lengths, args.seeds))
    print("\n### Attainment by the coefficients of each commit\n")
    print(vintages(lengths, args.seeds))
    print("\n### What moves it\n")
    print(assumptions(lengths, args.trace))
    print("\n### Lengths fitted on one row\n")
    print(fitted(lengths))


if __name__ == "__main__":
    script(main)
