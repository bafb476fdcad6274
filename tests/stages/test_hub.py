"""Hub ids, through the real client of the hub, against a hub of our own."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from checkpoints import tiny_llama
from fake_hub import COMMIT, FakeHub
from hub_client import Fetch

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint import hub as stages_hub
from pipeserve.stages.checkpoint.hub import is_hub_id
from pipeserve.stages.checkpoint.sources import origin, resolve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a repository as repositories are: with much that is not for us."""
    folder = Path(tiny_llama(tmp_path_factory.mktemp("model"), shard_bytes="150KB"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "model.safetensors.index.json" in files
    others = ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "run.py")
    files |= dict.fromkeys((*others, "README.md", "original/params.json", "onnx/a.onnx"), b"other")
    return files | {"tokenizer.json": b"{}", "merges.txt": b"a b", "tokenizer.model": b"x"}


NOT_FETCHED = {
    "pytorch_model.bin",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "run.py",
    "README.md",
    "original/params.json",
    "onnx/a.onnx",
}


class Machine:
    """Where models are fetched to."""

    def __init__(self, home: Path) -> None:
        self.home, self.endpoint = home, "http://127.0.0.1:9"  # where nothing listens

    def start(self, model="org/tiny", **env):
        where = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint}
        return Fetch(model, self.home.parent, {**where, **env})

    def fetch(self, model="org/tiny", **env):
        """The folder that `model` is in."""
        folder, why, self.said = self.start(model, **env).result()
        assert folder is not None, why
        return folder

    def refused(self, *parts, model="org/tiny", **env):
        folder, why, self.said = self.start(model, **env).result()
        assert folder is None and "\n" not in why
        for part in parts:
            assert part in why


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "hf")


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_needed_is_fetched_once(machine, checkpoint):
    hub = FakeHub(checkpoint)
    needed = {name: data for name, data in checkpoint.items() if name not in NOT_FETCHED}
    with hub.running() as machine.endpoint:
        folder = machine.fetch()
        assert held(folder) == needed
        assert sorted(hub.fetched) == sorted(needed)
        assert "fetching org/tiny: 0.00 of 0.00 GB" in machine.said
        assert machine.fetch() == folder
        assert len(hub.fetched) == len(needed)
        before = hub.num_requests
        assert machine.fetch(HF_HUB_OFFLINE="1") == folder
        assert hub.num_requests == before
        assert machine.fetch("org/tiny@v1") == machine.fetch(f"org/tiny@{COMMIT}") == folder
    assert machine.fetch() == folder  # the hub is gone, and the cache does
    cache = machine.home / "hub"
    assert origin("org/tiny@v1", folder) == f"hub, commit {COMMIT[:12]} in {cache}"


def test_a_model_in_one_file(machine, checkpoint):
    files = {"config.json": checkpoint["config.json"], "model.safetensors": b"weights"}
    hub = FakeHub({**files, "model-00001-of-00002.safetensors": b"of another layout"})
    with hub.running() as machine.endpoint:
        assert held(machine.fetch()) == files


def test_a_model_in_one_file_beside_an_index_of_another(machine, checkpoint):
    """Whose shards are not there: that of the model that it was made of (mlx-swift-lm#554)."""
    index = "model.safetensors.index.json"
    files = {name: checkpoint[name] for name in ("config.json", index)}
    files["model.safetensors"] = b"weights"
    with FakeHub(files).running() as machine.endpoint:
        assert held(machine.fetch()) == files


def test_config_and_weights_are_of_one_commit(machine, checkpoint):
    hub = FakeHub(checkpoint, moves=True)
    with hub.running() as machine.endpoint:
        folder = machine.fetch()
        assert folder.name == COMMIT and hub.head != COMMIT
        assert (folder / "model-00001-of-00003.safetensors").exists()


def test_a_repository_that_takes_a_token(machine, checkpoint):
    hub = FakeHub(checkpoint, token="hf_secret")
    with hub.running() as machine.endpoint:
        machine.refused("org/tiny is no folder here and no model on", machine.endpoint, "HF_TOKEN")
        hub.gated = True
        machine.refused("org/tiny is gated; accept its terms", "HF_TOKEN")
        assert not hub.fetched
        assert machine.fetch(HF_TOKEN="hf_secret").is_dir()


