"""What could be changed of a recorded run, one thing at a time: by its user, or by wishing."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeserve.core.policies import POLICIES
from pipeserve.profiling.advice.recorded_times import Fitted, Tweak
from pipeserve.profiling.advice.replay import Setting

_CUT_PROMPTS_BUDGET = 512
"""`RunConfig`'s default for policies that cut prompts into chunks."""
_LEAST_BUDGET = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, of the setting or of the recorded times."""

    kind: str
    """What is changed: "layers", "window", "policy", "budget", "seqs" or "kv"; of a wish the cause
    that it takes away (`CAUSES`), "link" or "replica"."""
    what: str
    how: str = ""
    """The flags to give; empty for a wish."""
    setting: Setting
    tweak: Tweak = field(default_factory=Tweak)
    at_once: bool = False
    """Every request is there from the start."""


def choices(setting: Setting, fitted: Fitted, blocks_are_given: bool) -> list[Change]:
    """What the user can set otherwise; some may be refused when they are tried.

    `blocks_are_given`: the number of KV blocks stays when layers move; else the fullest stage's
    memory does.
    """
    return [
        *_splits(setting, fitted, blocks_are_given),
        *_windows(setting),
        *_policies(setting),
        *_budgets(setting),
        *_limits(setting),
    ]


def best_split(setting: Setting, fitted: Fitted) -> tuple[int, ...]:
    """Layers per stage whose slowest stage is fastest for the mean microbatch.

    Each layer goes to the stage that is done soonest with it, which is exact for equal layers on
    stages of any speed. Among equals the earlier stage takes it.
    """
    counts = [1] * fitted.num_stages
    for _ in range(sum(setting.num_layers) - fitted.num_stages):
        with_it = [stage_s(fitted, stage, count + 1) for stage, count in enumerate(counts)]
        counts[with_it.index(min(with_it))] += 1
    return tuple(counts)


def stage_s(fitted: Fitted, stage: int, num_layers: int) -> float:
    """Seconds of a mean microbatch on a stage with so many layers."""
    head = fitted.head_shares[stage] * fitted.head_s(fitted.mean_logits)
    return fitted.factors[stage] * num_layers * fitted.layer_s(fitted.mean_counts) + head


def _splits(setting: Setting, fitted: Fitted, blocks_are_given: bool) -> Iterator[Change]:
    """The best one, and one layer of the slowest stage to each of the others."""
    now = setting.num_layers
    if sum(now) < fitted.num_stages:
        return
    slowest = max(range(len(now)), key=lambda stage: stage_s(fitted, stage, now[stage]))
    moved = [
        tuple(n - (s == slowest) + (s == to) for s, n in enumerate(now))
        for to in range(len(now))
        if to != slowest and now[slowest] > 1
    ]
    for counts in dict.fromkeys([best_split(setting, fitted), *moved]):
        if counts == now:
            continue
        changed, listed = setting.with_layers(counts), ",".join(map(str, counts))
        if not blocks_are_given:
            num_blocks = setting.limits.num_blocks * max(now) // max(counts)
            limits = replace(setting.limits, num_blocks=max(num_blocks, 1))
            changed = replace(changed, limits=limits)
        yield Change(
            kind="layers",
            what=f"layers {listed} in place of {','.join(map(str, now))}",
            how=f"--pipeline-layers {listed}",
            setting=changed,
        )


def _windows(setting: Setting) -> Iterator[Change]:
    now, num_stages = setting.plan.window, len(setting.plan.stages)
    or_more = " or more" if setting.plan.window_follows else ""
    for window in dict.fromkeys([num_stages, num_stages + 1, 2 * num_stages, 2 * now]):
        if window != now:
            yield Change(
                kind="window",
                what=f"{window} microbatches in flight in place of {now}{or_more}",
                how=f"--pipeline-window {window}",
                setting=replace(
                    setting, plan=replace(setting.plan, window=window, window_follows=False)
                ),
            )


def _policies(setting: Setting) -> Iterator[Change]:
    """Each with the present budget, and with its kind's usual one where that is another kind."""
    limits = setting.limits
    was_whole = POLICIES[setting.policy].traits.whole_prompts
    for name, policy in POLICIES.items():
        if name == setting.policy:
            continue
        whole = policy.traits.whole_prompts
        usual = limits.max_model_len if whole else _CUT_PROMPTS_BUDGET
        budgets = [limits.max_num_batched_tokens]
        if whole != was_whole:
            budgets.append(usual)
        for budget in dict.fromkeys(budgets):
            if whole and budget < limits.max_model_len:
                continue
            flag = "" if budget == budgets[0] else f", {budget} tokens a microbatch"
            yield Change(
                kind="policy",
                what=f"policy {name} in place of {setting.policy}{flag}",
                how=f"--policy {name} --max-num-batched-tokens {budget}",
                setting=replace(_with_budget(setting, budget), policy=name),
            )


