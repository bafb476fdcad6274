"""`LLM` in programs that are not made for it."""

import subprocess
import sys

import pytest
from checkpoints import tiny_llama

pytestmark = pytest.mark.processes

PROGRAM = """
import os, sys, torch
torch.set_num_threads(2)
torch.ones(300, 300) @ torch.ones(300, 300)  # OpenMP's threads are there
from pipeserve import LLM, SamplingParams
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
with LLM(sys.argv[1], pipeline_parallel_size=2, num_gpu_blocks_override=8) as llm:
    (found,) = llm.generate([[3, 4, 5]], SamplingParams(temperature=0, max_tokens=3))
print(len(found.token_ids))
"""


def test_a_program_without_main_in_a_child_of_one_with_threads(tmp_path):
    """Read from standard input, too: nobody imports it again, as spawn does (nnsight#643,
    tpu-inference#1708). What computes is no fork of what has threads (pytorch#17199, #41197)."""
    command = [sys.executable, "-", tiny_llama(tmp_path)]
    done = subprocess.run(command, input=PROGRAM, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
