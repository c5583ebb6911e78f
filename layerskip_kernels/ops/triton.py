"""The ``triton`` backend: triton_ops with the names and operands of ``Backend``, and tensors where they belong.

Weights, pages and what the kernels pass on stay on the GPU (under TRITON_INTERPRET=1: on the CPU). Row counts, depths
and draft counts are read on the host, so that a step is a fixed sequence of launches; ``to_host`` is the one wait of a
cycle. Steps draw tokens on the device. Rule 7's ops alone run where their numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

import layerskip_kernels.triton_ops as triton_ops
from layerskip_kernels.operands import (
    AdapterLayers,
    CacheTensors,
    Drafted,
    DraftHead,
    DraftRows,
    DraftSampling,
    DraftStops,
    JudgeSampling,
    LogitEdits,
    ModelSizes,
    ModelWeights,
    PendingRows,
)
from layerskip_kernels.ops.adapting import adapt_rows
from layerskip_kernels.ops.cpu import CpuOps
from layerskip_kernels.ops.cycling import cycles_by_passes
from layerskip_kernels.triton_ops.graphs import KeptPasses

__all__ = ["TritonOps", "default_device", "device_of"]

P = ParamSpec("P")
T = TypeVar("T")


def default_device() -> torch.device:
    """Where tensors are put: the current GPU, or the CPU for Triton's interpreter. Raises RuntimeError for neither."""
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "backend 'triton' needs a GPU that torch can use (`layerskip doctor` says what it finds), or "
            "TRITON_INTERPRET=1 in the environment, set before Python starts, to interpret the kernels on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_of(device: torch.device | None) -> torch.device:
    """The device with its index, or the default one. Raises ValueError for one that the kernels cannot run on."""
    default = default_device()
    if device is None or device == default:
        return default
    if device.type != default.type:
        raise ValueError(
            "backend 'triton' runs on a GPU, such as cuda:0, and on the CPU where TRITON_INTERPRET=1 has its kernels "
            f"interpreted; here device must be {default.type}, got {device}"
        )
    return default if device.index is None else device


