"""The policies by name. One file each; what they may see and answer is in `core/view.py`.

To add one, write its file (`sarathi_serve.py` is a short one to begin from) and list it below:
flags, recipes and the tests that hold for every policy take it from here.
"""

from difflib import get_close_matches

from pipeserve.core.policies.chunked_only import ChunkedOnly
from pipeserve.core.policies.hybrid_only import HybridOnly
from pipeserve.core.policies.orca import Orca
from pipeserve.core.policies.request_level import RequestLevel
from pipeserve.core.policies.sarathi import Sarathi
from pipeserve.core.policies.sarathi_serve import SarathiServe
from pipeserve.core.policies.splitfuse import SplitFuse
from pipeserve.core.policies.token_throttle import TokenThrottle
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.policies.vllm import Vllm
from pipeserve.core.view import Policy
from pipeserve.errors import ConfigError

POLICIES = {
    policy.name: policy
    for policy in (
        Uniform,
        RequestLevel,
        Orca,
        Vllm,
        Sarathi,
        SarathiServe,
        HybridOnly,
        ChunkedOnly,
        SplitFuse,
        TokenThrottle,
    )
}
"""The default first, then by year of publication."""


def get_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError that names the nearest, or all."""
    if name in POLICIES:
        return POLICIES[name]()
    near = get_close_matches(name, POLICIES, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(POLICIES)}"
    raise ConfigError(f"there is no policy {name!r}: {remedy}")
