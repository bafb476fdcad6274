"""The engine's contract, call by call."""

import pytest

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import (
    Begun,
    Microbatch,
    Output,
    Request,
    RequestId,
    StageCost,
    StepResult,
    TokenLogprobs,
    Wait,
    one_each,
)
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Draft, PolicyError, Traits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.sampling_params import SamplingParams

AT_ONCE = Begun(num_cached=0, queued_s=0.0, prefill_s=0.0)
FREE_TRAITS = Traits(plans_ahead=True, chunk_pipelining=True, one_in_flight=False)


def make_limits(**changes) -> Limits:
    limits = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
    }
    return Limits(**limits | changes)


def make_engine(num_stages=1, policy="uniform", cost=None, **changes) -> Engine:
    policy = get_policy(policy) if isinstance(policy, str) else policy
    return Engine(split_layers(num_stages, num_stages), policy, make_limits(**changes), cost)


def add(
    engine, request_id=0, prompt=(1, 2, 3), stop_ids=(), salt="", sample_of=None, **params
) -> None:
    engine.add(
        Request(
            id=RequestId(request_id),
            prompt=tuple(prompt),
            params=SamplingParams(**params),
            stop_ids=frozenset(stop_ids),
            cache_salt=salt,
            sample_of=sample_of,
        ),
        now=0.0,
    )


def plan(engine) -> Microbatch:
    planned = engine.plan(0.0)
    assert isinstance(planned, Microbatch), planned
    return planned


def complete(engine, microbatch, token=7) -> list[Output]:
    """Every sample is `token`, and every prompt token's log-probability minus its position."""
    counts = one_each(microbatch.chunks)
    scores = tuple(
        TokenLogprobs(-float(chunk.stop - chunk.num_logits + 1 + place))
        for chunk in microbatch.chunks
        for place in range(chunk.num_scored)
    )
    result = StepResult(microbatch.index, (token,) * sum(counts), counts, prompt_logprobs=scores)
    return engine.complete(result, 0.0)


def run(engine, token=7) -> list[Output]:
    """Plans and completes, one microbatch at a time, until nothing is left."""
    outputs = []
    while engine.has_work:
        outputs += complete(engine, plan(engine), token)
    return outputs


# ---- adding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ((), 16, "the prompt of request 0 is empty"),
        (range(128), 16, "the prompt has 128 tokens and the context 128"),
        ((1,), 0, "max_tokens is 0"),
        (range(30), 60, "can reach 89 positions and the KV cache holds 80"),
        ((1, 2**31), 16, "has the token id 2147483648, ids are 0 to 2147483647"),
        ((2**70,), 16, "has the token id 1180591620717411303424"),
        ((1, -1), 16, "has the token id -1"),
    ],
)
def test_a_request_that_could_never_run_is_refused_in_one_line(prompt, max_tokens, message):
    engine = make_engine(num_blocks=20)
    with pytest.raises(CapacityError) as caught:
        add(engine, prompt=prompt, max_tokens=max_tokens)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not engine.has_work


def test_the_largest_request_that_fits_alone_runs():
    engine = make_engine(num_blocks=20)
    add(engine, prompt=range(30), max_tokens=51)  # 81 tokens, and the last one's KV is not needed
    assert len(run(engine)) == 51


def test_an_id_in_use_is_refused_and_free_again_after_the_end():
    engine = make_engine()
    add(engine, 5)
    with pytest.raises(ValueError, match="request id 5 is in use"):
        add(engine, 5)
    engine.finish(RequestId(5), "abort", 0.0)
    add(engine, 5)
    assert engine.num_unfinished == 1


def test_an_id_used_again_gets_none_of_the_old_tokens():
    engine = make_engine()
    add(engine, 5)
    first = plan(engine)
    engine.finish(RequestId(5), "abort", 0.0)
    add(engine, 5, prompt=(9, 9), max_tokens=1)
    second = plan(engine)
    assert second.released == (5,)
    assert tuple(second.admitted[0].token_ids) == (9, 9)
    assert complete(engine, first, token=1) == []
    assert complete(engine, second, token=2) == [Output(RequestId(5), 2, "length", begun=AT_ONCE)]


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_num_seqs", "max_model_len"])
def test_impossible_limits_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        make_limits(**{name: 0})


