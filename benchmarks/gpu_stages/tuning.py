"""Stage 6: launch configurations of the kernels that stream 16-bit weights, timed at the shapes of real models.

Writes what was fastest into tuned.json, beside the kernels and in the stage's folder; the package reads the former
(triton_ops/tuned.py). Each configuration's results are compared with the default's before it is timed. Whether kernels
are to begin before the one ahead is done (``dependent``) is timed last, on steps of a model, since it takes several.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stage import DEVICE, REHEARSING, Stage, StageError, main, milliseconds

import torch
from torch import Tensor

from layerskip_kernels import triton_ops
from layerskip_kernels.evaluation import datasheets
from layerskip_kernels.triton_ops import launch, tuned
from layerskip_kernels.triton_ops.tuned import DEFAULTS, Config
from timings import CONTEXTS, TINY, our_model, random_llama, steps_after

# Of Llama-3-8B: columns and inputs of the matrices that an op multiplies with (of qkv, those of q).
SHAPES = {"out_residual": (4096, 14336), "norm_gate_up_act": (14336, 4096), "norm_qkv_rope_append": (4096, 4096),
          "norm_head_argmax": (128256, 4096)}  # fmt: skip
HEAD, PAGE = (8, 4) if REHEARSING else (128, 16)
KERNELS = {"out_residual": "_linear_residual_kernel", "norm_gate_up_act": "_gate_up_act_kernel",
           "norm_qkv_rope_append": "_qkv_rope_append_kernel", "norm_head_argmax": "_head_kernel"}  # fmt: skip
OPS = ("norm_qkv_rope_append", "out_residual") if REHEARSING else tuple(KERNELS)
ROWS = (1,) if REHEARSING else (1, 8, 4, 2)
COLUMNS, AHEADS = ((16, 32), (4,)) if REHEARSING else (tuned.COLUMNS, (2, 4, 8, 16))
WORKERS = 14
PROMPT = 40 if REHEARSING else 256  # rows of a prompt that go through the layers at once
PROMPTS = tuned.PROMPTS[:2] if REHEARSING else tuned.PROMPTS
LAYERS, DEPENDENT_ROUNDS = (2, 1) if REHEARSING else (8, 7)
LEAST_GAIN = 0.01  # of the time, for which kernels depend on one another, or segments are split over programs
Choice = tuple[str, int, int, int]  # op, columns, rows, ahead


def operation(op: str, rows: int) -> Callable[[], Tensor]:
    """The op at its shape, with weights of its own, for so many rows."""
    n, k = (24, 40) if REHEARSING else SHAPES[op]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, device=DEVICE) * shape[-1] ** -0.5).bfloat16()

    x, w = random(rows, k), triton_ops.pack_weight(random(n, k))
    if op == "out_residual":
        return partial(triton_ops.out_residual, x, w, None, random(rows, n))
    norm = torch.ones_like(x[0])
    if op == "norm_gate_up_act":
        return partial(triton_ops.norm_gate_up_act, x, norm, w, triton_ops.pack_weight(random(n, k)), n, 1e-5)
    if op == "norm_head_argmax":
        return lambda: triton_ops.norm_head_argmax(x, norm, w, n, 1e-5)[1]
    kv_heads = max(1, n // HEAD // 4)
    wk, wv = (triton_ops.pack_weight(random(kv_heads * HEAD, k)) for _ in range(2))
    cos, sin = torch.ones(rows, HEAD // 2, device=DEVICE), torch.zeros(rows, HEAD // 2, device=DEVICE)
    places = torch.arange(rows, device=DEVICE)
    pages = random(1, kv_heads, HEAD, PAGE), random(1, kv_heads, PAGE, HEAD)
    return lambda: triton_ops.norm_qkv_rope_append(
        x, norm, w, wk, wv, None, cos, sin, places, places, *pages, n // HEAD, 1e-5
    )  # fmt: skip


def kernel_ms(op: str, run: Callable[[], Any], calls: int = 20) -> float:
    """Of the op's kernel alone: the median that the profiler saw. What surrounds it in a call is no part of a step."""
    if REHEARSING:
        return milliseconds(run)
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times = sorted(event.device_time_total for event in profile.events() if event.name == KERNELS[op])
    if len(times) < calls:
        raise StageError(f"the profiler saw {len(times)} of {calls} calls of {KERNELS[op]}")
    return times[len(times) // 2] / 1e3


def choose(choice: Choice) -> None:
    """From here on, the op is launched so. The others, and other rows, as by default."""
    op, columns, rows, ahead = choice
    choose_config(op, Config(columns, {**DEFAULTS[op].ahead, rows: ahead}, DEFAULTS[op].prompt))


def choose_config(op: str, config: Config) -> None:
    launch.config_of = lambda name: config if name == op else DEFAULTS[name]


def compile_one(choice: Choice) -> None:
    """In a process of its own: Triton's cache on the disk is for all."""
    choose(choice)
    operation(choice[0], choice[2])()


def fastest(times: dict[Choice, float], op: str) -> dict[str, Any] | None:
    """The op's configuration in tuned.json: for each number of columns the best steps ahead, and of those the columns
    whose times add up to the least. None where some number of rows was not timed."""
    best: tuple[float, dict[str, Any]] | None = None
    for columns in COLUMNS:
        ahead, total = dict(DEFAULTS[op].ahead), 0.0
        for rows in ROWS:
            known = {a: ms for (o, c, r, a), ms in times.items() if (o, c, r) == (op, columns, rows)}
            if not known:
                break
            ahead[rows] = min(known, key=lambda a: known[a])
            total += known[ahead[rows]]
        else:
            if best is None or total < best[0]:
                best = total, {"columns": columns, "ahead": {str(rows): a for rows, a in ahead.items()}}
    return None if best is None else best[1]


def timed(stage: Stage, op: str, choices: list[Choice]) -> dict[Choice, float]:
    times: dict[Choice, float] = {}
    expected: dict[int, Tensor] = {}
    for choice in choices:
        if stage.left() < 20:
            break
        rows = choice[2]
        run = operation(op, rows)
        if rows not in expected:
            launch.config_of = tuned.config_of
            expected[rows] = run()
        choose(choice)
        if not torch.equal(run(), expected[rows]):
            raise StageError(f"{op}: another configuration, other bits: {choice}")
        times[choice] = kernel_ms(op, run)
    return times


def timed_prompts(stage: Stage, op: str) -> dict[tuple[int, int, int], float]:
    """Milliseconds of a prompt's rows, by tile; none for an op that has no tiles."""
    times: dict[tuple[int, int, int], float] = {}
    if DEFAULTS[op].prompt is None:
        return times
    run, expected = operation(op, PROMPT), None
    for tile in PROMPTS:
        if stage.left() < 20:
            break
        choose_config(op, replace(DEFAULTS[op], prompt=tile))
        got = run()
        if expected is not None and not torch.equal(got, expected):
            raise StageError(f"{op}: another tile, other bits: {tile}")
        expected = got
        times[tile] = kernel_ms(op, run)
    return times


def timed_split(op: str, config: Config) -> dict[str, dict[str, float]]:
    """Milliseconds of the op, launched so, whose programs have all segments of their columns ("off"), or two of four
    times the columns ("on"), by rows. Raises StageError where the bits differ."""
    times: dict[str, dict[str, float]] = {}
    for rows in ROWS:
        run = operation(op, rows)
        results = []
        of_rows = times[f"{rows} rows"] = {}
        for way in ("off", "on"):
            choose_config(op, replace(config, split=way == "on"))
            results.append(run())
            of_rows[way] = round(kernel_ms(op, run), 5)
        if not torch.equal(*results):
            raise StageError(f"{op}: segments split over programs gave other bits, {rows} rows")
    return times


def timed_dependence(weights: str | None) -> dict[str, dict[str, float]]:
    """Milliseconds of steps of a few layers whose kernels begin when the one ahead is done ("off"), or before ("on").

    Each in turn, as captured; medians. ``weights``: a type to quantise them to. Raises StageError where the logits
    differ.
    """
    shape = replace(datasheets.SHAPES["llama3.2-1b"], **(TINY if REHEARSING else {"num_layers": LAYERS}))
    model = our_model(random_llama(shape), "llama3.2-1b", weights)
    ways: dict[str, dict[str, Callable[[], Any]]] = {}
    logits: dict[str, list[Tensor]] = {}

    def choose_way(way: str) -> None:
        launch.config_of = lambda op: replace(tuned.config_of(op), dependent=way == "on")

    for way in ("off", "on"):
        torch.manual_seed(0)  # of the cache's K and V
        steps = steps_after(model, CONTEXTS[0])
        ways[way] = {name: run for name, (run, _) in steps.items() if name in ("decode", "verify 8 rows")}
        choose_way(way)
        logits[way] = [run()[2] for run in ways[way].values() for _ in range(3)]  # launched, captured, replayed
    if not all(map(torch.equal, logits["off"], logits["on"])):
        raise StageError("kernels that begin before the one ahead is done gave other bits")
    times: dict[str, dict[str, list[float]]] = {name: {"off": [], "on": []} for name in ways["on"]}
    for _ in range(DEPENDENT_ROUNDS):
        for name, of_way in times.items():
            for way, found in of_way.items():
                choose_way(way)
                found.append(milliseconds(ways[way][name], rounds=1))
    return {
        name: {way: round(sorted(found)[len(found) // 2], 5) for way, found in of_way.items()}
        for name, of_way in times.items()
    }


def pays(times: dict[str, dict[str, float]]) -> bool:
    off, on = (sum(of_way[way] for of_way in times.values()) for way in ("off", "on"))
    return on < (1 - LEAST_GAIN) * off


def write(file: Path, gpu: str, configs: dict[str, Any]) -> None:
    """Beside what the file says of other GPUs."""
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    said[gpu] = {**said.get(gpu, {}), **configs}
    file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    tuned.read_tuned(file)  # raises where it is not what the package reads


def write_all(folder: Path, gpu: str, configs: dict[str, Any]) -> None:
    for file in [folder / "tuned.json", *([] if REHEARSING else [tuned.FILE])]:
        write(file, gpu, configs)


def run(stage: Stage) -> None:
    gpu = "none" if REHEARSING else torch.cuda.get_device_name()
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    rows_of_table: list[dict[str, Any]] = []
    configs: dict[str, Any] = {}
    for op in OPS:
        choices = [(op, columns, rows, ahead) for rows in ROWS for columns in COLUMNS for ahead in AHEADS]
        if not REHEARSING:
            with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
                list(pool.map(compile_one, choices))
        times = timed(stage, op, choices)
        for (_, columns, rows, ahead), ms in times.items():
            rows_of_table.append({"op": op, "columns": columns, "rows": rows, "ahead": ahead, "ms": round(ms, 5)})
        prompts = timed_prompts(stage, op)
        rows_of_table += [
            {"op": op, "prompt": tile, "rows": PROMPT, "ms": round(ms, 5)} for tile, ms in prompts.items()
        ]
        if found := fastest(times, op):
            configs[op] = found
            if prompts:
                configs[op]["prompt"] = min(prompts, key=lambda tile: prompts[tile])
            if op == "out_residual":
                ahead = {int(rows): steps for rows, steps in found["ahead"].items()}
                split = timed_split(op, replace(DEFAULTS[op], columns=found["columns"], ahead=ahead))
                configs[op]["split"] = pays(split)
                stage.note(split=split)
            write_all(folder, gpu, configs)
        stage.note(gpu=gpu, times=rows_of_table, fastest=configs)
    if stage.left() > 40:
        dependence = {weights or "bf16": timed_dependence(weights) for weights in (None, "q4_0")}
        stage.note(dependence=dependence)
        if all(map(pays, dependence.values())):
            configs = {op: config | {"dependent": True} for op, config in configs.items()}
            write_all(folder, gpu, configs)
            stage.note(fastest=configs)
    if len(configs) < len(OPS):
        raise StageError(f"only {', '.join(configs) or 'none'} of {', '.join(OPS)} were timed whole")


if __name__ == "__main__":
    main(__file__, run)
