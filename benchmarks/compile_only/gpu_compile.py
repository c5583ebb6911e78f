"""Steps of the Triton backend without a GPU: the real passes run on meta tensors, and every launch compiles its kernel.

A driver that knows a target and nothing else stands where the GPU's would; what it has no answer to (streams, waiting,
memory) fails. Import this only where TRITON_INTERPRET is not 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.operands import DraftSampling, LayerWeights, LogitEdits, ModelSizes, ModelWeights
from layerskip_kernels.triton_ops import integer_rows, steps
from layerskip_kernels.triton_ops import launch as launching
from layerskip_kernels.triton_ops.graphs import table_width
from layerskip_kernels.triton_ops.packing import num_steps
from layerskip_kernels.triton_ops.quantised import BY_SEGMENT, KINDS, Kind
from layerskip_kernels.triton_ops.row_maps import packed, split, verify_rows

PAGE_SIZE = 16
EXIT_LAYER = 2
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KIND_NAMED = {kind.name: kind for kind in (*KINDS, *BY_SEGMENT)}
# What a case names: a model's dtype, and the type of its weights where it is another.
NUMBERS: dict[str, tuple[torch.dtype, str | None]] = {
    "bf16": (torch.bfloat16, None), "fp16": (torch.float16, None), "fp32": (torch.float32, None),
    **{name: (torch.bfloat16, name) for name in (*KIND_NAMED, "q4_k_m")},
}  # fmt: skip

# All that a step may ask of torch: views and copies within the device. What would bring a number to the host
# (aten::_local_scalar_dense, aten::nonzero, a copy to the CPU) is not among it, nor memory: what a CUDA graph allocates
# while it is captured stays its own.
DEVICE_OPS = {"aten::copy_", "aten::select.int", "aten::slice.Tensor", "aten::view", "aten::zero_", "aten::detach"}


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: its arguments by name (compile-time ones among them), its grid, and what Triton made of it."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class Driver:
    """A target without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class StaysOnDevice(TorchDispatchMode):
    """Raises RuntimeError for a torch operation that is not in DEVICE_OPS, or that leaves the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if func.name() not in DEVICE_OPS or any(tensor.device.type != "meta" for tensor in tensors):
            raise RuntimeError(f"a step waits for the device or takes memory, or may: {func.name()}")
        return result


@contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Compile kernels instead of launching them."""
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        launches.append(Launch(self.__name__, tuple(grid), arguments, compiled))
        return compiled

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


@contextmanager
def configured(**said: Any) -> Iterator[None]:
    """Kernels are launched as tuned.Config says of these settings."""
    original = launching.config_of
    launching.config_of = lambda op: replace(original(op), **said)
    try:
        yield
    finally:
        launching.config_of = original


def set_target(name: str) -> None:
    """For the whole process: Triton's functions remember the first target that they were compiled for."""
    triton.runtime.driver.set_active(Driver(TARGETS[name]))


@dataclass(frozen=True)
class Step:
    """A step of one sequence: ``kind`` is decode, draft (of one token, with the first EXIT_LAYER layers) or verify
    (of rows - 1 drafts), after ``context`` positions; or prompt: rows through all layers, a token for the last."""

    kind: str
    rows: int
    context: int = 500


def types_of(weights: str) -> tuple[str, str, str]:
    """The types of a model's matrices: of v and of the down projection, of the head and embedding, of the others."""
    return ("q6_k", "q6_k", "q4_k") if weights == "q4_k_m" else (weights, weights, weights)


