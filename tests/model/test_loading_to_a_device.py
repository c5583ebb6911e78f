"""Tensors on their way to a GPU (tests/support/two_devices.py): hashed on the host, checked and quantised there."""

import math
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerskip_kernels import Model, load_model, triton_ops
from layerskip_kernels.model import finite, model, quantise, weight_files, weight_hash
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.ops.triton import TritonOps
from support.checkpoint_files import EMBEDDING, HF_CONFIG, UP, random_tensors, write_directory
from support.models import checkpoint, config
from support.two_devices import DEVICE, OTHER, Copy, on_device

Q = "model.layers.0.self_attn.q_proj.weight"
SMALL_BYTES = 4096  # the norms, cos and sin, answers
THERE = ("int8", "int15", "q8_0")  # are quantised on the device
PARTS = dict(wq="self_attn.q_proj", wk="self_attn.k_proj", wv="self_attn.v_proj", wo="self_attn.o_proj",
             w_gate="mlp.gate_proj", w_up="mlp.up_proj", w_down="mlp.down_proj")  # fmt: skip

load = partial(load_model, backend="triton", device="cuda:1")


@pytest.fixture
def asked(monkeypatch):
    """Where the tensors were that were asked whether they hold numbers alone."""
    places = []

    def is_finite(tensor, own=finite.is_finite):
        places.append(on_device(tensor))
        return own(tensor)

    for module in (finite, weight_hash):
        monkeypatch.setattr(module, "is_finite", is_finite)
    return places


def refusal(ask, *args):
    with pytest.raises(ValueError) as error:
        ask(*args)
    return str(error.value)


@pytest.mark.parametrize("weights", [None, *THERE])
def test_values_are_checked_where_they_arrive(two_devices, tmp_path, asked, weights):
    """A question for each tensor, and one answer to all of them."""
    tensors = write_directory(tmp_path, random_tensors(HF_CONFIG, torch.bfloat16))
    with two_devices.watched() as seen:
        loaded = load(tmp_path, weights=weights)
    matrices = sum(tensor.dim() == 2 for tensor in tensors.values())  # with the embedding, which is the head, too
    assert asked == [True] * len(tensors) and {tensor.device for tensor in loaded.weights.flat} == {OTHER}
    assert seen.to_host() == [Copy(False, (len(tensors) + (matrices if weights == "q8_0" else 0),), True)]
    uploads = [copy.shape for copy in seen.to_device() if 0 not in copy.shape]
    rope = [tuple(loaded.weights.cos.shape)] * 2
    assert sorted(uploads) == sorted([*(tuple(tensor.shape) for tensor in tensors.values()), *rope])


@pytest.mark.parametrize("weights", [None, *THERE, "q4_0"])
@pytest.mark.parametrize(
    ("name", "value", "dtype", "said"),
    [
        (UP, float("nan"), None, "holds a NaN or an infinity"),
        (EMBEDDING, -float("inf"), None, "holds a NaN or an infinity"),
        ("model.layers.1.input_layernorm.weight", float("inf"), torch.float16, "holds a NaN or an infinity"),
        (Q, 65520.0, torch.float16, r"beyond the range of torch\.float16"),
    ],
)
def test_a_value_that_is_no_number_is_refused_as_on_the_host(two_devices, tmp_path, name, value, dtype, said, weights):
    tensors = random_tensors(HF_CONFIG)
    tensors[name].view(-1)[-3] = value
    write_directory(tmp_path, tensors)
    found = refusal(lambda: load(tmp_path, dtype=dtype, weights=weights))
    assert found == refusal(read_checkpoint, tmp_path, dtype) and f"tensor '{name}' in " in found
    with pytest.raises(ValueError, match=said):
        raise ValueError(found)


def test_of_two_the_first_is_named(two_devices, tmp_path):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP][0, 0] = tensors[Q][0, 0] = float("nan")
    write_directory(tmp_path, tensors)
    assert f"tensor '{Q}'" in refusal(load, tmp_path)


def test_blocks_of_a_file_are_checked_where_they_arrive(two_devices, tmp_path, asked):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP] = quantise.quantise(tensors[UP], "q8_0")
    write_directory(tmp_path, tensors)
    assert load(tmp_path).weights.layers[1].w_up.dtype == torch.uint8 and asked == [True] * len(tensors)
    tensors[UP][3, 1, 1] = 0x7C  # the scale's exponent
    write_directory(tmp_path, tensors)
    assert f"tensor '{UP}' in {tmp_path / 'model.safetensors'} has a block whose scale is a NaN" in refusal(
        load, tmp_path
    )


def test_what_goes_wrong_on_the_way_is_noticed(two_devices, tmp_path, monkeypatch):
    tensors = write_directory(tmp_path)

    def placer(self):
        def place(tensor):
            placed = tensor.to(self.device)
            if placed.shape == tensors[UP].shape:
                placed[-1, -1] = float("nan")
            return placed

        return place

    monkeypatch.setattr(TritonOps, "placer", placer)
    assert "holds a NaN or an infinity on the GPU, but none in its file" in refusal(load, tmp_path)