def test_more_blocks_than_can_be_kept_account_of_are_refused():
    with pytest.raises(ConfigError, match="num_blocks is 134217729: it must be at most"):
        make_limits(num_blocks=(1 << 27) + 1)
    make_limits(num_blocks=1 << 27)


# ---- ending -------------------------------------------------------------------------------------


def test_max_tokens_ends_a_request_and_no_decode_is_planned_beyond():
    engine = make_engine()
    add(engine, max_tokens=2)
    prefill, decode = plan(engine), plan(engine)
    assert decode.chunks[0].token_from == prefill.index
    complete(engine, prefill)
    assert engine.plan(0.0) == Wait("token")
    assert complete(engine, decode) == [Output(RequestId(0), 7, "length")]
    assert engine.stats.wasted_decodes == 0


def test_the_context_limit_ends_a_request():
    engine = make_engine(max_model_len=5)
    add(engine, max_tokens=100)
    outputs = run(engine)
    assert [output.finish_reason for output in outputs] == [None, "length"]


def test_a_stop_id_ends_a_request_and_wastes_the_decode_planned_ahead():
    engine = make_engine()
    add(engine, stop_ids={7})
    prefill, ahead = plan(engine), plan(engine)
    assert complete(engine, prefill) == [Output(RequestId(0), 7, "stop", begun=AT_ONCE)]
    assert engine.num_unfinished == 0
    assert engine.has_work
    assert complete(engine, ahead) == []
    assert engine.stats.wasted_decodes == 1
    assert not engine.has_work
    assert engine.num_free_blocks == engine.limits.num_blocks


def test_a_stop_id_does_not_count_before_min_tokens():
    engine = make_engine()
    add(engine, stop_ids={7}, min_tokens=2)
    assert [output.finish_reason for output in run(engine)] == [None, None, "stop"]


def test_finish_ends_a_request_while_it_waits():
    engine = make_engine()
    add(engine)
    assert engine.finish(RequestId(0), "abort", 0.0) == Output(RequestId(0), None, "abort")
    assert engine.finish(RequestId(0), "abort", 0.0) is None
    assert engine.plan(0.0) == Wait("no_requests")


def test_finish_ends_a_request_in_flight_and_the_next_microbatch_releases_it():
    engine = make_engine(num_stages=2)
    add(engine, 0)
    flying = plan(engine)
    engine.finish(RequestId(0), "stop", 0.0)
    assert engine.num_free_blocks == engine.limits.num_blocks
    add(engine, 1)
    assert plan(engine).released == (0,)
    assert complete(engine, flying) == []


def test_a_request_that_no_stage_knows_is_not_released():
    engine = make_engine()
    add(engine, 0)
    engine.finish(RequestId(0), "abort", 0.0)
    add(engine, 1)
    assert plan(engine).released == ()


# ---- completing ---------------------------------------------------------------------------------


def test_results_are_taken_in_index_order_only():
    engine = make_engine(num_stages=2)
    add(engine, 0)
    first = plan(engine)
    add(engine, 1)
    second = plan(engine)
    assert engine.outstanding == (0, 1)
    with pytest.raises(ValueError, match="result of microbatch 1"):
        complete(engine, second)
    complete(engine, first)
    with pytest.raises(ValueError, match="result of microbatch 0"):
        complete(engine, first)


def test_a_wrong_number_of_tokens_is_an_error():
    engine = make_engine()
    add(engine)
    index = plan(engine).index
    with pytest.raises(ValueError, match="samples 1 tokens, the result has 2"):
        engine.complete(StepResult(index, (1, 2), b"\2"), 0.0)
    for counts in (b"", b"\0", b"\2", b"\1\0"):
        with pytest.raises(ValueError, match=r"samples 1 tokens in 1 chunks, .* counts \["):
            engine.complete(StepResult(index, (1,), counts), 0.0)
    engine.complete(StepResult(index, (1,), b"\1"), 0.0)


