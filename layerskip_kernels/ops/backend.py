"""What a backend offers: the ops and the memory that the rest of the package calls, the same names for all.

| op | reads -> gives |
|---|---|
| ``exp``, ``log``, ``silu``, ``gelu``, ``tanh``, ``inverse_sqrt`` | fp32, elementwise: rule 5, and 1 / sqrt |
| ``pack_weight`` | a linear weight [N, K], quantised or not -> the backend's own layout |
| ``select_rows`` | rows of a packed weight -> a packed weight |
| ``embed_tokens`` | tokens [T] -> hidden [T, D] |
| ``linear`` | x [T, K] -> [T, N]: rule 1, or 8 for quantised weights |
| ``rms_norm`` | x [T, D] -> [T, D]: rule 2 |
| ``norm_qkv_rope_append`` | hidden [T, D] -> q [T, H, K]; k and v into their pages |
| ``paged_attention`` | q [T, H, K], pages -> [T, H*K] |
| ``out_residual`` | attention [T, H*K], residual [T, D] -> [T, D] |
| ``norm_gate_up_act`` | hidden [T, D] -> activation [T, F] |
| ``down_residual`` | activation [T, F], residual [T, D] -> [T, D] |
| ``norm_head_argmax`` | hidden [T, D] -> tokens [T], logits [T, V] |
| ``accept_draft`` | drafts and targets -> accepted counts [B], next tokens [B] |
| ``philox`` | counters [N, 4] -> random words [N, 4]: rule 7 |
| ``gumbel`` | words [N] -> noise [N] |
| ``edit_logits`` | logits [T, V] -> with bias, penalties and a least length |
| ``filter_logits`` | scores [T, V] -> divided by temperature, cut to top-k, top-p, min-p |
| ``gumbel_argmax`` | scores [T, V] -> tokens [T] drawn from them |
| ``rejection_sample`` | draft scores, scores [T, V], drafts [T] -> tokens [T] |
| ``run_layers`` | the one move: rows from their own depths to a layer |
| ``draft_pass``, ``verify_pass`` | all of a step on tensors, each one call |

What each op means, with shapes and dtypes, is said once, in ``reference``; data movement in the cache is in
``cache_ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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

__all__ = ["Backend"]


class Backend(Protocol):
    """Ops of one kind of machine; ``reference`` documents each."""

    # Whether draft_pass stops sequences and gives confidences. If not, the former is refused and the latter have no
    # columns.
    drafts_adapt: bool
    # Whether verify_pass chooses tokens by ``sampling``; elsewhere it is None, and steps draw from its logits.
    draws_in_verification: bool
    # Whether cycles in one call, decode_pass, take less time than cycles in calls of their own.
    runs_cycles: bool

    # Memory.
    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor where the backend keeps them."""

    def placer(self) -> Callable[[Tensor], Tensor]:
        """A function that copies a model's tensors to where the backend keeps them."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors where the backend's passes read them; the host does not wait for the copy."""

    def to_host(self, k_cache: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the CPU. Waits for the ops so far, and raises the errors that those on this cache noted."""

    def forget_errors(self, k_cache: Tensor) -> None:
        """The errors that ops on this cache noted so far are not raised: their step was given up."""

    # Time.
    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    def mark(self) -> Any:
        """This moment, on the device if that runs by itself. The difference of two marks is in seconds."""

    # Elementwise, and linear weights.
    def exp(self, x: Tensor) -> Tensor: ...
    def log(self, x: Tensor) -> Tensor: ...
    def gelu(self, x: Tensor) -> Tensor: ...
    def tanh(self, x: Tensor) -> Tensor: ...
    def silu(self, x: Tensor) -> Tensor: ...
    def inverse_sqrt(self, x: Tensor) -> Tensor: ...
    def pack_weight(self, weight: Tensor) -> Tensor: ...
    def select_rows(self, weight: Tensor, rows: Tensor) -> Tensor: ...
    def embed_tokens(
        self, tokens: Tensor, embedding: Tensor, hidden_size: int, dtype: torch.dtype, multiplier: float = 1.0
    ) -> Tensor: ...
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor: ...

    # A layer's, and those around the layers.
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
    ) -> Tensor: ...
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
    ) -> Tensor: ...
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
    ) -> Tensor: ...
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
    ) -> Tensor: ...
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
    ) -> Tensor: ...
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
    ) -> tuple[Tensor, Tensor]: ...
    def accept_draft(
        self, tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor, judged: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    # Random numbers, and what is chosen by them.
    def philox(self, counters: Tensor, seed: int) -> Tensor: ...
    def gumbel(self, words: Tensor) -> Tensor: ...
    def edit_logits(
        self, logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: LogitEdits
    ) -> Tensor: ...
    def filter_logits(
        self, scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
    ) -> Tensor: ...
    def gumbel_argmax(
        self, scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor
    ) -> Tensor: ...
    def rejection_sample(
        self, draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
    ) -> Tensor: ...

    # All layers, and what a step does on tensors.
    def run_layers(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int
    ) -> None: ...
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
    ) -> Drafted: ...
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
    ) -> tuple[Tensor, Tensor, Tensor]: ...
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
    ) -> list[Cycle]: ...
