"""From a command to the first token: what the client has to import, and what it says meanwhile."""

import re
import subprocess
import sys

import pytest
from checkpoints import tiny_llama
from fake_client import byte_tokenizer

PHASES = ["looking for the model", "waiting for keepers", "starting stages", "loading weights",
          "connecting stages"]  # fmt: skip
CLIENT = """
import sys
sys.modules.update(torch=None, transformers=None, numpy=None)  # an import of these now raises
from pipeserve.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_the_client_imports_nothing_that_takes_long(tmp_path):
    folder = tiny_llama(tmp_path / "model", vocab_size=300)
    byte_tokenizer(tmp_path / "model")
    words = ["generate", folder, "-pp", "2", "--prompt", "The sea", "--chat"]
    options = ["--max-tokens", "4", "--temperature", "0", "--ignore-eos"]
    command = [sys.executable, "-c", CLIENT, *words, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^([a-z ]+): \d+\.\d s$", done.stderr, re.MULTILINE)
    assert said == [phase for phase in PHASES if phase in said]  # one that took no time is not said
    assert said[:3] == PHASES[:3]
    assert done.stdout.endswith("\n") and len(done.stdout) > 1
