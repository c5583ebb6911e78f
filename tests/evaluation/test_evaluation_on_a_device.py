"""The evaluations where the backend's tensors are on another device than the host's (tests/support/two_devices.py)."""

from functools import partial

import pytest
import torch

from layerskip_kernels import GenerationConfig
from layerskip_kernels.evaluation import step_bench
from layerskip_kernels.evaluation.equality import verify
from layerskip_kernels.evaluation.exit_sweep import measure, settings_of
from layerskip_kernels.evaluation.lens import look
from layerskip_kernels.evaluation.limits import FMA, READ
from layerskip_kernels.evaluation.quality import perplexities
from layerskip_kernels.evaluation.timing import Candidate
from support.models import SMALL, agreeing_model, random_tokens

TWO_LAYERS = dict(SMALL, num_layers=2)
PROMPT = random_tokens(4, seed=1)


def both():
    return [agreeing_model(backend=backend, **TWO_LAYERS) for backend in ("triton", "cpu")]


def test_quality(two_devices):
    device, cpu = (perplexities(model, [(random_tokens(6), 2), (random_tokens(4, seed=1), 1)]) for model in both())
    assert device == cpu and cpu["tokens"] == 7


def test_lens(two_devices):
    device, cpu = (look(model, "a prompt", PROMPT, max_new_tokens=3) for model in both())
    assert device.token_ids == cpu.token_ids
    for name in ("guesses", "probabilities", "alternatives", "alternative_probabilities", "layers_needed"):
        assert torch.equal(getattr(device, name), getattr(cpu, name))


def test_sweep(two_devices):
    plain = GenerationConfig("autoregressive", max_new_tokens=4, eos_token_ids=())
    device, cpu = (measure(model, [PROMPT], settings_of(plain, [1], [2]), 1, warmup=0) for model in both())
    for name, setting in device.items():
        assert [g.token_ids for g in setting.generations] == [g.token_ids for g in cpu[name].generations]
        assert setting.acceptance_rate == cpu[name].acceptance_rate
    assert device["exit 1, 2 drafts"].acceptance_rate > 0
    # A second for each kernel: what the device took, not how long the host took to ask for it.
    assert all(seconds == int(seconds) > 20 for setting in device.values() for seconds in setting.seconds)


def test_verify(two_devices):
    [model, _] = both()
    [report] = verify(model, [("a prompt", PROMPT)], GenerationConfig(num_speculations=2, max_new_tokens=4), [1])
    assert report.all_equal and report.accepted > 0


def test_bench_reports_what_the_device_took(two_devices, monkeypatch):
    """A second for each kernel of a step, although draft_step returns at once."""
    limits = {name: Candidate(lambda: 0.1, seconds=float) for name in (READ, FMA)}
    monkeypatch.setattr(step_bench, "limit_candidates", lambda: limits)
    monkeypatch.setattr(step_bench, "interleave", partial(step_bench.interleave, clock=two_devices.clock))
    monkeypatch.setattr(step_bench, "CONTEXT", 3)
    [model, _] = both()
    cache, sequence = step_bench.prefilled(model, step_bench.prompt_tokens(model, 3), 2)
    steps, launches = step_bench.step_candidates(model, cache, sequence, 1, 1), {}
    for name, step in steps.items():
        arguments = step.prepare()
        with two_devices.watched() as seen:
            step.run(*arguments)
        step.restore()
        launches[name] = len(seen.launches)
    report = step_bench.bench(model, exit_layer=1, num_speculations=1, min_rounds=1, seconds=0.0)
    found = {row["name"]: row["median_s"] for row in report["results"]}
    assert found == {**launches, "cycle": launches["draft_step"] + launches["verify_step"]}
    assert pytest.approx(1 / launches["draft_step"]) == report["results"][1]["tokens_per_second"]
