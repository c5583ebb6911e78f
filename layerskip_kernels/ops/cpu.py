"""The ``cpu`` backend: the C++ ops (schemas in csrc/bindings.cpp), with the names and operands of ``Backend``.

This is the one place that calls them. They check their arguments: ValueError or TypeError names the argument, what was
expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

import layerskip_kernels.ops.extension  # noqa: F401 - registers the ops
from layerskip_kernels.operands import (
    AdapterLayers,
    CacheTensors,
    Cycle,
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
from layerskip_kernels.ops.memory import HostMemory

__all__ = ["CpuOps", "model_number"]

_cpp = torch.ops.layerskip


class _Kept(NamedTuple):
    """What C++ knows of a model by a number: its hundreds of tensors would be read from memory again at every call."""

    number: int
    sizes: ModelSizes
    cos: Tensor
    head: tuple[int, int]  # KV heads and their length


_kept: WeakKeyDictionary[ModelWeights, _Kept] = WeakKeyDictionary()


def model_number(weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors) -> int:
    """That of a model, whose tensors stay what they are but for longer RoPE tables."""
    head = cache.k.size(2), cache.k.size(3)
    known = _kept.get(weights)
    same = known is not None and known.cos is weights.cos and known.head == head
    if known is None or not same or (known.sizes is not sizes and known.sizes != sizes):
        number = _cpp.keep_model(weights.flat, *head, sizes.ints, sizes.floats)
        finalize(weights, _cpp.forget_model, number)
        _kept[weights] = known = _Kept(number, sizes, weights.cos, head)
    return known.number


def _flat(adapters: Sequence[AdapterLayers]) -> tuple[list[int], list[int], list[Tensor], list[Tensor]]:
    """As the schemas of the two passes take them: their exits, the numbers of their layers, and their pages."""
    return (
        [a.exit_layer for a in adapters],
        [model_number(a.weights, a.sizes, a.cache) for a in adapters],
        [a.cache.k for a in adapters],
        [a.cache.v for a in adapters],
    )


class CpuOps(HostMemory):
    """Weights are packed in groups of output columns (``pack_weight``)."""

    drafts_adapt = True
    draws_in_verification = False
    runs_cycles = True

    def exp(self, x: Tensor) -> Tensor:
        return _cpp.exp(x)

    def log(self, x: Tensor) -> Tensor:
        return _cpp.log(x)

    def silu(self, x: Tensor) -> Tensor:
        return _cpp.silu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return _cpp.gelu(x)

    def tanh(self, x: Tensor) -> Tensor:
        return _cpp.tanh(x)

    def inverse_sqrt(self, x: Tensor) -> Tensor:
        return _cpp.inverse_sqrt(x)

    def pack_weight(self, weight: Tensor) -> Tensor:
        return _cpp.pack_weight(weight)

    def select_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        return _cpp.select_rows(weight, rows)

    def embed_tokens(
        self, tokens: Tensor, embedding: Tensor, hidden_size: int, dtype: torch.dtype, multiplier: float = 1.0
    ) -> Tensor:
        return _cpp.embed_tokens(tokens, embedding, hidden_size, dtype, multiplier)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        return _cpp.linear(x, weight, bias, out_features)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return _cpp.rms_norm(x, weight, eps, offset)

    def norm_qkv_rope_append(
        self,
        hidden: Tensor,
        norm_weight: Tensor | None,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        qkv_bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor,
        slot_mapping: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        num_heads: int,
        eps: float,
        norm_offset: float = 0.0,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        return _cpp.norm_qkv_rope_append(
            hidden, norm_weight, wq, wk, wv, qkv_bias, cos, sin, positions, slot_mapping, k_pages, v_pages, num_heads,
            eps, norm_offset, q_norm, k_norm,
        )  # fmt: skip

    def paged_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        positions: Tensor,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> Tensor:
        return _cpp.paged_attention(q, k_pages, v_pages, block_table, query_start_loc, positions, scale, window, cap)

    def out_residual(
        self,
        attention: Tensor,
        wo: Tensor,
        out_bias: Tensor | None,
        residual: Tensor,
        post_norm: Tensor | None = None,
        eps: float = 0.0,
        norm_offset: float = 0.0,
        multiplier: float = 1.0,
    ) -> Tensor:
        return _cpp.out_residual(attention, wo, out_bias, residual, post_norm, eps, norm_offset, multiplier)

    def norm_gate_up_act(
        self,
        hidden: Tensor,
        norm_weight: Tensor | None,
        w_gate: Tensor,
        w_up: Tensor,
        intermediate_size: int,
        eps: float,
        norm_offset: float = 0.0,
        gate_up_bias: Tensor | None = None,
        use_gelu: bool = False,
    ) -> Tensor:
        return _cpp.norm_gate_up_act(
            hidden, norm_weight, w_gate, w_up, intermediate_size, eps, norm_offset, gate_up_bias, use_gelu
        )

    def down_residual(
        self,
        activation: Tensor,
        w_down: Tensor,
        residual: Tensor,
        down_bias: Tensor | None = None,
        post_norm: Tensor | None = None,
        eps: float = 0.0,
        norm_offset: float = 0.0,
        multiplier: float = 1.0,
    ) -> Tensor:
        return _cpp.down_residual(activation, w_down, residual, down_bias, post_norm, eps, norm_offset, multiplier)

    def norm_head_argmax(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        lm_head: Tensor,
        vocab_size: int,
        eps: float,
        norm_offset: float = 0.0,
        multiplier: float = 1.0,
        cap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        return _cpp.norm_head_argmax(hidden, norm_weight, lm_head, vocab_size, eps, norm_offset, multiplier, cap)

    def accept_draft(
        self, tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor, judged: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _cpp.accept_draft(tokens, targets, query_start_loc, num_drafts, judged)

    def philox(self, counters: Tensor, seed: int) -> Tensor:
        return _cpp.philox(counters, seed)

    def gumbel(self, words: Tensor) -> Tensor:
        return _cpp.gumbel(words)

    def edit_logits(
        self, logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: LogitEdits
    ) -> Tensor:
        return _cpp.edit_logits(logits, sequences, positions, preceding, edits.flat)

    def filter_logits(
        self, scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
    ) -> Tensor:
        return _cpp.filter_logits(scores, temperatures, top_ks, top_ps, min_ps)

    def gumbel_argmax(self, scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
        return _cpp.gumbel_argmax(scores, positions, seeds, samples, noisy)

    def rejection_sample(
        self, draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
    ) -> Tensor:
        return _cpp.rejection_sample(draft_scores, scores, drafts, positions, seeds, samples)

    def run_layers(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int
    ) -> None:
        _cpp.run_layers(
            model_number(weights, sizes, cache), *cache, rows.tokens, rows.positions, rows.depths,
            rows.query_start_loc, rows.block_table, stop,
        )  # fmt: skip

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
        drafted = _cpp.draft_pass(
            model_number(weights, sizes, cache), *cache, rows.tokens, rows.positions, rows.num_drafts,
            rows.block_table, head and head.weight, head and head.ids, sampling.flat if sampling else [],
            stops.flat if stops else [], exit_layer, max_drafts, keep_scores, *_flat(adapters),
        )  # fmt: skip
        return Drafted(*drafted)

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
        if sampling is not None:
            raise ValueError("backend 'cpu' does not draw tokens in verify_pass")
        return _cpp.verify_pass(
            model_number(weights, sizes, cache), *cache, rows.tokens, rows.positions, rows.depths,
            rows.query_start_loc, num_drafts, judged, rows.block_table, *_flat(adapters),
        )  # fmt: skip

    def decode_pass(
        self,
        weights: ModelWeights,
        drafting: ModelWeights,
        sizes: ModelSizes,
        cache: CacheTensors,
        rows: DraftRows,
        head: DraftHead | None,
        exit_layer: int,
        num_cycles: int,
        ends: Tensor,
        stops: DraftStops | None = None,
        adapters: Sequence[AdapterLayers] = (),
    ) -> list[Cycle]:
        *parts, seconds = _cpp.decode_pass(
            model_number(weights, sizes, cache), model_number(drafting, sizes, cache), *cache, rows.tokens,
            rows.positions, rows.num_drafts, rows.block_table, head and head.weight, head and head.ids,
            stops.flat if stops else [], ends, exit_layer, int(rows.num_drafts.max()), num_cycles, *_flat(adapters),
        )  # fmt: skip
        return [Cycle(*of, *spent) for *of, spent in zip(*parts, seconds.tolist(), strict=True)]
