"""The policies by name. One file each; what they may see and answer is in `core/view.py`."""

from difflib import get_close_matches

from pipeserve.core.policies.sarathi_serve import SarathiServe
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.view import Policy
from pipeserve.errors import ConfigError

POLICIES = {policy.name: policy for policy in (SarathiServe, Uniform)}


def get_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError that names the nearest, or all."""
    if name in POLICIES:
        return POLICIES[name]()
    near = get_close_matches(name, POLICIES, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(POLICIES)}"
    raise ConfigError(f"there is no policy {name!r}: {remedy}")
