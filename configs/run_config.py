"""`RunConfig`: everything that one run is told. Field names are the flags and the Python keywords.

Each field's metadata documents it (`help`), and names its short flag and its choices where it has
them; `pipeserve.launch.inputs.flags` makes the command line from that, so nothing is said twice. A
value of the wrong type or out of range is a ConfigError here, before any process starts. What
depends on the model (too many stages for its layers, a context longer than its own) is found by the
driver.
"""

import sys
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, get_args, get_origin, get_type_hints

from pipeserve.addresses import split_address
from pipeserve.configs.layer_lists import AUTO, FORMS
from pipeserve.core.order import ORDERS
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.errors import ConfigError

_DEFAULT_BUDGET = 512


_MOST = 2**31 - 1
"""Of a whole number that is not said to go further: what arrays and messages carry."""
_MOST_WIDE = 2**63 - 1


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run. Raises ConfigError (field, value, limit, remedy) for what cannot be right."""

    model: str = field(metadata={"help": "Folder of a checkpoint, or an alias (smollm2-135m)."})

    pipeline_parallel_size: int = _option(
        1, "Number of stages that the layers are split into.", short="-pp", least=1
    )
    tensor_parallel_size: int = _option(
        1,
        "Ranks that share each stage's layers: each has its heads, and its part of each matrix.",
        short="-tp",
        least=1,
    )
    pipeline_layers: tuple[int, ...] | str | None = _option(
        None,
        "Layers of each stage, such as 16,14, or as Megatron-LM writes them, 'Et*16|t*14L'; auto: "
        "as evens out the time that they take on each rank, measured before they are loaded. By "
        "default by what was measured before, else by the device profile, else by operations.",
        also="--pipeline-model-parallel-layout",
    )
    stage_slowdown: tuple[float, ...] | None = _option(
        None,
        "Of simulated and emulated stages: how many times as long as the profile each takes, such "
        "as 1,1.5.",
    )
    pipeline_window: int | None = _option(
        None,
        "Microbatches in flight, one that is planned ahead not counted; by default one a stage, "
        "and as many more as slow links ask for.",
        least=1,
    )
    dtype: str = _option(
        "auto",
        "Type of weights, products and KV; auto is the checkpoint's where every rank multiplies it "
        "natively, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _option(
        "auto",
        "Where stages compute; auto is cpu; cuda: GPUs, which the ranks of a machine take in turn; "
        "emulated ones wait as their profile says.",
        choices=("auto", "cpu", "cuda", "emulated"),
    )
    attention: str = _option(
        "auto",
        "What attention is computed by; auto is the fastest of the device. On a CPU, cpu is "
        "PyTorch, for products too.",
        choices=("auto", "reference", "cpu"),
    )
    head_stages: str = _option(
        "auto",
        "Which stages have the vocabulary head: the last, or both ends of the pipeline, which then "
        "take turns with it, so that neither waits for the other; auto is both on two CPU stages "
        "of one rank, and else last.",
        choices=("auto", "last", "both"),
    )
    max_model_len: int | None = _option(
        None, "Longest prompt + output, in tokens; by default the model's own.", least=2
    )
    max_num_seqs: int = _option(256, "Most requests that run at the same time.", least=1)
    max_num_batched_tokens: int | None = _option(
        None,
        "Most tokens in one microbatch, decodes and prefill chunks together; by default 512, or "
        "the longest context for policies that run whole prompts.",
        least=1,
    )
    policy: str = _option("uniform", f"Scheduling policy: {', '.join(POLICIES)}.")
    order: str = _option(
        "auto",
        "Who goes first, under every policy: fcfs is first come, first served; priority is the "
        "lowest number that a request brings; sjf is the shortest prompt, which passes longer ones "
        "only as far as each can bear by its own length; auto is sjf for uniform, and fcfs for "
        "the policies of others.",
        choices=("auto", *ORDERS),
    )
    slo_tbt: float | None = _option(
        None,
        "Longest time between two tokens that is wanted, seconds; what uniform plans by, with "
        "what a device profile predicts or, without one, what it learns as it runs.",
        over=0,
    )
    block_size: int = _option(16, "Tokens in one KV block.", least=1)
    kv_cache_dtype: str = _option(
        "auto",
        "Type of the KV pool; auto is that of the run. float16 takes half of float32's memory, and "
        "differs from it by less than bfloat16.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kv_cache_memory_bytes: int | None = _option(
        None,
        "Bytes of the KV pool of each stage, and of each rank that shares it; by default 1 GiB, or "
        "less where less memory is free.",
        least=1,
        most=_MOST_WIDE,
    )
    num_gpu_blocks_override: int | None = _option(
        None, "Exact number of KV blocks, instead of a number of bytes.", least=1
    )
    gpu_memory_utilization: float = _option(
        0.9,
        "Share of a GPU's memory for weights and KV; on cpu the pool is sized in bytes.",
        over=0,
        most=1,
    )
    device_profile: str | None = _option(
        None,
        "Cost profile of the device, by name or file; what simulated and emulated stages go by.",
    )
    enable_prefix_caching: bool = _option(True, "Share KV blocks of equal prompt beginnings.")
    generation_config: str = _option(
        "auto",
        "Where sampling parameters that are left out come from: auto is the model's "
        "generation_config.json, vllm is vLLM's defaults, else a folder with such a file.",
    )
    seed: int = _option(
        0,
        "From which requests that name no seed of their own get theirs.",
        least=0,
        most=_MOST_WIDE,
    )
    launcher: str = _option(
        "auto",
        "spawn starts all keepers here; external waits for those that others start; auto, on the "
        "command line, is what torchrun, MPI, Slurm, DeepSpeed, LeaderWorkerSet or --nnodes have "
        "this process be, and else spawn.",
        choices=("auto", "spawn", "external"),
    )
    nnodes: int = _option(
        1, "Machines that the ranks are on, equally many on each; one command a machine.", least=1
    )
    control: str | None = _option(
        None, "HOST:PORT that keepers join; by default a free port of this machine."
    )
    control_secret: str | None = _option(
        None,
        "File with the secret that driver and keepers share; by default PIPESERVE_CONTROL_SECRET. "
        "Needed where --control is reached from other machines.",
    )
    join_timeout: float = _option(120.0, "Seconds until every keeper has to have joined.", over=0)
    load_timeout: float = _option(
        60.0, "Seconds that a stage may load without reading or writing a byte.", over=0
    )
    heartbeat_interval: float = _option(
        2.0,
        "Seconds within which a keeper, its machine, or an idle stage that gives no sign of life "
        "any more is found; each is asked four times in that.",
        over=0,
    )

    hang_timeout: float = _option(
        1.5,
        "Seconds, at least, that a stage may take longer for a microbatch than it took for such "
        "ones before; then it is lost.",
        over=0,
    )
    restart: bool = _option(
        True, "Start a stage that was lost again, and let every request go on; else the run ends."
    )
    max_restarts: int = _option(
        5, "Most restarts of one rank's stage within --restart-window; then the run ends.", least=0
    )
    restart_window: float = _option(
        120.0, "Seconds within which restarts of a rank are counted.", over=0
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(RunConfig)
        for item in fields(self):
            _check_field(item.name, getattr(self, item.name), hints[item.name], item.metadata)
        if not self.model:
            raise ConfigError("model is empty; give a checkpoint folder or an alias")
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "kv_cache_memory_bytes and num_gpu_blocks_override both size the KV pool; give one"
            )
        if self.head_stages == "both" and (
            self.tensor_parallel_size > 1 or self.device == "emulated"
        ):
            raise ConfigError(
                "head_stages is both: that goes with stages of one rank that compute; use last"
            )
        self._check_layers()
        self._check_control()

    def batched_tokens(self, whole_prompts: bool, max_model_len: int) -> int:
        """`max_num_batched_tokens`, or its default for a policy that runs `whole_prompts` or not,
        and this longest context."""
        default = max_model_len if whole_prompts else _DEFAULT_BUDGET
        return self.max_num_batched_tokens or default

    @property
    def serving_order(self) -> str:
        """Who goes first: a key of `order.ORDERS`."""
        return get_policy(self.policy).traits.order if self.order == "auto" else self.order

    def _check_layers(self) -> None:
        slowdown = self.stage_slowdown
        if slowdown is not None:
            if len(slowdown) != self.pipeline_parallel_size:
                raise ConfigError(
                    f"stage_slowdown lists {len(slowdown)} stages, pipeline_parallel_size is "
                    f"{self.pipeline_parallel_size}; make them equal"
                )
            wrong = [number for number in slowdown if not 0 < number < inf]
            if wrong:
                raise ConfigError(
                    f"stage_slowdown has {wrong[0]}; give numbers over 0, such as 1,1.5"
                )
        layers = self.pipeline_layers
        if layers is None or layers == AUTO:
            return
        if isinstance(layers, str):
            raise ConfigError(f"pipeline_layers is {layers!r}, must be {FORMS}")
        if len(layers) != self.pipeline_parallel_size:
            raise ConfigError(
                f"pipeline_layers lists {len(layers)} stages, pipeline_parallel_size is "
                f"{self.pipeline_parallel_size}; make them equal (a rank holds one run of layers: "
                "there are no virtual stages)"
            )
        if min(layers) < 0:
            raise ConfigError(f"pipeline_layers has {min(layers)}; a stage holds 0 layers or more")

    def _check_control(self) -> None:
        if self.control is None:
            if self.launcher == "external":
                raise ConfigError(
                    "launcher is external, but control is not set; give the HOST:PORT that the "
                    "keepers are started with"
                )
            return
        try:
            split_address(self.control)
        except ValueError:
            raise ConfigError(
                f"control is {self.control!r}, not HOST:PORT with a port of 1 to 65535; "
                "give one such as 127.0.0.1:29600 or [::1]:29600"
            ) from None


def _check_field(name: str, value: Any, hint: Any, metadata: Any) -> None:
    """Type, choices and least value of one field."""
    if value is None and type(None) in get_args(hint):
        return
    if not _has_type(value, hint):
        raise ConfigError(f"{name} is {value!r}, must be {_type_name(hint)}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(choices)}")
    least = metadata.get("least")
    if least is not None and value < least:
        raise ConfigError(f"{name} is {value}, must be at least {least}")
    over, most = metadata.get("over"), metadata.get("most")
    if least is not None and value > (_MOST if most is None else most):
        raise ConfigError(f"{name} is {value}, must be at most {most or _MOST}")
    if over is not None and not over < value <= (sys.float_info.max if most is None else most):
        limit = "finite" if most is None else f"at most {most}"
        raise ConfigError(f"{name} is {value}, must be over {over} and {limit}")


def _has_type(value: Any, hint: Any) -> bool:
    # `type is`, not isinstance: True is no number of stages.
    if isinstance(value, tuple):
        return all(_has_type(item, get_args(_listed(hint))[0]) for item in value)
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)


def _listed(hint: Any) -> Any:
    """The kind of list that `hint` allows, if it does."""
    kinds = (hint, *get_args(hint))
    return next((kind for kind in kinds if get_origin(kind) is tuple), tuple[()])


def _type_name(hint: Any) -> str:
    if _listed(hint) == tuple[int, ...]:
        return FORMS
    if _listed(hint) == tuple[float, ...]:
        return "numbers, such as 1,1.5"
    plain = next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[plain]