@pytest.mark.parametrize("weights", quantise.WEIGHT_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_quantised_on_a_device_have_the_bits_of_the_cpu(two_devices, monkeypatch, weights, dtype):
    """Types whose scales come of sums stay on the CPU. A slice of rows at a time; rows that fill no last block."""
    places = []

    def quantised(weight, *args, own=quantise.quantise):
        places.append((on_device(weight), len(weight)))
        return own(weight, *args)

    monkeypatch.setattr(model, "QUANTISED_ROWS", 24)
    monkeypatch.setattr(quantise, "quantise", quantised)
    sizes = dict(hidden_size=72, intermediate_size=104, num_heads=3, num_kv_heads=1, head_dim=24, num_layers=1)
    found = checkpoint(config(vocab_size=41, tie_word_embeddings=True, **sizes), dtype)
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0
    for scale, row in zip((1e-38, 1e-41, 1e4), tensors["model.layers.0.mlp.gate_proj.weight"], strict=False):
        row *= scale
    # Beside a tie of q8_0's scales: the reciprocal of 127 gives some of these another.
    ties = (127 * torch.arange(2049.0, 4096, 2) / 4096).view(torch.int32)
    near = torch.cat([ties - 1, ties + 1]).view(torch.float32)
    near = near[(near / 127).half() != (near * (1 / torch.tensor(127.0))).half()]
    tensors["model.layers.0.mlp.down_proj.weight"][: len(near), 1] = near.to(dtype)
    assert len(near) > 0
    loaded = Model.from_checkpoint(replace(found, tensors=dict(tensors)), "triton", weights, DEVICE).weights
    assert {place for place, _ in places} == {weights in THERE} and {rows for _, rows in places} == {24, 17, 8}

    def expected(name):
        return triton_ops.pack_weight(quantise.quantise(tensors[name], weights))

    assert torch.equal(loaded.lm_head.cpu(), expected(EMBEDDING))
    for field, part in PARTS.items():
        assert torch.equal(getattr(loaded.layers[0], field).cpu(), expected(f"model.layers.0.{part}.weight")), field


@pytest.mark.parametrize("on_demand", [False, True])
def test_a_scale_beyond_fp16_is_refused_late(two_devices, tmp_path, on_demand):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP][7, 5] = -1e7
    write_directory(tmp_path, tensors)
    found = read_checkpoint(tmp_path, torch.float32, on_demand)
    with two_devices.watched() as seen:
        said = refusal(lambda: Model.from_checkpoint(found, "triton", "q8_0"))
    assert said == "a matrix has numbers up to 1e+07, too large for q8_0's fp16 scales"
    assert said == refusal(lambda: Model.from_checkpoint(read_checkpoint(tmp_path, torch.float32), "cpu", "q8_0"))
    assert len(seen.to_host()) == 2  # all answers, and this number


class HostMemory(TorchDispatchMode):
    """Bytes of tensors on the host, those of torch's functions on the way among them."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if on_device(tensor):  # whose numbers are no memory of the host
                self._note(tensor.numbers.untyped_storage(), 0)
            elif isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _note(self, storage, num_bytes):
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += num_bytes
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, num_bytes)

    def _freed(self, which, num_bytes):
        self._seen.remove(which)
        self.now -= num_bytes


@pytest.mark.parametrize(
    ("weights", "dtype", "most"),
    [
        (None, None, 1.0),
        ("int8", None, 1.0),
        (None, torch.bfloat16, 1.5),  # what it is read as, and what it is turned into
        ("q4_0", None, math.inf),  # is fitted on the host, some rows at a time, which takes more than these tensors
    ],
)
def test_one_tensor_at_a_time_is_on_the_host(two_devices, tmp_path, monkeypatch, weights, dtype, most):
    """And not twice, nor with what is made of it on the device: the largest is the peak."""
    changes = dict(tie_word_embeddings=False, max_position_embeddings=16)
    tensors = write_directory(tmp_path, **changes)
    largest = max(tensor.nbytes for tensor in tensors.values())
    memory, names = HostMemory(), []

    def read_tensor(entry, own=weight_files.read_tensor):
        until = time.monotonic() + 1.0  # a thread that has told the hash of a piece lets go of it a moment later
        while memory.now > SMALL_BYTES and time.monotonic() < until:
            time.sleep(0.001)
        assert memory.now <= SMALL_BYTES, f"something still holds the tensor before {entry.name}"
        names.append(entry.name)
        return own(entry)

    monkeypatch.setattr(weight_files, "read_tensor", read_tensor)
    with memory:
        load(tmp_path, dtype, weights=weights)
    assert sorted(names) == sorted(tensors)
    assert largest <= memory.most <= most * largest + SMALL_BYTES


@pytest.mark.parametrize("weights", [None, "int8", "q4_0"])
def test_large_weights_show_how_far_they_are(two_devices, tmp_path, monkeypatch, capsys, weights):
    """As on the CPU: on stderr, and of a small model nothing."""
    count = len(write_directory(tmp_path))
    load(tmp_path, weights=weights)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(weight_files, "LARGE_BYTES", 1)
    for backend, device in (("triton", "cuda:1"), ("cpu", None)):
        load_model(tmp_path, backend=backend, device=device, weights=weights)
        out, shown = capsys.readouterr()
        assert out == "" and "Reading weights: 100%" in shown and f"{count}/{count}" in shown