def test_logprobs_go_with_their_token():
    engine = make_engine()
    add(engine, 0, prompt=(1,))
    add(engine, 1, prompt=(2,))
    index = plan(engine).index
    some = TokenLogprobs(-0.5, {3: -0.5})
    outputs = engine.complete(StepResult(index, (3, 4), b"\1\1", (some, None)), 0.0)
    assert [output.logprobs for output in outputs] == [some, None]


def test_the_result_says_whose_each_token_is():
    """Also several of one chunk, and those behind the end of their request are dropped."""
    engine = make_engine()
    add(engine, 0, prompt=(1,), max_tokens=9)
    add(engine, 1, prompt=(2,), stop_ids={3}, max_tokens=9)
    add(engine, 2, prompt=(3,), max_tokens=9)
    index = plan(engine).index
    outputs = engine.complete(StepResult(index, (3, 4, 5), b"\0\2\1"), 0.0)
    assert [output[:3] for output in outputs] == [(1, 3, "stop"), (2, 5, None)]
    assert engine.stats.wasted_decodes == 1


def test_a_middle_chunk_samples_nothing():
    engine = make_engine(max_num_batched_tokens=2)
    add(engine)
    first, second = plan(engine), plan(engine)
    assert [c.num_logits for c in first.chunks] == [0]
    assert not first.samples
    assert [c.num_logits for c in second.chunks] == [1]
    assert complete(engine, first) == []
    assert len(complete(engine, second)) == 1


# ---- the prefix cache ---------------------------------------------------------------------------


def test_a_cached_prefix_is_shared_and_the_last_block_computed_anew():
    engine = make_engine(num_stages=2)
    add(engine, 0, prompt=range(8))
    (owner,) = plan(engine).chunks
    add(engine, 1, prompt=range(8))  # in full blocks, and all of it cached
    microbatch = plan(engine)
    (admission,), (chunk,) = microbatch.admitted, microbatch.chunks
    assert admission.blocks == owner.new_blocks[:1]
    assert (chunk.start, chunk.stop) == (4, 8)
    assert not set(chunk.new_blocks) & set(owner.new_blocks)
    assert engine.stats.cached_prefix_tokens == 4


def test_how_a_request_began_is_told_with_its_first_token():
    engine = make_engine(max_num_seqs=1)
    add(engine, 0, prompt=range(8))
    run(engine)
    add(engine, 1, prompt=range(9), max_tokens=2)
    (chunk,) = (microbatch := engine.plan(1.5)).chunks
    (first,) = engine.complete(StepResult(microbatch.index, (7,), b"\1"), 4.0)
    assert first.begun == Begun(num_cached=chunk.start, queued_s=1.5, prefill_s=2.5)
    assert chunk.start == 8
    (last,) = run(engine)
    assert last.begun is None
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (8 + 9, 8)


def test_the_same_prefix_within_one_microbatch_is_not_shared():
    engine = make_engine()
    add(engine, 0, prompt=range(8))
    add(engine, 1, prompt=range(8))
    assert [admission.blocks for admission in plan(engine).admitted] == [(), ()]


def test_generated_blocks_are_found_by_the_next_turn():
    engine = make_engine()
    add(engine, 0, prompt=range(6), max_tokens=4)
    outputs = run(engine)
    add(engine, 1, prompt=[*range(6), *(output.token for output in outputs), 50])
    assert plan(engine).chunks[0].start == 8  # the tenth token's KV was never computed


@pytest.mark.parametrize("change", [{"salt": "x"}, {"prompt": (9, *range(1, 9))}])
def test_another_salt_or_another_start_shares_nothing(change):
    engine = make_engine()
    add(engine, 0, prompt=range(9))
    run(engine)
    add(engine, 1, **{"prompt": range(9)} | change)
    assert plan(engine).admitted[0].blocks == ()


def test_caching_can_be_switched_off():
    engine = make_engine(enable_prefix_caching=False)
    for number in range(2):
        add(engine, number, prompt=range(9))
        run(engine)
    assert engine.stats.cached_prefix_tokens == 0


