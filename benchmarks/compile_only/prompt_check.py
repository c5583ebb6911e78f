"""The kernels of prompts, compiled for NVIDIA's GPUs and run on the CPU from their PTX (ptx_run.py): the contract's
bits.

Triton's dot of fp32 numbers is a chain of multiply-adds, whose order its interpreter does not have: so what the
compiler made of it is run, instruction by instruction, and compared with the reference. Sums are kept in fp32, and
terms are of very different sizes, so that another order would be seen. Of quantised weights, whose sums have no order,
it is seen that threads multiply what belongs together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor

import gpu_compile
from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.ops.reference import arithmetic as reference
from layerskip_kernels.ops.reference import blocks as reference_blocks
from layerskip_kernels.ops.reference import layers as reference_layers
from layerskip_kernels.triton_ops import launch, pack_weight, tuned
from layerskip_kernels.triton_ops.elementwise import linear
from layerskip_kernels.triton_ops.integer_rows import Rows
from layerskip_kernels.triton_ops.norm_gate_up_act import gate_up_act
from layerskip_kernels.triton_ops.norm_qkv_rope_append import qkv_rope_append
from layerskip_kernels.triton_ops.out_residual import out_residual
from layerskip_kernels.triton_ops.paged_attention import paged_attention
from layerskip_kernels.triton_ops.rms_norm import from_segments
from ptx_run import Counts, run

ROWS, INPUTS, OUTPUTS = 70, 136, 40  # segments of 17: three steps, of which two are multiplied at once
HEADS, KV_HEADS, HEAD, PAGE = 3, 1, 8, 16
QUANTISED = ["q4_0", "q8_0", "q4_k", "q6_k", "int8", "int15"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """In sizes from 2^-6 to 2^6 or so."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(3 * torch.randn(shape, generator=generator)).clamp(2**-6, 2**6)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def launched(call: Callable[[], Any], counts: Counts) -> Any:
    """What an op returns, its launches run from their PTX."""
    launches: list[gpu_compile.Launch] = []
    with gpu_compile.recording(launches):
        result = call()
    run_all(launches, counts)
    return result


def run_all(launches: list[gpu_compile.Launch], counts: Counts) -> None:
    for la in launches:
        taken = [la.arguments[name] for name in ("PROMPT", "TILE", "TILED") if name in la.arguments]
        if not any(taken) and la.name != "_turn_rows_kernel":
            raise RuntimeError(f"{la.name} took the path of few rows")
        given = [name for name, kind in la.compiled.src.signature.items() if kind != "constexpr"]
        arguments = [as_array(la.arguments[name]) for name in given]
        threads, shared = 32 * la.compiled.metadata.num_warps, la.compiled.metadata.shared
        run(la.compiled.asm["ptx"], threads, shared, arguments, la.grid, counts)