class Mark:
    """A moment on a device: when it has done what was asked of it before."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Mark) -> float:
        """The seconds since ``earlier``. Waits for this moment."""
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def _on_device(op: Callable[P, T]) -> Callable[Concatenate[TritonOps, P], T]:
    """An op as a method: Triton launches on the current device, wherever the tensors are."""

    @wraps(op)
    def run(self: TritonOps, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._current():
            return op(*args, **kwargs)

    return run


class TritonOps:
    """The ops on one device. Raises RuntimeError for an AMD GPU, ValueError for a device that is not there."""

    drafts_adapt = False
    draws_in_verification = True
    runs_cycles = False  # its passes are captured one by one
    decode_pass = cycles_by_passes

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.version.hip:
            raise RuntimeError(
                "backend 'triton' does not run on AMD GPUs: its kernels were compiled for them, but never run; use "
                "backend='cpu'"
            )
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
            raise ValueError(f"device {device} is not there; torch finds {there}")
        self.device = device
        self._steps = KeptPasses()
        self._host = CpuOps()

    def _current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # ---- memory and time ----

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def placer(self) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.to(self.device)

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device, those of the host by one copy that the host does not wait for."""
        return triton_ops.to_device(self.device, *tensors)

    def to_host(self, k_cache: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies on the CPU. Waits for the steps on this cache so far, and raises what they noted."""
        error = triton_ops.error_of(k_cache)
        *copies, noted = triton_ops.to_host(*tensors, error)
        triton_ops.raise_noted(int(noted), error)
        return tuple(copies)

    def forget_errors(self, k_cache: Tensor) -> None:
        """What the steps on this cache noted so far is not raised: they were given up."""
        triton_ops.error_of(k_cache).zero_()

    def captured_steps(self) -> int:
        """How many kinds of steps are replayed from CUDA graphs by now."""
        return self._steps.captured()

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """This moment on the device. The difference of two marks is the seconds between them."""
        with self._current():
            return Mark() if self.device.type == "cuda" else perf_counter()

    # ---- on the device ----

    silu = _on_device(triton_ops.silu)
    gelu = _on_device(triton_ops.gelu)
    tanh = _on_device(triton_ops.tanh)
    select_rows = _on_device(triton_ops.select_rows)
    embed_tokens = _on_device(triton_ops.embed_tokens)
    linear = _on_device(triton_ops.linear)
    rms_norm = _on_device(triton_ops.rms_norm)
    norm_qkv_rope_append = _on_device(triton_ops.norm_qkv_rope_append)
    paged_attention = _on_device(triton_ops.paged_attention)
    out_residual = _on_device(triton_ops.out_residual)
    norm_gate_up_act = _on_device(triton_ops.norm_gate_up_act)
    down_residual = _on_device(triton_ops.down_residual)
    norm_head_argmax = _on_device(triton_ops.norm_head_argmax)
    accept_draft = _on_device(triton_ops.accept_draft)

    def pack_weight(self, weight: Tensor) -> Tensor:
        return triton_ops.pack_weight(weight.to(self.device))

    def run_layers(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int
    ) -> None:
        tokens, positions, block_table = self.to_device(rows.tokens, rows.positions, rows.block_table)
        placed = replace(rows, tokens=tokens, positions=positions, block_table=block_table)
        with self._current():
            triton_ops.run_layers(weights, sizes, cache, placed, stop)

    def draft_pass(
        self,
        weights: ModelWeights,
        sizes: ModelSizes,
        cache: CacheTensors,
        rows: DraftRows,
        head: DraftHead | None,
        exit_layer: int,
        max_drafts: int,
        sampling: DraftSampling | None = None,
        stops: DraftStops | None = None,
        keep_scores: bool = False,
        adapters: Sequence[AdapterLayers] = (),
    ) -> Drafted:
        """As reference.draft_pass, but for what ``drafts_adapt`` says; what it made stays on the device."""
        if stops is not None:
            raise ValueError("backend 'triton' does not stop drafts in draft_pass")
        for adapter in adapters:
            triton_ops.share_error(cache.k, adapter.cache.k)
        with self._current():
            tokens, scores = self._steps.draft_pass(
                weights, sizes, cache, rows, head, exit_layer, max_drafts, sampling, keep_scores, adapters
            )
        return Drafted(tokens, rows.num_drafts, torch.empty(len(rows.num_drafts), 0), scores)

    def verify_pass(
        self,
        weights: ModelWeights,
        sizes: ModelSizes,
        cache: CacheTensors,
        rows: PendingRows,
        num_drafts: Tensor,
        judged: Tensor,
        sampling: JudgeSampling | None = None,
        adapters: Sequence[AdapterLayers] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As reference.verify_pass; the results stay on the device."""
        for adapter in adapters:
            triton_ops.share_error(cache.k, adapter.cache.k)
            if (lower := rows.below(adapter.exit_layer)) is not None:
                self.run_layers(weights, sizes, cache, lower, adapter.exit_layer)
                adapt_rows(self, cache.hidden, adapter, lower)
                rows = rows.raised_to(adapter.exit_layer)
        with self._current():
            return self._steps.verify_pass(weights, sizes, cache, rows, num_drafts, judged, sampling)

    # ---- where the numbers are: on the device, or on the host ----

    def _there(self, name: str, numbers: Tensor, *others: Tensor | int) -> Tensor:
        """An op by its name, on the device of ``numbers``; the other arguments may be on the host."""
        if numbers.device != self.device:
            return getattr(self._host, name)(numbers, *others)
        placed = iter(self.to_device(*(other for other in others if isinstance(other, Tensor))))
        with self._current():
            arguments = (next(placed) if isinstance(other, Tensor) else other for other in others)
            return getattr(triton_ops, name)(numbers, *arguments)

    def exp(self, x: Tensor) -> Tensor:
        return self._there("exp", x)

    def log(self, x: Tensor) -> Tensor:
        return self._there("log", x)

    def inverse_sqrt(self, x: Tensor) -> Tensor:
        return self._there("inverse_sqrt", x)

    def philox(self, counters: Tensor, seed: int) -> Tensor:
        return self._there("philox", counters, seed)

    def gumbel(self, words: Tensor) -> Tensor:
        return self._there("gumbel", words)

    def edit_logits(
        self, logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: LogitEdits
    ) -> Tensor:
        if logits.device != self.device:
            return self._host.edit_logits(logits, sequences, positions, preceding, edits)
        sequences, positions, preceding = self.to_device(sequences, positions, preceding)
        placed = LogitEdits(*self.to_device(*edits.flat))
        with self._current():
            return triton_ops.edit_logits(logits, sequences, positions, preceding, placed)

    def filter_logits(
        self, scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
    ) -> Tensor:
        return self._there("filter_logits", scores, temperatures, top_ks, top_ps, min_ps)

    def gumbel_argmax(self, scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
        return self._there("gumbel_argmax", scores, positions, seeds, samples, noisy)

    def rejection_sample(
        self, draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
    ) -> Tensor:
        return self._there("rejection_sample", draft_scores, scores, drafts, positions, seeds, samples)
