"""A server that loads a model, uses it with several threads and then forks: its children compute the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import multiprocessing, os, sys
import torch
torch.set_num_threads(2)
from layerskip_kernels import GenerationConfig, generate
from support.models import tiny_model
from support.teams import assert_equal_bits, bits

model = tiny_model()
config = GenerationConfig(max_new_tokens=16, exit_layer=1, eos_token_ids=(), return_logits=True)

def run():
    [got] = generate(model, [[1, 5, 9]], config)
    assert got.drafted > 0
    return got.token_ids, got.logits

tokens, logits = run()
expected = bits()

def in_child(threads):
    assert torch.get_num_threads() == 1
    if threads:
        torch.set_num_threads(threads)  # what a worker's start-up code may well do
    for _ in range(2):
        got, got_logits = run()
        assert got == tokens and torch.equal(got_logits, logits)
    if not threads:  # else torch's own regions, in tensors large enough for them, would hang as torch's do
        assert_equal_bits(bits(), expected)

child = multiprocessing.get_context("fork").Process(target=in_child, args=(int(sys.argv[1]),))
child.start()
child.join(100)
if child.is_alive():
    child.kill()
    sys.exit("the child hangs")
again, _ = run()  # the parent keeps its threads
assert torch.get_num_threads() == 2 and again == tokens
sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("threads", [0, 2], ids=["as it is", "set_num_threads(2)"])
def test_a_forked_child_computes_the_same_bits(threads):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr[-2000:]