def test_a_prefix_hit_counts_the_idle_blocks_that_it_takes():
    """4 blocks, 2 of them cached and idle: a prompt of 4 blocks fits exactly, once."""
    engine = make_engine(num_blocks=4, max_model_len=17)
    add(engine, 0, prompt=range(8), max_tokens=1)
    run(engine)
    add(engine, 1, prompt=range(13), max_tokens=1)
    add(engine, 2, prompt=range(13), max_tokens=1)
    microbatch = plan(engine)
    assert [admission.request_id for admission in microbatch.admitted] == [1]
    assert len(microbatch.admitted[0].blocks) == 2
    assert engine.num_free_blocks == 0


# ---- faults, costs ------------------------------------------------------------------------------


def test_after_a_fault_requests_go_on_from_their_last_known_token():
    engine = make_engine(num_stages=2)
    add(engine, 0, prompt=range(6), max_tokens=3)
    complete(engine, plan(engine), token=41)
    add(engine, 1, prompt=range(20, 26), max_tokens=3)
    lost = plan(engine)
    engine.lost(0.0)
    assert engine.outstanding == ()
    with pytest.raises(ValueError, match="result of microbatch"):
        complete(engine, lost)
    again = plan(engine)
    assert again.index > lost.index
    assert again.released == ()  # the stages have forgotten everything anyway
    known = {a.request_id: tuple(a.token_ids) for a in again.admitted}
    assert known == {0: (*range(6), 41), 1: tuple(range(20, 26))}
    assert [a.num_prompt_tokens for a in again.admitted] == [6, 6]
    assert [a.blocks for a in again.admitted] == [(), ()]


class FakeCost:
    def __init__(self):
        self.observed = []

    def predict(self, microbatch: Microbatch) -> StageCost:
        return StageCost((0.5 * microbatch.num_tokens,))

    def observe(self, index: int, stage: int, seconds: float) -> None:
        self.observed.append((index, stage, seconds))


def test_observations_reach_the_cost_model_at_any_time():
    cost = FakeCost()
    engine = make_engine(cost=cost)
    engine.observe(99, 0, 1.0, 1.5, 1.75)
    assert cost.observed == [(99, 0, 0.25)]
    make_engine().observe(99, 0, 1.0, 1.5, 1.75)  # without a cost model: ignored


class Scripted:
    """Answers with one draft after another; keeps the views that it was shown."""

    name = "scripted"

    def __init__(self, *drafts: Draft, traits: Traits = FREE_TRAITS):
        self.traits = traits
        self.drafts = list(drafts)
        self.views = []

    def compose(self, view, now) -> Draft:
        self.views.append(view)
        return self.drafts.pop(0)


def test_a_policy_sees_the_cost_of_what_is_outstanding():
    policy = Scripted(Draft(chunks={0: 3}, admit={0: 3}), Draft(chunks={0: 1}))
    engine = make_engine(num_stages=2, policy=policy, cost=FakeCost())
    add(engine)
    plan(engine), plan(engine)
    (outstanding,) = policy.views[1].outstanding
    assert (outstanding.num_decodes, outstanding.num_prefill_tokens) == (0, 3)
    assert outstanding.cost == StageCost((1.5,))


def test_nothing_is_foretold_of_what_is_not_outstanding():
    engine = make_engine(policy="sarathi_serve", cost=FakeCost())
    add(engine, max_tokens=2)
    assert engine.last_known_s is None  # nothing was planned
    first = plan(engine)
    assert engine.last_known_s == 1.5
    complete(engine, first)
    assert engine.last_known_s is None
    plan(engine)
    engine.lost(5.0)
    assert engine.last_known_s is None
    plan(engine)
    assert engine.last_known_s is not None
    engine = make_engine()
    add(engine)
    plan(engine)
    assert engine.last_known_s is None  # no cost model


# ---- samples of a prompt ------------------------------------------------------------------------


def ids_of(microbatch) -> list[int]:
    return [chunk.request_id for chunk in microbatch.chunks]


