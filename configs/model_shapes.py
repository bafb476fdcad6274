"""Shapes of known models, for simulation: YAML files in `configs/models/`.

Keys are the fields of `core.cost.shape.ModelShape`; each file says where its values are from.
"""

from pathlib import Path

from pipeserve.configs.device_profiles import find_yaml
from pipeserve.configs.typed_yaml import read_yaml
from pipeserve.core.cost.shape import ModelShape

_FOLDER = Path(__file__).parent / "models"


def shape_names() -> list[str]:
    """Names of the shapes that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_shape(name_or_file: str) -> ModelShape:
    """A shipped shape by name, or one from a YAML file by path. Raises ConfigError."""
    return read_yaml(ModelShape, find_yaml(name_or_file, _FOLDER, "model shape"))
