"""Passes beside other processes: as many threads as are worth it, the same bits, and no thread that holds up a step."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from layerskip_kernels import GenerationConfig, generate
from support.models import random_tokens, threads, tiny_model

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
PLAIN = GenerationConfig("autoregressive", max_new_tokens=60, eos_token_ids=(), return_logits=True)


@contextmanager
def busy_processes(count: int):
    """Processes that take whatever core they get."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def seconds(model, count: int, config=PLAIN, **options):
    with threads(count):
        start = time.monotonic()
        [generation] = generate(model, [random_tokens(20, model.config.vocab_size)], config, **options)
        return time.monotonic() - start, generation


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_rule_follows_what_passes_cost(tmp_path):
    """Alone all threads; fewer where they are held up, whether the kernel counts that or not; all again after it."""
    program = tmp_path / "thread_count"
    sources = [ROOT / "tests/cpp/thread_count.cpp", ROOT / "csrc/cpu/thread_count.cpp"]
    subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'csrc/include'}", *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_beside_busy_processes_threads_that_would_only_wait_are_not_used():
    """Where every core has another process, a step of several threads used to take ten times as long as of one."""
    model = tiny_model(hidden_size=512, intermediate_size=1024, vocab_size=8000, num_layers=6)
    cores = len(os.sched_getaffinity(0))
    long = GenerationConfig("autoregressive", max_new_tokens=400, eos_token_ids=(), return_logits=True)
    alone, expected = seconds(model, 1, long)
    given = []

    def note(*_):
        given.append(torch.ops.layerskip.pass_threads())

    with busy_processes(cores):
        times = {1: [], cores: []}
        for _ in range(3):
            for count in times:
                took, generation = seconds(model, count, long, on_tokens=note)
                times[count].append(took)
                assert torch.equal(generation.logits, expected.logits)
    # Several threads either keep up with one, or are seldom used.
    several = given[-400:]
    assert min(times[cores]) < 2 * min(times[1]) or sum(n < cores for n in several) > 200, (alone, times, several)


def test_the_threads_change_in_the_middle_of_a_text_and_no_bit_does():
    model, usable = tiny_model(hidden_size=256, intermediate_size=512), os.sched_getaffinity(0)
    _, expected = seconds(model, 1)
    early = GenerationConfig(exit_layer=1, num_speculations=3, max_new_tokens=60, eos_token_ids=(), return_logits=True)
    seen = set()

    def note(*_):
        seen.add(torch.ops.layerskip.pass_threads())
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(usable)} if allowed == usable else usable)

    try:
        with threads(4), busy_processes(1):
            for config in (PLAIN, early):
                [generation] = generate(model, [random_tokens(20)], config, on_tokens=note)
                assert torch.equal(generation.logits, expected.logits)
    finally:
        os.sched_setaffinity(0, usable)
    assert seen <= {1, 2, 4}


@pytest.mark.parametrize("weights", [None, "q4_0", "int8"])
def test_threads_that_come_late_spoil_nothing(weights):
    """One row rises to the exit layer, then nine go on: what is prepared for one lies apart from what they share."""
    model = tiny_model(hidden_size=256, intermediate_size=512, num_layers=4, weights=weights)
    _, expected = seconds(model, 1)
    early = GenerationConfig(exit_layer=2, num_speculations=8, max_new_tokens=60, eos_token_ids=(), return_logits=True)
    with busy_processes(2 * len(os.sched_getaffinity(0))):
        for count in (2, 3, 4) * 6:
            _, generation = seconds(model, count, early)
            assert torch.equal(generation.logits, expected.logits) and generation.drafted > 0


@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_more_threads_than_cores(count):
    model = tiny_model()
    _, expected = seconds(model, 1)
    for _ in range(3):
        _, generation = seconds(model, count)
        assert torch.equal(generation.logits, expected.logits)