def test_samples_wait_for_the_prompt_and_share_its_blocks():
    """They came with the first one, so they go before a request that came later."""
    engine = make_engine(num_stages=4, max_num_batched_tokens=10, order="sjf")
    add(engine, 0, prompt=range(11))
    for sample in (1, 2, 3):
        add(engine, sample, prompt=range(11), sample_of=0)
    add(engine, 4, prompt=range(50, 62))
    first, second, third = plan(engine), plan(engine), plan(engine)
    assert (ids_of(first), ids_of(second)) == ([0], [0, 4])
    assert ids_of(third) == [1, 2, 3, 4]
    shared = list(first.chunks[0].new_blocks[:2])
    assert [list(admission.blocks) for admission in third.admitted] == [shared] * 3
    assert [(c.start, c.stop, c.num_logits) for c in third.chunks[:3]] == [(8, 11, 1)] * 3
    assert engine.stats.cached_prefix_tokens == 24


@pytest.mark.parametrize(
    ("prompt", "caching"), [(range(4), True), (range(20), False)], ids=["short", "no cache"]
)
def test_samples_that_could_share_nothing_do_not_wait(prompt, caching):
    engine = make_engine(enable_prefix_caching=caching)
    add(engine, 0, prompt=prompt)
    add(engine, 1, prompt=prompt, sample_of=0)
    assert ids_of(plan(engine)) == [0, 1]


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_samples_go_on_when_the_first_ends_early(end):
    engine = make_engine(num_stages=4, max_num_batched_tokens=4)
    add(engine, 0, prompt=range(12))
    add(engine, 1, prompt=range(12), sample_of=0)
    first = plan(engine)
    engine.finish(RequestId(0), end, 0.0)
    second = plan(engine)
    assert (ids_of(first), ids_of(second)) == ([0], [1])
    assert second.chunks[0].start == 4  # what the first one got done is shared
    add(engine, 2, prompt=range(12), sample_of=0)  # of one that is no more
    complete(engine, first)
    complete(engine, second)
    assert {output.request_id for output in run(engine)} == {1, 2}


def test_a_sample_that_ends_while_it_waits_never_runs():
    engine = make_engine()
    add(engine, 0, prompt=range(12))
    add(engine, 1, prompt=range(12), sample_of=0)
    assert engine.finish(RequestId(1), "abort", 0.0) == Output(RequestId(1), None, "abort")
    assert {output.request_id for output in run(engine)} == {0}
    assert engine.num_free_blocks == 64


def test_after_a_fault_samples_wait_for_the_prompt_again():
    engine = make_engine()
    add(engine, 0, prompt=range(12))
    add(engine, 1, prompt=range(12), sample_of=0)
    plan(engine)
    assert 1 in ids_of(plan(engine))
    engine.lost(0.0)
    assert ids_of(plan(engine)) == [0]
    assert plan(engine).admitted[0].blocks


# ---- prompt logprobs ----------------------------------------------------------------------------


def test_each_position_of_the_prompt_is_scored_once():
    """The last one samples. All are told with the first token."""
    engine = make_engine(max_num_batched_tokens=4)
    add(engine, 0, prompt=range(10), prompt_logprobs=0, max_tokens=3)
    chunks = []
    outputs = []
    while engine.has_work:
        microbatch = plan(engine)
        chunks += [(c.stop, c.num_logits, c.num_scored) for c in microbatch.chunks]
        outputs += complete(engine, microbatch)
    assert chunks == [(4, 4, 4), (8, 4, 4), (10, 2, 1), (11, 1, 0), (12, 1, 0)]
    told = [output.prompt_logprobs for output in outputs]
    assert [entry.sampled for entry in told[0]] == [-float(i) for i in range(1, 10)]
    assert told[1:] == [None, None]


def test_a_chunk_that_only_scores_sends_no_token():
    engine = make_engine(max_num_batched_tokens=4)
    add(engine, 0, prompt=range(10), prompt_logprobs=0)
    first = plan(engine)
    assert not first.samples
    assert complete(engine, first) == []


def test_a_prompt_of_one_token_has_no_logprobs_but_says_so():
    engine = make_engine()
    add(engine, 0, prompt=(5,), prompt_logprobs=0, max_tokens=1)
    assert [output.prompt_logprobs for output in run(engine)] == [()]


