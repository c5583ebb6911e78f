"""The tables of docs/performance.md, "On a GPU, counted on paper": what `gpu_static.py --markdown` prints."""

from __future__ import annotations

from typing import Any

from layerskip_kernels.evaluation.datasheets import GPUS, Gpu

ISSUES = 4  # instructions of warps that a multiprocessor starts in a clock: one for each of its four schedulers
CLOCKS_PER_LOAD = 4  # of the load/store units for a 16-byte load of a warp: 512 bytes at 128 a clock
INTEGER = {"h100": 1979e12}  # 8-bit multiplications and additions a second: data sheet, without sparsity
OF_PRODUCT = 2 * 16 * 8 * 32  # of them in an integer MMA
NAMES = {"_qkv_rope_append_kernel": "qkv", "_linear_residual_kernel": "out, down", "_gate_up_act_kernel": "gate, up",
         "_head_kernel": "head", "_attend_kernel": "attention"}  # fmt: skip


def clock(gpu: Gpu) -> float:
    """Hz, of the data sheet's fp32 peak: 128 multiply-adds a clock and multiprocessor."""
    return gpu.fp32 * 1e12 / (gpu.multiprocessors * 128 * 2)


def times(step: dict[str, Any], gpu: Gpu) -> tuple[float, float, float]:
    """Seconds by bytes, by the instructions of the streaming loops, and by their loads."""
    clocks = gpu.multiprocessors * clock(gpu)
    by_issue, by_loads = step["instructions"] / (ISSUES * clocks), step["loads"] * CLOCKS_PER_LOAD / clocks
    return step["bytes"] / (gpu.bandwidth * 1e9), by_issue, by_loads


def step_table(report: dict[str, Any], target: str, gpu: Gpu) -> list[str]:
    columns = ("model", "rows", "MB", "read again, MB", "10^6 instructions", "of them fma", "by bytes, ms",
               "by instructions, ms", "by loads, ms")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for step in report["steps"]:
        if (step["target"], step["kind"], step["dtype"]) != (target, "decode", "bf16"):
            continue
        numbers = " | ".join(f"{seconds * 1e3:.2f}" for seconds in times(step, gpu))
        lines.append(f"| {step['shape']} | {step['rows']} | {step['bytes'] / 1e6:.0f} | {step['again'] / 1e6:.0f} | "
                     f"{step['instructions'] / 1e6:.0f} | {step['multiply_adds'] / step['instructions']:.0%} | "
                     f"{numbers} |")  # fmt: skip
    return lines


def prompt_table(report: dict[str, Any], target: str, name: str, chunk: int = 256) -> list[str]:
    """Tokens a second of prompts that go through the layers in chunks, by each of what bounds them."""
    columns = ("weights", "MB", "weights again, GB", "rows, GB", "10^9 instructions", "of them fma", "by bytes",
               "by instructions", "by loads", "by tensor cores", "GB/s from the cache at the lowest")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    gpu = GPUS[name]
    clocks = gpu.multiprocessors * clock(gpu)
    for step in report["steps"]:
        if (step["target"], step["kind"], step["rows"]) != (target, "prompt", chunk):
            continue
        by_bytes, by_issue, by_loads = times(step, gpu)
        if step["shared_loads"]:
            by_loads = step["shared_loads"] * CLOCKS_PER_LOAD / clocks
        by_products = step["integer_products"] * OF_PRODUCT / INTEGER[name]
        bounds = by_bytes, by_issue, by_loads, by_products
        speeds = [f"{chunk / seconds:,.0f}" if seconds else "" for seconds in bounds]
        again, rows = step["again"] / 1e9, step["rows_read"] / 1e9
        lines.append(f"| {step['dtype']} | {step['bytes'] / 1e6:.0f} | {again:.0f} | {rows:.0f} | "
                     f"{step['instructions'] / 1e9:.2f} | {step['multiply_adds'] / step['instructions']:.0%} | "
                     f"{' | '.join(speeds)} | {(again + rows) / max(bounds):,.0f} |")  # fmt: skip
    return lines


def kernel_table(report: dict[str, Any]) -> list[str]:
    """The largest of each kernel's compilations, in bf16, over the models."""
    lines = ["| kernel | GPU | rows | threads | registers | resident | warps | KiB on their way | wanted |",
             "| --- " * 9 + "|"]  # fmt: skip
    worst: dict[tuple[str, str, int], dict[str, Any]] = {}
    for k in report["kernels"]:
        key = (k["name"], k["target"], k["rows"])
        if (
            k["name"] in NAMES
            and k["dtype"] == "bf16"
            and k["registers"] > worst.get(key, k | {"registers": 0})["registers"]
        ):
            worst[key] = k
    for (name, target, rows), k in sorted(worst.items()):
        warp = 64 if target == "gfx942" else 32
        flight = f"{k['in_flight'] / 1024:.0f} | {k['wanted'] / 1024:.1f}" if k["wanted"] else " | "
        lines.append(f"| {NAMES[name]} | {target} | {rows} | {k['threads']} | {k['registers']} | {k['resident']} | "
                     f"{k['resident'] * k['threads'] // warp} | {flight} |")  # fmt: skip
    return lines


def as_markdown(report: dict[str, Any], target: str = "sm_90", gpu: str = "h100") -> str:
    tables = step_table(report, target, GPUS[gpu]), prompt_table(report, target, gpu), kernel_table(report)
    return "\n\n".join("\n".join(table) for table in tables)
