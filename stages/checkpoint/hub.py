"""Models of a Hugging Face hub: fetched once into its cache, only the files that are needed.

The library's own environment variables hold: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT (a mirror),
HF_TOKEN, HF_HUB_OFFLINE. What is in the cache is used when the hub cannot be reached.
"""

import errno
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeserve.errors import ConfigError
from pipeserve.stages.config.families import read_config

if TYPE_CHECKING:
    from tqdm.std import tqdm

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?", re.ASCII)
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".yaml")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
"""Config, tokenizer, chat template, and the index of the weights."""

_WHOLE = "model.safetensors"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def is_hub_id(model: str) -> bool:
    """Whether `model` is spelled `org/name`, with a branch, tag or commit after an @ if wanted."""
    return _HUB_ID.fullmatch(model) is not None and not model.endswith(_FILE_ENDINGS)


def fetch(model: str, on_progress: Callable[[str], None]) -> Path:
    """The folder of hub id `model` in the hub's cache, with its config, tokenizer and safetensors.

    The config comes first: weights of a model that is not supported are never fetched. After an
    interruption only the files that are not whole yet are fetched. Raises ConfigError.
    """
    match = _HUB_ID.fullmatch(model)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    folder = _snapshot(repo, revision, _SMALL_FILES, on_progress)
    read_config(folder)
    shards = _shards(folder)
    if _missing_of(folder, shards):
        # By commit, so that config and weights are of one even if the branch moves meanwhile.
        _snapshot(repo, folder.name, [_WHOLE], on_progress)
        if _missing_of(folder, shards):
            _snapshot(repo, folder.name, shards, on_progress)
    missing = _missing_of(folder, shards)
    if missing:
        raise ConfigError(_missing(repo, missing[0]))
    return folder


def _missing_of(folder: Path, shards: list[str]) -> list[str]:
    """One file is enough, whatever an index says that lies beside it (`files_of_tensors`)."""
    if (folder / _WHOLE).exists():
        return []
    return [shard for shard in shards if not (folder / shard).exists()]


def _shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights, as the index says, where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [_WHOLE]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is no safetensors index; fetch it again") from None


def _missing(repo: str, name: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _not_cached(repo)
    return (
        f"{repo} holds no {name} on {constants.ENDPOINT}; give a repository with safetensors "
        "(pickled weights, .bin, can run code when read and are never fetched)"
    )


def _not_cached(repo: str) -> str:
    from huggingface_hub import constants

    return (
        f"{repo} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
        "is set; unset it, or point HF_HOME at a cache that holds the model"
    )


def _snapshot(
    repo: str, revision: str | None, names: list[str], on_progress: Callable[[str], None]
) -> Path:
    """The cache's folder of one commit, with the files of its top level that match `names`."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=names,
            ignore_patterns="*/*",
            tqdm_class=_reporter(f"fetching {repo}", on_progress),
        )
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is no hub id: {_one_line(error)}") from None
    except (errors.HTTPError, OSError) as error:
        raise ConfigError(_explain(repo, revision, error)) from error
    return Path(folder)


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    """What to tell the user: what happened, and the remedy."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; accept its terms on {hub}/{repo} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo} is no folder here and no model on {hub} that can be seen; check the name, "
            "or set HF_TOKEN if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; leave it out to take the main branch"
    if constants.HF_HUB_OFFLINE:
        return _not_cached(repo)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"cannot reach {hub} for {repo}, which is not wholly in the cache {cache}; check the "
            "network, HF_ENDPOINT and proxies, or give a model folder"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"no room for {repo} in {cache}; free some, or set HF_HOME to a larger disk"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f"{cache}: {error.strerror}; set HF_HOME to a folder that can be written"
    return (
        f"fetching {repo} from {hub} broke off: {_one_line(error)}; run it again, files that are "
        "whole are kept"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _reporter(what: str, on_progress: Callable[[str], None]) -> "type[tqdm]":
    """A progress bar, as the hub's library wants one, that says how far it is instead of drawing.

    tqdm names `display` as the method to overload for another way to show.
    """
    from tqdm.std import tqdm

    class Reporter(tqdm):
        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # of the hub's own subclass
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B" and self.total:
                on_progress(f"{what}: {self.n / 1e9:.2f} of {self.total / 1e9:.2f} GB")

    return Reporter