def test_after_a_fault_scoring_goes_on_from_where_it_stood():
    engine = make_engine(num_stages=4, max_num_batched_tokens=4)
    add(engine, 0, prompt=range(10), prompt_logprobs=0, max_tokens=1)
    first, _ = plan(engine), plan(engine)
    complete(engine, first)
    engine.lost(0.0)
    again = plan(engine), plan(engine), plan(engine)
    assert [(c.num_logits, c.num_scored) for m in again for c in m.chunks] == [
        (0, 0),
        (4, 4),
        (2, 1),
    ]
    outputs = [output for microbatch in again for output in complete(engine, microbatch)]
    assert [e.sampled for e in outputs[0].prompt_logprobs] == [-float(i) for i in range(1, 10)]


def test_scores_of_an_ended_request_are_dropped_and_others_kept():
    engine = make_engine(num_stages=2, max_num_batched_tokens=64)
    for number, length in ((0, 4), (1, 6), (2, 3)):
        add(engine, number, prompt=range(length), prompt_logprobs=0, max_tokens=1)
    microbatch = plan(engine)
    engine.finish(RequestId(0), "abort", 0.0)
    outputs = sorted(complete(engine, microbatch))
    assert [output.request_id for output in outputs] == [1, 2]
    told = [[entry.sampled for entry in output.prompt_logprobs] for output in outputs]
    assert told == [[-1.0, -2.0, -3.0, -4.0, -5.0], [-1.0, -2.0]]
    assert engine.stats.wasted_decodes == 1


def test_a_wrong_number_of_scores_is_an_error():
    engine = make_engine()
    add(engine, prompt_logprobs=0)
    index = plan(engine).index
    with pytest.raises(ValueError, match="scores 2 prompt tokens, the result 1"):
        engine.complete(StepResult(index, (1,), b"\1", prompt_logprobs=(TokenLogprobs(0.0),)), 0.0)


def test_imported_positions_cannot_be_scored():
    engine = make_engine()
    request = Request(
        id=RequestId(0),
        prompt=(1, 2, 3),
        params=SamplingParams(prompt_logprobs=0),
        num_imported=2,
    )
    with pytest.raises(ValueError, match="wants prompt_logprobs and imports 2"):
        engine.add(request, 0.0)


# ---- wrong drafts -------------------------------------------------------------------------------

START = Draft(chunks={0: 3}, admit={0: 3})
STRICT = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)
NO_CHUNK_PIPELINING = Traits(plans_ahead=True, chunk_pipelining=False, one_in_flight=False)


@pytest.mark.parametrize(
    ("traits", "drafts", "message"),
    [
        (FREE_TRAITS, [Draft(chunks={0: 3})], "runs request 0, which does not run"),
        (FREE_TRAITS, [Draft(chunks={9: 1}, admit={9: 1})], "admits request 9"),
        (FREE_TRAITS, [Draft(chunks={0: 4}, admit={0: 4})], "runs 4 positions of request 0"),
        (FREE_TRAITS, [Draft(chunks={0: 0}, admit={0: 3})], "runs 0 positions of request 0"),
        (FREE_TRAITS, [Draft(admit={0: 3})], r"admits \[0\] but gives them no chunk"),
        (FREE_TRAITS, [Draft(chunks={1: 3}, admit={0: 3, 1: 3})], "gives it no chunk"),
        (FREE_TRAITS, [Draft(chunks={0: 3}, admit={0: 999})], "needs 250 blocks, 64 are free"),
        (FREE_TRAITS, [Draft(chunks={2: 65}, admit={2: 65})], "drafts 65 tokens, over the 64"),
        (FREE_TRAITS, [Draft(preempt=(0,))], "preempts request 0, which does not run"),
        (FREE_TRAITS, [Draft()], "plans nothing, although nothing is outstanding"),
        (FREE_TRAITS, [START, START], "admits request 0, which is not waiting"),
        (FREE_TRAITS, [START, Draft(chunks={0: 2})], "runs 2 positions of request 0, not 1..1"),
        (FREE_TRAITS, [START, Draft(chunks={0: 1}), Draft(chunks={0: 1})], "has to wait"),
        (FREE_TRAITS, [START, Draft(chunks={0: 3}, admit={0: 3}, preempt=(0,))], "still runs out"),
        (
            FREE_TRAITS,
            [START, Draft(chunks={1: 3, 2: 3}, admit={1: 3, 2: 3})],
            "more than max_num_seqs = 2",
        ),
        (STRICT, [START, Draft(chunks={0: 1})], "has to wait"),
        (
            NO_CHUNK_PIPELINING,
            [Draft(chunks={0: 2}, admit={0: 3}), Draft(chunks={0: 1})],
            "has to wait",
        ),
    ],
)
def test_a_wrong_draft_is_an_error_that_names_the_policy(traits, drafts, message):
    policy = Scripted(*drafts, traits=traits)
    engine = make_engine(num_stages=4, policy=policy, max_num_seqs=2)
    add(engine, 0)
    add(engine, 1)
    add(engine, 2, prompt=range(70))
    with pytest.raises(PolicyError, match=f"policy scripted .*{message}"):
        for _ in drafts:
            engine.plan(0.0)