def meta_model(config: ModelConfig, dtype: torch.dtype, weights: str | None = None) -> steps.Llama:
    """``weights``: a type of quantised.KINDS or q4_k_m, a mix like llama.cpp's; None: in ``dtype``."""
    fine, outer, other = (None,) * 3 if weights is None else (KIND_NAMED[name] for name in types_of(weights))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def packed(n: int, k: int, kind: Kind | None = other) -> Tensor:
        if kind is not None:
            return empty(*kind.packed_shape(n, k), dtype=kind.dtype)
        return empty(-(-n // 16), num_steps(k), 8, 16, 8)

    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * k, config.num_kv_heads * k
    layer = LayerWeights(
        attn_norm=empty(d), wq=packed(q, d), wk=packed(kv, d), wv=packed(kv, d, fine), qkv_bias=None, wo=packed(d, q),
        out_bias=None, mlp_norm=empty(d), w_gate=packed(f, d), w_up=packed(f, d), w_down=packed(d, f, fine),
    )  # fmt: skip
    laid_out = ModelWeights(
        embedding=packed(config.vocab_size, d, outer), final_norm=empty(d),
        lm_head=packed(config.vocab_size, d, outer),
        cos=empty(1, config.max_positions, k // 2, dtype=torch.float32),
        sin=empty(1, config.max_positions, k // 2, dtype=torch.float32), layers=(layer,) * config.num_layers,
    )  # fmt: skip
    same = (0,) * config.num_layers
    sizes = ModelSizes(config.num_heads, f, config.vocab_size, config.rms_norm_eps, k**-0.5, same, same)
    return steps.Llama(laid_out, sizes)


def meta_cache(config: ModelConfig, dtype: torch.dtype, positions: int, pages: int = 4096) -> steps.PagedCache:
    layers, heads, k = config.num_layers, config.num_kv_heads, config.head_dim
    return steps.PagedCache(
        torch.empty(layers, pages, heads, k, PAGE_SIZE, dtype=dtype, device="meta"),
        torch.empty(layers, pages, heads, PAGE_SIZE, k, dtype=dtype, device="meta"),
        torch.empty(pages, PAGE_SIZE, config.hidden_size, dtype=dtype, device="meta"),
        torch.empty(1, table_width(-(-positions // PAGE_SIZE), PAGE_SIZE), dtype=torch.int32, device="meta"),
    )


def record(config: ModelConfig, numbers: str, step: Step) -> list[Launch]:
    """The launches of a step, compiled for the process's target, of a model of some NUMBERS. Raises RuntimeError if it
    waits for the device."""
    dtype, weights = NUMBERS[numbers]
    llama, cache = meta_model(config, dtype, weights), meta_cache(config, dtype, step.context + step.rows)
    tokens, positions = (torch.empty(step.rows, dtype=torch.int64, device="meta") for _ in range(2))
    launches: list[Launch] = []
    if step.kind == "draft":
        maps = [torch.empty(1, dtype=torch.int32, device="meta") for _ in range(steps.DraftPass.MAPS)]
        head, size = llama.weights.lm_head, llama.sizes.vocab_size
        draft = steps.DraftPass(llama, cache, maps, tokens, positions, 1, head, size)
        move = draft.move(llama, cache, 1)
        steps.error_of(cache.k)  # made once for a cache
        with recording(launches), StaysOnDevice():
            draft.step([steps.Leg(llama, lambda: cache, move, EXIT_LAYER)], None)
    else:
        drafts = 0 if step.kind == "prompt" else step.rows - 1
        depths = [EXIT_LAYER] * drafts + [0] if step.kind == "verify" else [0] * step.rows
        kind, maps = verify_rows(depths, [0, step.rows], [drafts], [True], size=int)
        verify = steps.VerifyPass(llama, cache, kind, split(packed(maps).to("meta"), kind.lengths()))
        rows = verify.move.buffers
        for each in (rows.x, rows.attention, rows.activation):
            for form in (integer_rows.NUMBERS, *each.forms):
                each.turned(form)  # made once for a cache
        steps.error_of(cache.k)
        with recording(launches), StaysOnDevice():
            verify.run(llama, cache, tokens, positions)
    return launches


def record_sampling(config: ModelConfig, rows: int) -> list[Launch]:
    """The launches that edit logits and draw tokens of so many rows, with every filter, out of all tokens and out of a
    few, and that judge drafts by the rejection rule. Raises RuntimeError if they wait for the device."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    size, error = config.vocab_size, empty(1, dtype=torch.int32)
    numbers, indices = (empty(rows, dtype=dtype) for dtype in (torch.int64, torch.int32))
    reals = empty(rows)
    sampling = DraftSampling(reals, numbers, empty(rows, dtype=torch.float64), reals, numbers, numbers)
    chooser = steps.Drawing(top_k=True, top_p=True).chooser(rows, size, torch.device("meta"))
    rejection, kept = steps.Rejection(indices, indices, size), empty(rows, 1, size)
    ids, drafts = empty(size, dtype=torch.int64), empty(rows, 8, dtype=torch.int64)
    listed = [empty(rows, 64, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int64, torch.bool)]
    edits, before = LogitEdits(reals, reals, reals, numbers, *listed), steps.Preceding(indices, indices, 4)
    columns = empty(size, dtype=torch.int32)
    launches: list[Launch] = []
    logits = empty(rows, size)
    with recording(launches), StaysOnDevice():
        for known in (None, ids):
            stands = None if known is None else columns
            steps.edit_rows(logits, indices, indices, numbers, numbers, before, edits, size, stands, 1)
            chooser.run(logits, logits, indices, sampling, numbers, error, 1, ids=known, kept=kept, columns=indices)
        steps.take_targets(chooser.candidates, indices, numbers, error)
        steps.take_draft(chooser.candidates, ids, indices, indices, indices, drafts, numbers, numbers, error)
        scores = kept.view(rows, size)
        rejection.run(scores, scores, chooser.maxima, numbers, numbers, numbers, numbers, numbers, error)
    return launches


# ---- what a launch moves ----

WEIGHTS = {
    "_qkv_rope_append_kernel": ("wq_ptr", "wk_ptr", "wv_ptr"),
    "_linear_residual_kernel": ("w_ptr",),
    "_gate_up_act_kernel": ("gate_ptr", "up_ptr"),
    "_head_kernel": ("w_ptr",),
}


def weight_bytes(launch: Launch) -> int:
    """What the launch reads of packed weights: all of them, for each group of rows that a program shares."""
    names = WEIGHTS.get(launch.name, ())
    return sum(launch.arguments[name].nbytes for name in names) * (launch.grid[0] if names else 0)


def row_bytes(launch: Launch) -> int:
    """What the programs of a prompt read of its rows: each of them all numbers of its rows, or their integers."""
    a = launch.arguments
    if launch.name not in WEIGHTS or not a["PROMPT"]:
        return 0
    kind = next((a[name] for name in ("KIND", "Q_KIND", "GATE_KIND") if name in a), 0)
    of_block = 128 if kind == 0 else 64 if kind & 64 else 68 if kind & 15 == 8 else 40 if kind & 16 else 36
    return launch.programs * a["ROWS"] * a["steps"] * 2 * of_block


def kv_bytes(launch: Launch, positions: int) -> int:
    """K and V of ``positions`` positions, for each KV head and each block of rows."""
    if launch.name != "_attend_kernel":
        return 0
    k_pages = launch.arguments["k_ptr"]
    row_blocks, heads = launch.grid[:2]
    return row_blocks * heads * 2 * positions * launch.arguments["K"] * k_pages.element_size()


def activation_bytes(launch: Launch) -> int:
    """Rows in and out, once each: what programs read again comes from the second-level cache."""
    a = launch.arguments
    if launch.name == "_join_rows_kernel":
        size = a["hidden_ptr"].element_size()
        return launch.programs * a["D"] * (2 * size + 4) + a["D"] * size
    if launch.name == "_qkv_rope_append_kernel":
        width = (a["num_heads"] + 2 * a["num_kv_heads"]) * 2 * a["HALF_HEAD"]
        return a["T"] * (a["steps"] * 64 * 4 + width * a["q_ptr"].element_size())
    if launch.name == "_attend_kernel":
        return (
            0 if not a["ONE_CHUNK"] else a["q_ptr"].size(0) * a["num_heads"] * a["K"] * (a["q_ptr"].element_size() + 4)
        )
    if launch.name == "_linear_residual_kernel":
        size = a["hidden_ptr"].element_size()
        rows = a["T"] * (a["steps"] * 64 * 4 + (2 + bool(a["KEEP"])) * a["N"] * size)
        return rows + (a["NORM"] and a["N"] * (a["T"] * (size + 4) + size))
    if launch.name == "_gate_up_act_kernel":
        return a["T"] * (a["steps"] * 64 + a["F"]) * 4
    if launch.name == "_turn_rows_kernel":
        return a["T"] * a["width"] * 8
    if launch.name == "_round_rows_kernel":
        return launch.grid[0] * a["K"] * (4 + a["ONE_PLANE"] + 2 * a["TWO_PLANES"] + 2 * a["BY_SEGMENT"])
    if launch.name == "_head_kernel":
        candidates = launch.grid[1] * a["TILES"] * 8
        return a["T"] * (a["steps"] * 64 * 4 + candidates + a["LOGITS"] * a["N"] * 4)
    return 0
