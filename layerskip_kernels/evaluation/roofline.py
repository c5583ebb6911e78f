"""``layerskip roofline``: what decoding, drafting and verifying cannot be faster than on a GPU, on paper.

A step takes at least the time its bytes need at the memory's bandwidth, and at least the time its operations need at
the peak of the fp32 units. (Not the tensor cores': rule 1 of docs/arithmetic.md orders the sums of a dot product, and
they add in an order of their own.) Phases of a step that wait for each other are added up. Counted are weights, K
and V read and the multiplications and additions of dot products and attention; not counted are writes, norms, exp,
unpacking, launches and latency. So these are floors: nothing here was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.evaluation.datasheets import GPUS, SHAPES, Gpu
from layerskip_kernels.evaluation.exit_layers import exit_layers_of
from layerskip_kernels.evaluation.facts import made_with
from layerskip_kernels.evaluation.plots import new_figure, require_matplotlib, save_figure
from layerskip_kernels.model.tensor_names import layer_parameters, layer_products, num_parameters
from layerskip_kernels.model_config import ModelConfig

__all__ = [
    "Floor",
    "as_text",
    "decode",
    "draft",
    "memory_bound_rows",
    "plot",
    "roofline",
    "speedup",
    "verify",
]

NOTE = "lower bounds computed from data sheets, not measurements: nothing here was timed"
DRAFTS = (2, 4, 6, 8, 12)
ACCEPTANCES = (0.4, 0.6, 0.8)  # arXiv 2404.16710 reports 45 to 78 % with exits at 1/4 to 1/3 of the depth


# ---- floors ----


@dataclass(frozen=True)
class Floor:
    """A step's bytes read, fp32 operations, and the seconds that it takes at least; steps add up."""

    bytes: int
    operations: int
    seconds: float

    @classmethod
    def of(cls, gpu: Gpu, num_bytes: int, operations: int) -> Floor:
        """One phase: memory and arithmetic overlap, so that the slower one counts."""
        return cls(num_bytes, operations, max(num_bytes / (gpu.bandwidth * 1e9), operations / (gpu.fp32 * 1e12)))

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes + other.bytes, self.operations + other.operations, self.seconds + other.seconds)


def layer_operations(config: ModelConfig, rows: int, positions: int, dtype: torch.dtype) -> int:
    """Operations of some rows in one layer: a product and a sum per weight, and two of each per position and head.

    A fused multiply-add counts as two, as data sheets count it. In fp32 the contract rounds the product before the
    sum, which takes two instructions, each of which could have been a multiply-add: four.
    """
    attention = 2 * positions * config.num_heads * config.head_dim
    return _per_product(dtype) * rows * (layer_products(config) + attention)


def layer_bytes(config: ModelConfig, dtype: torch.dtype, positions: int = 0) -> int:
    """What a pass through one layer reads: its weights, and K and V of ``positions`` positions, once for all rows."""
    return dtype.itemsize * (layer_parameters(config) + 2 * positions * config.num_kv_heads * config.head_dim)


def head_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the final norm and the LM head read."""
    return dtype.itemsize * (config.vocab_size + 1) * config.hidden_size


def _per_product(dtype: torch.dtype) -> int:
    return 4 if dtype is torch.float32 else 2


def _layers(config: ModelConfig, gpu: Gpu, layers: int, rows: int, positions: int, dtype: torch.dtype) -> Floor:
    """Some layers, with ``positions`` positions visible to all rows."""
    return Floor.of(
        gpu,
        layers * layer_bytes(config, dtype, positions),
        layers * layer_operations(config, rows, positions, dtype),
    )


def _head(config: ModelConfig, gpu: Gpu, rows: int, dtype: torch.dtype) -> Floor:
    operations = _per_product(dtype) * rows * config.vocab_size * config.hidden_size
    return Floor.of(gpu, head_bytes(config, dtype), operations)


def decode(config: ModelConfig, gpu: Gpu, context: int, dtype: torch.dtype = torch.bfloat16) -> Floor:
    """One token of plain decoding after ``context`` positions: verification of an empty draft."""
    return verify(config, gpu, config.num_layers, 0, context, dtype)


def draft(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, context: int, dtype: torch.dtype = torch.bfloat16
) -> Floor:
    """``draft_step``: for each draft one row through ``exit_layer`` layers and the head."""
    floor = Floor(0, 0, 0.0)
    for i in range(drafts):
        floor += _layers(config, gpu, exit_layer, 1, context + i + 1, dtype) + _head(config, gpu, 1, dtype)
    return floor


def verify(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, context: int, dtype: torch.dtype = torch.bfloat16
) -> Floor:
    """``verify_step``: the last draft through the first layers, then all ``drafts + 1`` rows through the others."""
    positions = context + drafts + 1
    early = _layers(config, gpu, exit_layer, 1, positions, dtype)
    late = _layers(config, gpu, config.num_layers - exit_layer, drafts + 1, positions, dtype)
    return early + late + _head(config, gpu, drafts + 1, dtype)


def speedup(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, acceptance: float, context: int,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Floor of plain decoding over the floor per token of a cycle, which gives 1 + acceptance * drafts tokens.

    ``acceptance``: accepted over drafted tokens, as LayerSkip reports it.
    """
    cycle = draft(config, gpu, exit_layer, drafts, context, dtype) + verify(
        config, gpu, exit_layer, drafts, context, dtype
    )
    return decode(config, gpu, context, dtype).seconds * (1 + acceptance * drafts) / cycle.seconds