def _budgets(setting: Setting) -> Iterator[Change]:
    now = setting.limits.max_num_batched_tokens
    whole = POLICIES[setting.policy].traits.whole_prompts
    least = setting.limits.max_model_len if whole else _LEAST_BUDGET
    for budget in (now // 4, now // 2, 2 * now, 4 * now):
        if budget >= least:
            yield Change(
                kind="budget",
                what=f"at most {budget} tokens a microbatch in place of {now}",
                how=f"--max-num-batched-tokens {budget}",
                setting=_with_budget(setting, budget),
            )


def _limits(setting: Setting) -> Iterator[Change]:
    limits = setting.limits
    for kind, name, flag, what in (
        ("seqs", "max_num_seqs", "--max-num-seqs", "requests at a time"),
        ("kv", "num_blocks", "--num-gpu-blocks-override", "KV blocks"),
    ):
        now = getattr(limits, name)
        yield Change(
            kind=kind,
            what=f"{2 * now} {what} in place of {now}",
            how=f"{flag} {2 * now}",
            setting=replace(setting, limits=replace(limits, **{name: 2 * now})),
        )


def _with_budget(setting: Setting, budget: int) -> Setting:
    limits = replace(setting.limits, max_num_batched_tokens=budget)
    return replace(setting, limits=limits)


def wishes(setting: Setting, fitted: Fitted) -> list[Change]:
    """What no flag changes: a cause of idle time taken away, a faster part."""
    now = setting.num_layers
    slowest = max(range(len(now)), key=lambda stage: stage_s(fitted, stage, now[stage]))
    tweaks = {
        "stage_imbalance": ("every stage as fast as the mean one", Tweak(equal_stages=True)),
        "head_and_sampling": ("no vocabulary head, no sampling", Tweak(head=0.0)),
        "prefill_vs_decode": (
            "every microbatch with the same prefill",
            Tweak(even=frozenset({1, 2})),
        ),
        "decode_count": ("every microbatch with as many decodes", Tweak(even=frozenset({3}))),
        "context_length": ("every microbatch with as much context", Tweak(even=frozenset({4}))),
        "jitter": ("every microbatch as long as it should be", Tweak(jitter=False)),
        "token_feedback": ("sampled tokens at once on the first stage", Tweak(feedback=0.0)),
        "planning": ("plans in no time", Tweak(planning=0.0)),
        "control": ("messages in no time", Tweak(control=0.0)),
        "link": ("activations over links in no time", Tweak(link=0.0)),
        "faster link": ("links twice as fast", Tweak(link=0.5)),
        "replica": (
            f"a second device for stage {slowest}, the slowest: half its time, as if two took "
            "turns and shared its KV",
            Tweak(speed={slowest: 2.0}),
        ),
    }
    if any(fitted.summed):
        tweaks["all_reduce"] = ("all-reduces in no time", Tweak(all_reduce=0.0))
    if any(fitted.waited):
        tweaks["rank_wait"] = ("no rank of a stage waits for another", Tweak(rank_wait=0.0))
    found = [
        Change(kind=kind, what=what, setting=setting, tweak=tweak)
        for kind, (what, tweak) in tweaks.items()
    ]
    limits = setting.limits
    blocks_of_all = limits.max_num_seqs * -(-limits.max_model_len // limits.block_size)
    num_blocks = max(limits.num_blocks, min(blocks_of_all, 1000 * limits.num_blocks))
    limits = replace(limits, num_blocks=num_blocks)
    return [
        *found,
        Change(kind="kv_full", what="KV without end", setting=replace(setting, limits=limits)),
        Change(
            kind="no_requests",
            what="every request there from the start",
            setting=setting,
            at_once=True,
        ),
    ]
