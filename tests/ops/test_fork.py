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


BUSY = """
import os, signal, sys, threading
import torch
import layerskip_kernels.ops.cpu
from layerskip_kernels._kv import PagePool

pool = PagePool(200_000, 1, 2)
sequences = [pool.add_sequence([i]) for i in range(2000)]
pool.append(sequences, [1] * len(sequences))
CALLS = {
    "the page pool": pool.check_integrity,  # which holds the pool's mutex for all the time that it takes
    "the kept models": lambda: [torch.ops.layerskip.forget_model(-1) for _ in range(100)],
}
call, stopping = CALLS[sys.argv[1]], threading.Event()

def keep_calling():
    while not stopping.is_set():
        call()

threads = [threading.Thread(target=keep_calling) for _ in range(2)]
for thread in threads:
    thread.start()
hanging = 0
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        signal.alarm(30)
        call()
        os._exit(0)
    hanging += os.waitpid(child, 0)[1] != 0
    if hanging:
        break
stopping.set()
for thread in threads:
    thread.join()
pool.check_integrity()
sys.exit("the child hangs" if hanging else 0)
"""


IN_A_STEP = """
import os, signal, sys, threading
from layerskip_kernels import Engine, GenerationConfig
from support.models import tiny_model

model = tiny_model()
config = GenerationConfig(max_new_tokens=8, exit_layer=1, eos_token_ids=())
engine, idle = Engine(model), Engine(model)
engine.add_request([1, 5, 9], config)
inside, forked = threading.Event(), threading.Event()
admit = engine._scheduler.admit

def stop_inside():
    inside.set()
    forked.wait()
    return admit()

engine._scheduler.admit = stop_inside
found = {}
thread = threading.Thread(target=lambda: found.update(engine.run()))
thread.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        engine.step()
    except RuntimeError as error:
        assert "make an Engine of its own in the child" in str(error)
        for own in (idle, Engine(model)):
            request = own.add_request([1, 5, 9], config)
            assert len(own.run()[request].token_ids) == 8
        os._exit(0)
    os._exit(1)
status = os.waitpid(child, 0)[1]
forked.set()
thread.join()
[generation] = found.values()  # the parent's goes on
sys.exit(status or len(generation.token_ids) != 8)
"""


def test_a_fork_while_another_thread_is_in_a_step():
    """The child's copy of that engine says so, instead of waiting for a thread that is not there; others serve."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [sys.executable, "-c", IN_A_STEP], env=environment, capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(("what", "forks"), [("the page pool", 8), ("the kept models", 200)])
def test_a_fork_while_another_thread_is_in_a_call(what, forks):
    """The child has no such thread, and must not wait for it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    program = [sys.executable, "-c", BUSY, what, str(forks)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("threads", [0, 2], ids=["as it is", "set_num_threads(2)"])
def test_a_forked_child_computes_the_same_bits(threads):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr[-2000:]