def memory_bound_rows(config: ModelConfig, gpu: Gpu, context: int, dtype: torch.dtype) -> int:
    """The most rows that go through all layers in the time one row needs to read them."""
    one = layer_operations(config, 1, context, dtype) / (gpu.fp32 * 1e12)
    return math.floor(layer_bytes(config, dtype, context) / (gpu.bandwidth * 1e9) / one)


# ---- the command ----


def roofline(
    shape: str,
    gpu: str,
    exit_layers: Sequence[int] | None = None,
    drafts: Sequence[int] = DRAFTS,
    acceptances: Sequence[float] = ACCEPTANCES,
    context: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """The floors of a model's shape on a GPU, one sequence at a time.

    ``exit_layers``: by default those of `exit_layers_of`. Gives ``note``, ``gpu``,
    ``model``, ``steps`` (name, rows, bytes, operations, seconds_by_bytes, seconds_by_operations and the floor,
    seconds; verification at the first of the exits) and ``speedups`` (exit_layer, drafts, acceptance, speedup).
    Raises ValueError for a name or a number that is not supported.
    """
    config, card = _named("shape", shape, SHAPES), _named("gpu", gpu, GPUS)
    layers = config.num_layers
    exits = exit_layers_of(layers) if exit_layers is None else list(exit_layers)
    _check(config, exits, drafts, acceptances, context)
    weights = dtype.itemsize * num_parameters(config)
    steps = [_step("decode", 1, decode(config, card, context, dtype), card)]
    for exit_layer in exits:
        floor = draft(config, card, exit_layer, 1, context, dtype)
        steps.append(_step(f"draft one token, exit {exit_layer}", 1, floor, card))
    for count in drafts:
        floor = verify(config, card, exits[0], count, context, dtype)
        steps.append(_step(f"verify {count} drafts, exit {exits[0]}", count + 1, floor, card))
    speedups = [
        {"exit_layer": exit_layer, "drafts": count, "acceptance": acceptance,
         "speedup": speedup(config, card, exit_layer, count, acceptance, context, dtype)}
        for exit_layer in exits for count in drafts for acceptance in acceptances
    ]  # fmt: skip
    model = {"shape": shape, "layers": layers, "dtype": str(dtype).removeprefix("torch."), "context": context,
             "weight_bytes": weights, "fits": weights <= card.memory_gb * 1e9,
             "memory_bound_rows": memory_bound_rows(config, card, context, dtype)}  # fmt: skip
    return {"note": NOTE, "gpu": asdict(card), "model": model, "steps": steps, "speedups": speedups}


def _named(argument: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _check(
    config: ModelConfig, exits: Sequence[int], drafts: Sequence[int], acceptances: Sequence[float], context: int
) -> None:
    for exit_layer in exits:
        if not 1 <= exit_layer < config.num_layers:
            raise ValueError(f"exit_layer must be in 1..{config.num_layers - 1}, got {exit_layer}")
    for count in drafts:
        if count < 1:
            raise ValueError(f"num_speculations must be at least 1, got {count}")
    for acceptance in acceptances:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance must be in 0..1, got {acceptance}")
    if context < 0 or context + max(drafts) + 1 > config.max_positions:
        raise ValueError(f"context must be 0 or more and leave room for the drafts in {config.max_positions} "
                         f"positions, got {context}")  # fmt: skip


def _step(name: str, rows: int, floor: Floor, gpu: Gpu) -> dict[str, Any]:
    return {
        "name": name,
        "rows": rows,
        "bytes": floor.bytes,
        "operations": floor.operations,
        "seconds_by_bytes": floor.bytes / (gpu.bandwidth * 1e9),
        "seconds_by_operations": floor.operations / (gpu.fp32 * 1e12),
        "seconds": floor.seconds,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people: the steps, then the speed-up over exits, drafts and acceptance."""
    gpu, model = report["gpu"], report["model"]
    lines = [
        f"{model['shape']} in {model['dtype']}, {model['weight_bytes'] / 1e9:.2f} GB, after {model['context']} tokens, "
        "one sequence",
        f"{gpu['name']}: {gpu['bandwidth']:g} GB/s, {gpu['fp32']:g} TFLOP/s fp32 outside the tensor cores, "
        f"{gpu['multiprocessors']} multiprocessors ({gpu['source']})",
        f"These are {report['note']}.",
        *([] if model["fits"] else [f"The weights do not fit into the {gpu['memory_gb']} GB of one GPU."]),
        f"Up to {model['memory_bound_rows']} rows go through a layer in the time that reading it takes.",
        "",
        f"{'step':<28}{'rows':>5}{'GB':>9}{'GFLOP':>9}{'by bytes':>11}{'by ops':>11}{'floor':>11}",
    ]
    for step in report["steps"]:
        times = (step[name] * 1e3 for name in ("seconds_by_bytes", "seconds_by_operations", "seconds"))
        lines.append(
            f"{step['name']:<28}{step['rows']:>5}{step['bytes'] / 1e9:>9.2f}{step['operations'] / 1e9:>9.1f}"
            + "".join(f"{time:>8.3f} ms" for time in times)
        )
    acceptances = list(dict.fromkeys(entry["acceptance"] for entry in report["speedups"]))
    lines += ["", "speed-up over plain decoding, floor over floor, at an acceptance (accepted / drafted) of"]
    lines.append(f"{'exit':>6}{'drafts':>8}" + "".join(f"{acceptance:>8.0%}" for acceptance in acceptances))
    for i in range(0, len(report["speedups"]), len(acceptances)):
        row = report["speedups"][i : i + len(acceptances)]
        lines.append(
            f"{row[0]['exit_layer']:>6}{row[0]['drafts']:>8}" + "".join(f"{entry['speedup']:>7.2f}x" for entry in row)
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report: floors of the steps, and a panel of speed-ups over drafts for each acceptance.

    The name's ending says the format (.png, .svg, .pdf). Raises ValueError without matplotlib, or for another ending.
    """
    model, speedups = report["model"], report["speedups"]
    acceptances = list(dict.fromkeys(entry["acceptance"] for entry in speedups))
    require_matplotlib(path)
    figure = new_figure(4 + 4 * len(acceptances), 4.5)
    axes = figure.subplots(1, 1 + len(acceptances))
    _draw_steps(axes[0], report["steps"])
    for axis, acceptance in zip(axes[1:], acceptances, strict=True):
        _draw_speedups(axis, [entry for entry in speedups if entry["acceptance"] == acceptance], acceptance)
    top = max(entry["speedup"] for entry in speedups)
    for axis in axes[1:]:
        axis.set_ylim(0, 1.05 * max(1.0, top))
    figure.suptitle(f"{model['shape']}, {model['dtype']}, {report['gpu']['name']}, {model['context']} tokens of "
                    f"context: {report['note']}", fontsize=9)  # fmt: skip
    save_figure(figure, path, made_with())


def _draw_steps(axis: Any, steps: list[dict[str, Any]]) -> None:
    """Plain decoding, and the verification of each number of drafts."""
    by_rows = {step["rows"]: step for step in steps if not step["name"].startswith("draft")}
    rows = sorted(by_rows)
    for key, label in (("seconds_by_bytes", "by bytes"), ("seconds_by_operations", "by operations")):
        axis.plot(rows, [by_rows[row][key] * 1e3 for row in rows], marker="o", label=label)
    axis.set(xlabel="rows verified (1: plain decoding)", ylabel="ms", ylim=(0, None), title="a pass through the model")
    axis.legend()


def _draw_speedups(axis: Any, entries: list[dict[str, Any]], acceptance: float) -> None:
    for exit_layer in dict.fromkeys(entry["exit_layer"] for entry in entries):
        line = [entry for entry in entries if entry["exit_layer"] == exit_layer]
        axis.plot(
            [entry["drafts"] for entry in line], [entry["speedup"] for entry in line], marker="o",
            label=f"exit {exit_layer}",
        )  # fmt: skip
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set(xlabel="drafts", ylabel="times plain decoding", title=f"acceptance {acceptance:.0%}")
    axis.legend()
