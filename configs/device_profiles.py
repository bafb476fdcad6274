"""Device profiles: YAML files whose keys are `core.cost.device.DeviceProfile`'s fields.

The shipped ones stand in `configs/devices/`; `bench/fit_device.py` made them. One that
`pipeserve calibrate` makes for a model on the machine at hand has `tables` in place of `kernels`:

    name: amd-epyc-9v74            # of the device; a profile of another is refused
    provenance: {made by: ..., date: ...}
    memory_bytes: 17179869184
    devices_per_node: 2            # stages that share a machine
    tables:
      model: smollm2-135m          # what was measured; anything else is refused
      dtype: bfloat16
      threads: 1
      tensor_parallel_size: 1      # ranks that share a stage
      layer: [[1, 0.0004], [128, 0.003], ...]      # [tokens, seconds] of one layer, no attention
      head: [[1, 0.002], [64, 0.009], ...]         # [rows, seconds] of norm, head and sampling
      embedding: [[1, 0.00001], ...]               # [tokens, seconds]
    attention: {prefill_overhead_s: ..., ...}      # core.cost.kernels.AttentionCost, of one layer
    all_reduce: [{group: 2, nodes: 1, points: ...}]  # [bytes, seconds]; where ranks share a stage
    intra_node: {alpha_s: ..., bytes_per_s: ...}   # one hop
    inter_node: {alpha_s: ..., bytes_per_s: ...}
    host_s: 0.0003                 # of a microbatch on a stage, beside its own work
    control_s: 0.0002              # one message from the driver to a stage
    residuals: {linear: ..., jitter: ...}          # standard deviations of log(measured/predicted)

Between points the tables are linear, beyond the last one they go on with the last slope.
"""

from difflib import get_close_matches
from pathlib import Path

from pipeserve.configs.typed_yaml import read_yaml, write_yaml
from pipeserve.core.cost.device import DeviceProfile
from pipeserve.errors import ConfigError

_FOLDER = Path(__file__).parent / "devices"


def profile_names() -> list[str]:
    """Names of the profiles that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_profile(name_or_file: str) -> DeviceProfile:
    """A shipped profile by name, or one from a YAML file by path. Raises ConfigError."""
    return read_yaml(DeviceProfile, find_yaml(name_or_file, _FOLDER, "device profile"))


def save_profile(profile: DeviceProfile, path: Path, comment: str = "") -> None:
    """Writes what `load_profile` reads; `comment` lines go on top. Raises OSError."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    path.write_text(lines + write_yaml(profile), encoding="utf-8")


def find_yaml(name_or_file: str, folder: Path, what: str) -> Path:
    """The file of a shipped name, or the path itself. Raises ConfigError."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = sorted(found.stem for found in folder.glob("*.yaml"))
    if name_or_file in known:
        return folder / f"{name_or_file}.yaml"
    nearest = get_close_matches(name_or_file, known, n=1)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}."
    raise ConfigError(f"no {what} {name_or_file!r}; {remedy} A file is named with its .yaml")