def test_what_the_hub_does_not_have(machine, checkpoint):
    with FakeHub(checkpoint).running() as machine.endpoint:
        machine.refused("org/tinny is no folder here and no model on", model="org/tinny")
        machine.refused("no revision 'v9'", "leave it out", model="org/tiny@v9")
        machine.refused("'org/ti--ny' is no hub id", model="org/ti--ny")


def test_pickled_weights_are_never_fetched(machine, checkpoint):
    hub = FakeHub({"config.json": checkpoint["config.json"], "pytorch_model.bin": b"pickle"})
    with hub.running() as machine.endpoint:
        machine.refused("org/tiny holds no model.safetensors on", "can run code")
        assert hub.fetched == ["config.json"]


def test_weights_of_what_is_not_supported_are_not_fetched(machine, checkpoint):
    config = json.loads(checkpoint["config.json"]) | {"architectures": ["NoSuchForCausalLM"]}
    hub = FakeHub({**checkpoint, "config.json": json.dumps(config).encode()})
    with hub.running() as machine.endpoint:
        machine.refused("NoSuchForCausalLM is not supported")
        assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_shard_that_the_index_names_is_not_there(machine, checkpoint):
    name = next(name for name in checkpoint if name.startswith("model-00002"))
    hub = FakeHub({key: data for key, data in checkpoint.items() if key != name})
    with hub.running() as machine.endpoint:
        machine.refused(f"org/tiny holds no {name} on")


def test_offline_and_not_cached(machine):
    machine.refused("org/tiny is not, or not wholly, in the cache", "unset it", HF_HUB_OFFLINE="1")
    machine.refused("cannot reach http://127.0.0.1:9 for org/tiny", "HF_ENDPOINT")


def test_it_goes_on_after_a_kill(machine, checkpoint):
    """Half a file is no model, not even offline; the next fetch asks for what is not whole."""
    first, stalled, last = sorted(name for name in checkpoint if name.startswith("model-0"))
    hub = FakeHub(checkpoint, stalls=stalled)
    with hub.running() as machine.endpoint:
        fetch = machine.start()
        assert hub.half_sent.wait(30)
        snapshot = machine.home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
        while not ((snapshot / first).exists() and (snapshot / last).exists()):
            assert fetch.process.is_alive()
            time.sleep(0.01)
        fetch.kill()
        machine.refused("not, or not wholly, in the cache", HF_HUB_OFFLINE="1")
        hub.go_on.set()
        hub.fetched.clear()
        folder = machine.fetch()
        assert hub.fetched == [stalled]
        assert (folder / stalled).read_bytes() == checkpoint[stalled]


def test_a_hub_that_breaks_off(machine, checkpoint):
    hub = FakeHub(checkpoint, broken="model-00001-of-00003.safetensors")
    with hub.running() as machine.endpoint:
        machine.refused("fetching org/tiny from", "broke off: ", "500", "run it again")
        hub.broken = None
        assert machine.fetch().is_dir()


def test_a_cache_that_cannot_be(machine, checkpoint):
    machine.home.write_text("a file")
    with FakeHub(checkpoint).running() as machine.endpoint:
        machine.refused("Not a directory", "set HF_HOME to a folder that can be written")


def test_a_full_disk(monkeypatch, tmp_path):
    """Which no test can have: the client is made to say so."""

    def fails(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no room for org/tiny in .*set HF_HOME to a larger disk"
    ):
        resolve("org/tiny")


def test_ctrl_c_is_not_an_error_of_the_model(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages_hub.fetch("org/tiny", lambda text: None)


@pytest.mark.parametrize(
    ("model", "is_id"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("org/name@refs/pr/3", True),
        ("tiiuae/falcon-180B@main", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("~me/name", False),
        ("a/b/c", False),
        ("org/name@", False),
        ("../name", False),
        ("models/tiny.gguf", False),
        ("models/config.json", False),
    ],
)
def test_what_is_spelled_as_a_hub_id(model, is_id):
    assert is_hub_id(model) is is_id
