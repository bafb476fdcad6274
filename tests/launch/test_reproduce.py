"""The pure helpers of bench/reproduce*.py; the long simulations are run by hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    """Scripts in bench/ import each other as `python bench/...` lets them."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in ("report", "reproduce", "reproduce_sarathi", "reproduce_sarathi_serve"):
        sys.modules.pop(name, None)


# ---- report -------------------------------------------------------------------------------------


def test_a_row_is_within_its_target_up_to_and_including_the_edge():
    from report import Row

    assert Row("x", paper=2.0, ours=2.4, within=0.25).met
    assert Row("x", paper=2.0, ours=1.5, within=0.25).met  # the edge itself
    assert not Row("x", paper=2.0, ours=1.4, within=0.25).met
    assert Row("x", paper=11, ours=11, within=0).met
    assert not Row("x", paper=11, ours=12, within=0).met


def test_the_table_says_ratio_and_verdict():
    from report import Row, table

    rows = table([Row("a", 2.0, 2.2, "x"), Row("b", 2.0, 3.0)]).splitlines()
    assert rows[2] == "| a | 2x | 2.2x | 1.10 | 20%: yes |"
    assert rows[3] == "| b | 2 | 3 | 1.50 | 20%: **no** |"


def test_a_plain_table_has_a_cell_for_each_heading():
    from report import plain_table

    text = plain_table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert text.splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 | 4 |"]


# ---- SARATHI ------------------------------------------------------------------------------------


def test_zipf_lengths_keep_their_range_and_proportion():
    from reproduce_sarathi import zipf_lengths

    lengths = zipf_lengths(4000, seed=1)
    totals = [prompt + output for prompt, output in lengths]
    assert min(totals) >= 1024
    assert max(totals) <= 4096
    # Rounded to whole tokens: within one of ten to one.
    assert all(abs(prompt - 10 * output) <= 11 for prompt, output in lengths)
    assert lengths == zipf_lengths(4000, seed=1)
    assert lengths != zipf_lengths(4000, seed=2)


def test_zipf_lengths_fall_off_as_theta_says():
    """Share of totals in the lower half of the range: (1/2) ** (1 - theta), nearly."""
    from reproduce_sarathi import zipf_lengths

    middle = 1024 + 3073 // 2
    for theta, share in ((0.0, 0.5), (0.4, 0.5**0.6)):
        lengths = zipf_lengths(20_000, theta=theta)
        lower = sum(sum(pair) < middle for pair in lengths) / len(lengths)
        assert lower == pytest.approx(share, abs=0.03)


def test_the_largest_batches_are_the_papers():
    from reproduce_sarathi import largest_batch

    assert largest_batch(1) == 11
    assert largest_batch(8) == 27


def test_ratios_are_in_the_papers_order():
    from reproduce_sarathi import Comparison, Result

    found = Comparison(
        orca=Result(seconds=24.0, bubble_s=6.0, idle=0.5),
        sarathi=Result(seconds=12.0, bubble_s=2.0, idle=0.1),
        replica=Result(seconds=18.0, bubble_s=0.0, idle=0.0),
    )
    assert found.ratios() == (3.0, 2.0, 1.5, pytest.approx(4 / 3))


def test_the_floor_holds_and_leaves_longer_stages_alone():
    from reproduce_sarathi import Floor

    class Times:
        control_s = 0.5

        def compute_s(self, microbatch):
            return [1.0, 3.0]

        def hop_s(self, microbatch):
            return [0.25]

    floor = Floor(Times(), 2.0)
    assert floor.compute_s(None) == [2.0, 3.0]
    assert floor.hop_s(None) == [0.25]
    assert floor.control_s == 0.5


def test_host_time_lengthens_each_stage_by_its_layers():
    from reproduce_sarathi import CHUNK, host_per_layer_s, make, with_host

    from pipeserve.core.nouns import Chunk, Microbatch, RequestId

    decodes = tuple(Chunk(RequestId(i), 100, 101, (), None, 1) for i in range(4))
    setup = make(8, CHUNK, 1)
    microbatch = Microbatch(0, decodes)
    before, after = setup.times.compute_s(microbatch), with_host(setup).times.compute_s(microbatch)
    assert host_per_layer_s() > 0
    for short, long in zip(before, after, strict=True):
        assert long - short == pytest.approx(12 * host_per_layer_s(), rel=0.1)  # times the jitter


# ---- Sarathi-Serve ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hybrid", "chunked", "combined", "holds"),
    [
        ((0.5, 0.7), (1.0, 0.17), (0.8, 0.14), True),
        ((0.9, 0.7), (1.0, 0.17), (0.8, 0.14), False),  # TTFT: hybrid is not the first
        ((0.5, 0.7), (0.7, 0.17), (0.8, 0.14), False),  # TTFT: chunked is not the last
        ((0.5, 0.7), (1.0, 0.13), (0.8, 0.14), False),  # TBT: combined is not the least
        ((0.5, 0.2), (1.0, 0.17), (0.8, 0.14), False),  # TBT: hybrid is not far above
    ],
)
def test_the_order_of_table_4(hybrid, chunked, combined, holds):
    from reproduce_sarathi_serve import in_order

    found = {"hybrid_only": hybrid, "chunked_only": chunked, "sarathi_serve": combined}
    assert in_order(found) is holds


def test_without_a_trace_the_built_in_lengths_stand_in(tmp_path):
    from reproduce_sarathi_serve import SHAREGPT, lengths_of

    lengths, name = lengths_of("sharegpt", SHAREGPT, tmp_path)
    assert name == "the built-in `sharegpt`"
    assert max(prompt for prompt, _ in lengths) <= 8141


def test_only_the_all_reduce_over_nodes_is_slowed():
    from reproduce_sarathi_serve import slower_all_reduce, system

    profile = system("vllm", 1.0, 8192).profile
    slowed = slower_all_reduce(profile, 2)
    for before, after in zip(profile.all_reduce, slowed.all_reduce, strict=True):
        factor = 2 if before.nodes > 1 else 1
        assert after.seconds(1 << 20) == pytest.approx(factor * before.seconds(1 << 20))


def test_a_slower_prefix_is_what_makes_chunks_cost():
    from reproduce_sarathi_serve import chunk_loss, slower_prefix

    assert chunk_loss(slower_prefix) > chunk_loss(lambda profile: profile)


# ---- the page -----------------------------------------------------------------------------------


def test_quick_and_traces_reach_the_parts_that_know_them(tmp_path):
    from reproduce import parts

    full, quick = dict(parts(False, None)), dict(parts(True, tmp_path))
    assert full["reproduce_sarathi.py"] == full["reproduce_sarathi_serve.py"] == []
    assert quick["reproduce_sarathi.py"] == ["--requests", "1000"]
    assert quick["reproduce_sarathi_serve.py"] == ["--traces", str(tmp_path), "--quick"]


def test_the_head_names_command_and_versions(monkeypatch):
    import platform

    import reproduce
    from reproduce import head

    used = SimpleNamespace(ru_utime=100.0, ru_stime=20.0)
    with monkeypatch.context() as patched:  # pytest asks for its own times behind the test
        patched.setattr(reproduce.resource, "getrusage", lambda who: used)
        text = head("python bench/reproduce.py --quick")
    assert "`python bench/reproduce.py --quick`" in text
    assert "in 2 minutes" in text
    assert platform.python_version() in text
