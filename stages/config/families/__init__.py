"""The model families by their configuration, without torch: one short file each, that says what
differs. What their layers are, `stages/families/` has."""

from pathlib import Path

from pipeserve.errors import ConfigError
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families import falcon, gemma, llama, mistral, mixtral, opt, phi3, qwen
from pipeserve.stages.config.families.family import Family
from pipeserve.stages.config.model_config import ModelConfig

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA,
    mistral.MISTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    mixtral.MIXTRAL,
    phi3.PHI3,
    gemma.GEMMA2,
    gemma.GEMMA3,
    falcon.FALCON,
    opt.OPT,
)


def find_family(architecture: str | None, folder: Path | None = None) -> Family:
    """By the architecture that config.json names. Raises ConfigError, naming `folder`."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(
        f"{folder}: architecture {architecture or 'unknown'} is not supported; "
        f"supported: {supported}"
    )


def read_config(folder: str | Path) -> ModelConfig:
    """Reads config.json of `folder` (and generation_config.json, for the end-of-text ids).

    Raises ConfigError for a file that is missing or malformed, and for what is not supported.
    """
    file = ConfigFile(Path(folder))
    family = find_family(file.architecture, file.path.parent)
    file.check_model_type(family.model_type)
    config = family.read_config(file)
    config.check(file.path)
    return config
