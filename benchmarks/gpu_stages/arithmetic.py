"""Stage 4: what the kernels assume of the hardware.

That ``tl.dot(..., input_precision="ieee")`` folds with one fma after the other in rule 1's order, alone and in the
kernels of prompts; that integer dots are exact; and that a step replayed many times over never normalises a row before
all of it was written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stage import DEVICE, REHEARSING, Stage, StageError, main

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels import PagedKVCache, triton_ops
from layerskip_kernels.operands import PendingRows
from layerskip_kernels.ops import reference
from layerskip_kernels.triton_ops import launch, tuned
from support.models import SMALL, tiny_model

TILE = 16 if REHEARSING else 64
OUTPUTS, INPUTS = (32, 32) if REHEARSING else (1024, 1024)  # OUTPUTS^2 sums
INTEGER_INPUTS = 64 if REHEARSING else 4096
REPLAYS = 2 if REHEARSING else 20_000


@triton.jit
def _dot_kernel(
    x_ptr, w_ptr, y_ptr, N, K, TILE: tl.constexpr, STEP: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] times w [K, N], K in steps that one accumulator runs through."""
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    y = tl.zeros([TILE, TILE], tl.int32 if INTEGERS else tl.float32)
    for first in range(0, K, STEP):
        x = tl.load(x_ptr + m[:, None] * K + (first + k)[None, :])
        w = tl.load(w_ptr + (first + k)[:, None] * N + n[None, :])
        if INTEGERS:
            y = tl.dot(x, w, y, out_dtype=tl.int32)
        else:
            y = tl.dot(x.to(tl.float32), w.to(tl.float32), y, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


def dot(x: Tensor, w: Tensor) -> Tensor:
    integers = x.dtype == torch.int8
    y = torch.empty(x.size(0), w.size(1), dtype=torch.int32 if integers else torch.float32, device=x.device)
    _dot_kernel[(x.size(0) // TILE, w.size(1) // TILE)](
        x, w, y, w.size(1), x.size(1), TILE=TILE, STEP=32 if integers else 16, INTEGERS=integers, enable_fp_fusion=False
    )
    return y


def folded(x: Tensor, w: Tensor) -> Tensor:
    """Rule 1's fold: the products of 16-bit numbers are exact in fp32, so that two roundings are one."""
    y = torch.zeros(x.size(0), w.size(1), device=x.device)
    wide_x, wide_w = x.float(), w.float()
    for k in range(x.size(1)):
        y = y + wide_x[:, k, None] * wide_w[k]
    return y


def float_dots() -> dict[str, Any]:
    """bf16 and fp16, of one size and of sizes far apart. The interpreter's order is numpy's: only near the fold."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        for spread in (0, 6):
            generator = torch.Generator().manual_seed(spread)
            x, w = (
                torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))
                for shape in ((OUTPUTS, INPUTS), (INPUTS, OUTPUTS))
            )
            x, w = x.clamp(-1000, 1000).to(DEVICE, dtype), w.clamp(-1000, 1000).to(DEVICE, dtype)
            got, expected = dot(x, w), folded(x, w)
            if REHEARSING:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            found[f"{dtype} spread {spread}".removeprefix("torch.")] = {
                "outputs": got.numel(), "other bits": int((got.view(torch.int32) != expected.view(torch.int32)).sum())
            }  # fmt: skip
    return found


def prompt_dots() -> dict[str, Any]:
    """The tiles that prompts go through, of every size that there is, beside the reference."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(2)
        x, w = (torch.randn(n, INPUTS, generator=generator).to(DEVICE, dtype) for n in (max(OUTPUTS, 32), OUTPUTS))
        expected = reference.linear(x, w, None, OUTPUTS)
        for config in tuned.PROMPTS[:1] if REHEARSING else tuned.PROMPTS:
            launch.config_of = lambda op, config=config: replace(tuned.DEFAULTS[op], prompt=config)
            got = triton_ops.linear(x, triton_ops.pack_weight(w), None, OUTPUTS)
            other = int((got.view(torch.int16) != expected.view(torch.int16)).sum())
            found[f"{dtype} {config}".removeprefix("torch.")] = {"outputs": got.numel(), "other bits": other}
    launch.config_of = tuned.config_of
    return found


def integer_dots() -> dict[str, Any]:
    """int8 dots beside sums in int64: random numbers, and the largest that there are."""
    found = {}
    for kind in ("random", "largest"):
        shapes = (OUTPUTS, INTEGER_INPUTS), (INTEGER_INPUTS, OUTPUTS)
        if kind == "random":
            generator = torch.Generator().manual_seed(0)
            x, w = (torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in shapes)
        else:
            x, w = (torch.full(shape, -128, dtype=torch.int8) for shape in shapes)
        expected = exact_sums(x, w)
        other = int((dot(x.to(DEVICE), w.to(DEVICE)).cpu().long() != expected).sum())
        found[kind] = {"outputs": expected.numel(), "other numbers": other}
    return found


def exact_sums(x: Tensor, w: Tensor) -> Tensor:
    """In fp64, where all sums of these are exact."""
    return (x.double() @ w.double()).long()


def replays() -> dict[str, Any]:
    """A verification of several rows, again and again: the same logits and hidden states each time. A step leaves
    other hidden states in the cache than it finds, so these are put back first."""
    changes = dict(SMALL, num_layers=1) if REHEARSING else dict(
        hidden_size=2048, intermediate_size=1024, num_layers=2, num_heads=16, num_kv_heads=4, head_dim=64,
        vocab_size=1000,
    )  # fmt: skip
    model = tiny_model(backend="triton", **changes)
    cache, rows = PagedKVCache(model, 4), 4
    for tensor in cache.tensors:
        tensor.normal_()
    pending = PendingRows(
        torch.arange(rows), torch.arange(20, 20 + rows), torch.zeros(rows, dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None],
    )  # fmt: skip
    counts, judged = torch.tensor([rows - 1]), torch.tensor([True])
    before = cache.hidden.clone()

    def step() -> tuple[Tensor, Tensor]:
        cache.hidden.copy_(before)
        logits = model.ops.verify_pass(model.weights, model.sizes, cache.tensors, pending, counts, judged)[2]
        return logits, cache.hidden

    logits, hidden = (tensor.clone() for tensor in step())
    other = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPLAYS):
        new_logits, new_hidden = step()
        other += (new_logits != logits).any() | (new_hidden != hidden).any()
    if not logits.isfinite().all() or torch.equal(hidden, before):
        raise StageError("the replayed step is not one: its logits are no numbers, or it wrote no hidden state")
    return {"replays": REPLAYS, "captured steps": model.ops.captured_steps(), "with other bits": int(other)}


def run(stage: Stage) -> None:
    stage.note(replays=(replayed := replays()))
    stage.note(integer_dots=(integers := integer_dots()))
    stage.note(float_dots=(floats := float_dots()))
    stage.note(prompt_dots=(prompts := prompt_dots()))
    wrong = [f"replays: {replayed}"] * (replayed["with other bits"] > 0)
    wrong += [f"integer dots, {kind}: {found}" for kind, found in integers.items() if found["other numbers"]]
    wrong += [f"prompts' dots, {kind}: {found}" for kind, found in prompts.items() if found["other bits"]]
    if not REHEARSING:
        wrong += [f"dots, {kind}: {found}" for kind, found in floats.items() if found["other bits"]]
        wrong += ["no step was captured"] * (replayed["captured steps"] == 0)
    if wrong:
        raise StageError("; ".join(wrong))


if __name__ == "__main__":
    main(__file__, run)
