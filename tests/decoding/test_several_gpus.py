"""A model says its GPU and stays there: two of them, on two GPUs of one process (tests/support/two_devices.py)."""

import time
import weakref
from dataclasses import replace

import pytest
import torch

from layerskip_kernels import (
    GenerationConfig,
    Model,
    PagedKVCache,
    draft_step,
    load_model,
    make_sampler,
    prefill,
    verify_step,
)
from support.checkpoint_files import write_directory
from support.models import SMALL, agreeing_model, checkpoint, config, random_tokens
from support.two_devices import DEVICE, OTHER

SIZES = dict(SMALL, num_layers=2)


class Text:
    """A sequence that drafts, forks and is swapped; what it found."""

    def __init__(self, model, seed):
        prompt = random_tokens(4, seed=seed)
        config = GenerationConfig(temperature=0.8, top_p=0.9, seed=seed, acceptance="rejection", presence_penalty=0.2)
        self.model, self.cache = model, PagedKVCache.with_room_for(model, [60], page_size=16)
        self.sequence, self.samplers = self.cache.add_sequence(prompt), [make_sampler(model, config, 4)]
        self.found, self.accepted = [], 0
        self.cache.commit(prefill(model, self.cache, [self.sequence], self.samplers))

    def cycle(self):
        draft = draft_step(self.model, self.cache, [self.sequence], 1, 1, self.samplers)
        verdict = verify_step(self.model, self.cache, draft, self.samplers)
        self.cache.commit(verdict)
        self.accepted += sum(verdict.accepted)
        self.found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]

    def move(self):
        self.cache.swap_in(self.sequence, self.cache.swap_out(self.sequence))
        fork = self.cache.fork(self.sequence)
        self.cycle()  # writes into a shared page
        assert self.cache.stats().num_copies > 0
        self.found += [*self.cache.export(fork), *self.cache.export(self.sequence)]


@pytest.mark.parametrize("current", [0, 1])
def test_two_models_on_two_gpus_take_turns(two_devices, current):
    """Steps that are launched, captured and replayed, whichever GPU is the current one."""
    two_devices.current_device = current
    models = [agreeing_model(backend="triton", device=device, **SIZES) for device in (DEVICE, OTHER)]
    models.append(agreeing_model(**SIZES))
    texts = [Text(model, seed=1) for model in models]
    for _ in range(3):
        for text in texts:
            text.cycle()
    for text in texts:
        text.move()
    assert two_devices.current_device == current
    for text, device in zip(texts[:2], (DEVICE, OTHER), strict=True):
        tensors = [*text.model.weights.flat, *text.cache.tensors, text.found[3], text.cache.export(text.sequence)[0]]
        assert {tensor.device for tensor in tensors} == {device}
        assert text.model.ops.captured_steps() >= 2
        assert all(torch.equal(ours.cpu(), other) for ours, other in zip(text.found, texts[2].found, strict=True))
    assert texts[2].accepted > 0


def test_a_model_is_loaded_to_its_gpu(two_devices, tmp_path):
    write_directory(tmp_path)
    model = load_model(source := tmp_path, backend="triton", device="cuda:1")
    assert {tensor.device for tensor in model.weights.flat} == {OTHER} and model.ops.device == OTHER
    assert load_model(source, backend="triton", device="cuda").ops.device == DEVICE
    two_devices.current_device = 1
    assert load_model(source, backend="triton", device="cuda").ops.device == OTHER


class Watched(dict):
    """Tensors of a checkpoint, of which the one before must be gone when the next is taken."""

    last = None

    def pop(self, name):
        # A thread that has told the hash of a piece lets go of it a moment later.
        until = time.monotonic() + 1.0
        while self.last is not None and self.last() is not None and time.monotonic() < until:
            time.sleep(0.001)
        assert self.last is None or self.last() is None, f"something still holds the tensor before {name}"
        tensor = super().pop(name)
        self.last = weakref.ref(tensor.untyped_storage())
        return tensor


@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_are_copied_once_and_hashed_on_the_way(two_devices, weights):
    """One at a time; nothing comes back, neither while they are loaded nor for the model's name in swap files."""

    def load(changed=False, weights=weights):
        found = checkpoint(config(**SIZES, tie_word_embeddings=False), torch.bfloat16)
        if changed:
            found.tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
        tensors, count = Watched({name: tensor.clone() for name, tensor in found.tensors.items()}), len(found.tensors)
        found = replace(found, tensors=tensors)
        with two_devices.watched() as seen:
            identity = Model.from_checkpoint(found, "triton", weights).identity
        copies = [copy for copy in seen.to_device() if 0 not in copy.shape]
        assert not seen.to_host() and len(copies) == count + 2  # cos and sin
        return identity

    identity = load()
    assert identity == load() != load(changed=True)
    assert load(weights="int15") not in (identity, load(weights="q4_0"))


@pytest.mark.parametrize(("backend", "device", "message"), [
    ("triton", "cuda:7", "device cuda:7 is not there; torch finds cuda:0, cuda:1"),
    ("triton", "cpu", "here device must be cuda, got cpu"),
    ("triton", "gpu:one", "device must name one of torch's, such as 'cuda:1', got 'gpu:one'"),
    ("cpu", "cuda:0", "backend 'cpu' runs on the CPU; device cuda:0 takes backend='triton'"),
])  # fmt: skip
def test_a_device_that_cannot_be(two_devices, backend, device, message):
    with pytest.raises(ValueError, match=message):
        load_model("/no/such/model", backend=backend, device=device)