def as_array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_contiguous():  # rows beside which others of their forms lie
        value = value.as_strided((value.untyped_storage().nbytes() // value.itemsize - value.storage_offset(),), (1,))
    return value.view(torch.int16).numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()


def ops(dtype: torch.dtype, counts: Counts) -> dict[str, bool]:
    """By op: whether its bits are rule 1's."""
    x = numbers(ROWS, INPUTS, dtype=dtype, seed=0).float()
    weights = [numbers(OUTPUTS, INPUTS, dtype=dtype, seed=1 + i) for i in range(2)]
    first, second = map(pack_weight, weights)
    sums = [reference.dot(x, weight) for weight in weights]
    # Each sees one order of addition and not another: the check itself is checked.
    if torch.equal(sums[0], x @ weights[0].float().T):
        raise RuntimeError("a plain matrix product has rule 1's bits: these numbers show nothing")
    found = {"linear": torch.equal(launched(lambda: linear(x, first, None, OUTPUTS), counts), sums[0])}
    residual = numbers(ROWS, OUTPUTS, dtype=dtype, seed=4).float()
    bias = numbers(OUTPUTS, dtype=dtype, seed=5).float()
    got = launched(lambda: out_residual(x, first, bias, residual), counts)
    found["out_residual"] = torch.equal(got, residual + (sums[0] + bias))

    rows = Rows.of_numbers(x)
    activation = Rows(ROWS, OUTPUTS, (), x.device)
    launched(lambda: gate_up_act(rows, first, second, residual, activation, OUTPUTS, ROWS), counts)
    expected = Rows.of_numbers(reference.silu(sums[0]) * sums[1]).numbers
    found["gate_up_act"] = torch.equal(activation.numbers, expected)
    found["qkv"] = qkv(rows, x, dtype, counts)
    return found


def qkv(rows: Rows, x: Tensor, dtype: torch.dtype, counts: Counts) -> bool:
    sizes = [heads * HEAD for heads in (HEADS, KV_HEADS, KV_HEADS)]
    weights = [numbers(size, INPUTS, dtype=dtype, seed=6 + i) for i, size in enumerate(sizes)]
    bias = numbers(sum(sizes), dtype=dtype, seed=9).float()
    pages = -(-ROWS // PAGE)
    q = torch.zeros(ROWS, HEADS, HEAD)
    k_pages, v_pages = torch.zeros(pages, KV_HEADS, HEAD, PAGE), torch.zeros(pages, KV_HEADS, PAGE, HEAD)
    places = torch.arange(ROWS)
    packed = [pack_weight(weight) for weight in weights]
    launched(
        lambda: qkv_rope_append(rows, *packed, bias, None, None, places, places, q, k_pages, v_pages, ROWS), counts
    )
    expected = [reference.dot(x, w) + b for w, b in zip(weights, bias.split(sizes), strict=True)]
    k = k_pages.permute(0, 3, 1, 2).reshape(-1, sizes[1])[:ROWS]
    v = v_pages.permute(0, 2, 1, 3).reshape(-1, sizes[2])[:ROWS]
    return all(map(torch.equal, (q.view(ROWS, -1), k, v), expected))


def check_attention(target: str) -> dict[str, Any]:
    """Rule 4's bits, of rows that follow others, in bf16: two turns of the loops over K and V."""
    dtype, before, rows, heads, size = torch.bfloat16, 40, 34, 2, 32
    pages = -(-(before + rows) // PAGE)
    q, k, v = (numbers(*shape, dtype=dtype, seed=i) for i, shape in enumerate(
        [(rows, heads, size), (pages, 1, size, PAGE), (pages, 1, PAGE, size)]))  # fmt: skip
    table, positions = torch.arange(pages, dtype=torch.int32).flip(0)[None], torch.arange(before, before + rows)
    args = q, k, v, table, torch.tensor([0, rows], dtype=torch.int32), positions, 0.002
    counts = Counts()
    launches: list[gpu_compile.Launch] = []
    with gpu_compile.recording(launches):
        paged_attention(*args)  # which makes numbers of what is not there yet
    run_all(launches, counts)
    [la] = launches
    got = from_segments(la.arguments["out_ptr"], heads * size, dtype)
    return {"target": target, "bits": {"attention": torch.equal(got, reference_layers.paged_attention(*args))},
            "multiply_adds": counts.ops["fma.rn.f32"] + 2 * counts.ops["fma.rn.f32x2"]}  # fmt: skip


def check_quantised(target: str, name: str) -> dict[str, Any]:
    """Rule 8's bits, of segments of three blocks: one product alone, and two that share a program's columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3 * 256, generator=generator)
    found = [quantise(torch.randn(OUTPUTS, 3 * 256, generator=generator), name) for _ in range(2)]
    first, second = map(pack_weight, found)
    sums = [reference_blocks.integer_dot(x, weight) for weight in found]
    counts = Counts()
    bits = {"linear": torch.equal(launched(lambda: linear(x, first, None, OUTPUTS), counts), sums[0])}
    rows, activation = Rows.of_numbers(x, first), Rows(ROWS, OUTPUTS, (), x.device)
    launched(lambda: gate_up_act(rows, first, second, x, activation, OUTPUTS, ROWS), counts)
    expected = Rows.of_numbers(reference.silu(sums[0]) * sums[1]).numbers
    bits["gate_up_act"] = torch.equal(activation.numbers, expected)
    return {"target": target, "weights": name, "bits": bits, "integer_products": counts.ops["mma"]}


def check(target: str, dtype: str, prompt: tuple[int, int, int]) -> dict[str, Any]:
    """The bits, and what the program's loads from shared memory cost beside its multiply-adds."""
    configs = {op: replace(config, prompt=config.prompt and prompt) for op, config in tuned.DEFAULTS.items()}
    launch.config_of = configs.__getitem__
    counts = Counts()
    bits = ops(DTYPES[dtype], counts)
    adds = counts.ops["fma.rn.f32"] + 2 * counts.ops["fma.rn.f32x2"]
    return {"target": target, "dtype": dtype, "prompt": prompt, "bits": bits, "multiply_adds": adds,
            "shared_loads": counts.shared_loads, "bank_cycles": counts.bank_cycles}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    parser.add_argument("--case", action="append", help="dtype,rows,columns,warps; default: all, in each dtype")
    parser.add_argument("--quantised", action="append", help="a type of weights; default: some, if there is no case")
    parser.add_argument("--attention", action="store_true", help="attention; the default if nothing else is named")
    args = parser.parse_args()
    gpu_compile.set_target(args.target)
    cases: list[Any] = [(case.split(",")[0], tuple(map(int, case.split(",")[1:]))) for case in args.case or ()]
    if not cases and not args.quantised and not args.attention:
        cases, args.quantised, args.attention = [(d, p) for p in tuned.PROMPTS for d in DTYPES], QUANTISED, True
    found = [check_quantised(args.target, name) for name in args.quantised or ()]
    found += [check_attention(args.target)] if args.attention else []
    found += [check(args.target, *case) for case in cases]
    for entry in found:
        print(json.dumps(entry))
    return int(not all(all(entry["bits"].values()) for entry in found))


if __name__ == "__main__":
    sys.exit(main())
