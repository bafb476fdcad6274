"""From a command to the first token: what the client has to import, and what it says meanwhile."""

import json
import subprocess
import sys

import pytest
from checkpoints import tiny_llama
from fake_client import byte_tokenizer

CLIENT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of it now raises
from pipeserve.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_the_client_needs_neither_torch_nor_transformers(tmp_path):
    folder = tiny_llama(tmp_path / "model", vocab_size=300)
    byte_tokenizer(tmp_path / "model")
    words = ["pipeserve.launch.cli", "generate", folder, "-pp", "2", "--prompt", "The sea"]
    options = ["--max-tokens", "4", "--logprobs", "0", "--temperature", "0"]
    command = [sys.executable, "-c", CLIENT, *words[1:], *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["token_ids"]) == 4 and result["num_prompt_tokens"] == 7
