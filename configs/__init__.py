"""How a run is configured: one frozen `RunConfig`, made from a YAML recipe and overrides."""

from pipeserve.configs.recipes import load_recipe, make_config, recipe_names
from pipeserve.configs.run_config import RunConfig

__all__ = ["RunConfig", "load_recipe", "make_config", "recipe_names"]
