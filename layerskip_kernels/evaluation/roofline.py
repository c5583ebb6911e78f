"""``layerskip roofline``: the floors of a model's steps on a GPU (floors.py) as a report, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.evaluation.datasheets import GPUS, SHAPES, Gpu
from layerskip_kernels.evaluation.exit_layers import exit_layers_of
from layerskip_kernels.evaluation.facts import made_with
from layerskip_kernels.evaluation.floors import (
    Floor,
    decode,
    draft,
    matrix_bytes,
    memory_bound_rows,
    prompt,
    speedup,
    verify,
)
from layerskip_kernels.evaluation.plots import new_figure, require_matplotlib, save_figure
from layerskip_kernels.model.quantise import check_weights
from layerskip_kernels.model.tensor_names import tensor_shapes
from layerskip_kernels.model_config import ModelConfig

__all__ = ["as_text", "plot", "roofline"]

NOTE = "lower bounds computed from data sheets, not measurements: nothing here was timed"
DRAFTS = (2, 4, 6, 8, 12)
PROMPTS = (512, 2048)
ACCEPTANCES = (0.4, 0.6, 0.8)  # arXiv 2404.16710 reports 45 to 78 % with exits at 1/4 to 1/3 of the depth


def roofline(
    shape: str,
    gpu: str,
    exit_layers: Sequence[int] | None = None,
    drafts: Sequence[int] = DRAFTS,
    acceptances: Sequence[float] = ACCEPTANCES,
    context: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    prompts: Sequence[int] = PROMPTS,
) -> dict[str, Any]:
    """The floors of a model's shape on a GPU, one sequence at a time.

    ``exit_layers``: by default those of `exit_layers_of`. ``weights``: a type of quantise.WEIGHT_TYPES that matrices
    are quantised to, the LM head among them (None: ``dtype``, in which K and V always are). Gives ``note``, ``gpu``,
    ``model``, ``steps`` (name, rows, bytes, operations, integer_operations, seconds_by_bytes, seconds_by_operations
    and the floor, seconds; verification at the first of the exits) and ``speedups`` (exit_layer, drafts, acceptance,
    speedup). ``prompts``: how many tokens; those beyond the model's positions are left out. Raises ValueError
    for a name or a number that is not supported.
    """
    config, card = _named("shape", shape, SHAPES), _named("gpu", gpu, GPUS)
    layers = config.num_layers
    exits = exit_layers_of(layers) if exit_layers is None else list(exit_layers)
    _check(config, exits, drafts, acceptances, context, prompts)
    check_weights(weights)
    weights = None if weights == "16bit" else weights
    stored = sum(matrix_bytes(shape, dtype, weights) for shape in tensor_shapes(config).values())
    steps = [_step("decode", 1, decode(config, card, context, dtype, weights), card)]
    for exit_layer in exits:
        floor = draft(config, card, exit_layer, 1, context, dtype, weights)
        steps.append(_step(f"draft one token, exit {exit_layer}", 1, floor, card))
    for count in drafts:
        floor = verify(config, card, exits[0], count, context, dtype, weights)
        steps.append(_step(f"verify {count} drafts, exit {exits[0]}", count + 1, floor, card))
    for tokens in (tokens for tokens in prompts if tokens <= config.max_positions):
        steps.append(_step(f"prompt of {tokens} tokens", tokens, prompt(config, card, tokens, dtype, weights), card))
    speedups = [
        {"exit_layer": exit_layer, "drafts": count, "acceptance": acceptance,
         "speedup": speedup(config, card, exit_layer, count, acceptance, context, dtype, weights)}
        for exit_layer in exits for count in drafts for acceptance in acceptances
    ]  # fmt: skip
    model = {"shape": shape, "layers": layers, "dtype": str(dtype).removeprefix("torch."), "weights": weights,
             "context": context, "weight_bytes": stored, "fits": stored <= card.memory_gb * 1e9,
             "memory_bound_rows": memory_bound_rows(config, card, context, dtype, weights)}  # fmt: skip
    return {"note": NOTE, "gpu": asdict(card), "model": model, "steps": steps, "speedups": speedups}


def _named(argument: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _check(
    config: ModelConfig, exits: Sequence[int], drafts: Sequence[int], acceptances: Sequence[float], context: int,
    prompts: Sequence[int],
) -> None:  # fmt: skip
    for exit_layer in exits:
        if not 1 <= exit_layer < config.num_layers:
            raise ValueError(f"exit_layer must be in 1..{config.num_layers - 1}, got {exit_layer}")
    for count in drafts:
        if count < 1:
            raise ValueError(f"num_speculations must be at least 1, got {count}")
    for tokens in prompts:
        if tokens < 1:
            raise ValueError(f"prompts must have 1 token or more, got {tokens}")
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
        "integer_operations": floor.integer_operations,
        "seconds_by_bytes": floor.bytes / (gpu.bandwidth * 1e9),
        "seconds_by_operations": max(
            floor.operations / (gpu.fp32 * 1e12), floor.integer_operations / (gpu.int8 * 1e12)
        ),
        "seconds": floor.seconds,
    }


def _called(model: dict[str, Any]) -> str:
    return f"{model['shape']} in {model['weights'] or model['dtype']}"


def as_text(report: dict[str, Any]) -> str:
    """The report for people: the steps, then the speed-up over exits, drafts and acceptance."""
    gpu, model = report["gpu"], report["model"]
    lines = [
        f"{_called(model)}, {model['weight_bytes'] / 1e9:.2f} GB, after {model['context']} tokens, one sequence",
        f"{gpu['name']}: {gpu['bandwidth']:g} GB/s, {gpu['fp32']:g} TFLOP/s fp32 outside the tensor cores, "
        f"{gpu['int8']:g} TOP/s int8 in them, "
        f"{gpu['multiprocessors']} multiprocessors ({gpu['source']})",
        f"These are {report['note']}.",
        *([] if model["fits"] else [f"The weights do not fit into the {gpu['memory_gb']} GB of one GPU."]),
        f"Up to {model['memory_bound_rows']} rows go through a layer in the time that reading it takes.",
        "",
        f"{'step':<28}{'rows':>5}{'GB':>9}{'GFLOP':>10}{'int8 GOP':>10}{'by bytes':>11}{'by ops':>11}{'floor':>11}",
    ]
    for step in report["steps"]:
        times = (step[name] * 1e3 for name in ("seconds_by_bytes", "seconds_by_operations", "seconds"))
        lines.append(
            f"{step['name']:<28}{step['rows']:>5}{step['bytes'] / 1e9:>9.2f}{step['operations'] / 1e9:>10.1f}"
            f"{step['integer_operations'] / 1e9:>10.1f}" + "".join(f"{time:>8.3f} ms" for time in times)
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
    figure.suptitle(f"{_called(model)}, {report['gpu']['name']}, {model['context']} tokens of "
                    f"context: {report['note']}", fontsize=9)  # fmt: skip
    save_figure(figure, path, made_with())


def _draw_steps(axis: Any, steps: list[dict[str, Any]]) -> None:
    """Plain decoding, and the verification of each number of drafts."""
    by_rows = {step["rows"]: step for step in steps if step["name"].startswith(("decode", "verify"))}
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
