"""What the layers of each family are, and the ends of its models: one file for all that are built
alike. `stages/config/families/` says how their configuration is read."""

from pipeserve.stages.config.families import find_family
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.families import falcon, gemma, llama, opt
from pipeserve.stages.families.parts import Parts

_PARTS = {"falcon": falcon.PARTS, "gemma": gemma.PARTS, "llama": llama.PARTS, "opt": opt.PARTS}


def parts_of(config: ModelConfig) -> Parts:
    return _PARTS[find_family(config.architecture).parts]