def test_what_a_policy_sees_cannot_be_changed_by_it():
    policy = Scripted(START)
    engine = make_engine(policy=policy)
    add(engine)
    plan(engine)
    with pytest.raises(TypeError):
        policy.views[0].running[RequestId(0)] = None


# ---- chunks that fail ---------------------------------------------------------------------------


def test_a_chunk_that_failed_ends_its_request_and_no_other():
    engine = make_engine()
    add(engine, 0, max_tokens=2)
    add(engine, 1, max_tokens=2, logprobs=0)
    add(engine, 2, max_tokens=2)
    index = plan(engine).index
    some = TokenLogprobs(-0.5)
    outputs = engine.complete(
        StepResult(index, (3, 0, 5), b"\1\1\1", (None, some, some), failed={1: "why"}), 0.0
    )
    assert outputs == [
        Output(RequestId(0), 3, begun=AT_ONCE),
        Output(RequestId(1), None, "error", error="why"),
        Output(RequestId(2), 5, None, some, begun=AT_ONCE),
    ]
    assert {output.request_id for output in run(engine)} == {0, 2}
    assert engine.num_free_blocks == engine.limits.num_blocks


def test_what_is_outstanding_of_one_that_failed_is_dropped():
    engine = make_engine()
    add(engine, 0, max_tokens=9)
    first, second = plan(engine), plan(engine)
    assert second.chunks[0].token_from == first.index
    engine.complete(StepResult(first.index, (0,), b"\1", failed={0: "why"}), 0.0)
    assert engine.complete(StepResult(second.index, (0,), b"\1", failed={0: "why"}), 0.0) == []
    assert engine.stats.wasted_decodes == 1
    assert not engine.has_work
    add(engine, 0)  # the id is free again
    assert plan(engine).released == (0,)


def test_a_prompt_that_fails_in_its_middle_ends_there():
    engine = make_engine(max_num_batched_tokens=8)
    add(engine, 0, prompt=range(30), prompt_logprobs=0)
    microbatch = plan(engine)
    scores = (TokenLogprobs(float("nan")),) * 8
    (output,) = engine.complete(
        StepResult(microbatch.index, (), b"\0", prompt_logprobs=scores, failed={0: "why"}), 0.0
    )
    assert (output.finish_reason, output.error, output.prompt_logprobs) == ("error", "why", None)
    assert not engine.has_work


def test_what_one_that_failed_computed_is_shared_no_more():
    """Nor what it was to share when it is added."""
    engine = make_engine()
    add(engine, 0, prompt=range(12), max_tokens=1)
    run(engine)
    add(engine, 1, prompt=range(20), max_tokens=1)
    microbatch = plan(engine)
    assert engine.stats.cached_prefix_tokens == 12
    engine.complete(StepResult(microbatch.index, (0,), b"\1", failed={0: "why"}), 0.0)
    add(engine, 2, prompt=range(20), max_tokens=1)
    assert plan(engine).chunks[0].start == 0
    assert engine.stats.cached_prefix_tokens == 12


def test_samples_of_a_prompt_that_failed_are_let_go():
    engine = make_engine()
    add(engine, 0, prompt=range(12), max_tokens=4)
    microbatch = plan(engine)
    engine.complete(StepResult(microbatch.index, (0,), b"\1", failed={0: "why"}), 0.0)
    add(engine, 1, prompt=range(12), sample_of=0, max_tokens=1)
    assert [output.request_id for output in run(engine)] == [1]
