"""run_layers, draft_step, verify_step: the fused kernels in order, with no wait for the device between them.

Launches: at most six a layer (qkv, attention and its merge, output projection, gate and up, down projection), and
besides: one for each depth at which rows join, the LM head, and the choice of a draft or the acceptance of drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .accept_draft import accept_candidates
from .errors import new_error
from .join_rows import join_rows
from .norm_gate_up_silu import gate_up_silu
from .norm_head_argmax import Candidates, head_candidates, take_draft
from .norm_qkv_rope_append import qkv_rope_append
from .out_residual import linear_residual
from .paged_attention import attend
from .workspace import Move, Shape

__all__ = ["draft_step", "error_of", "run_layers", "verify_step"]

NUM_MODEL_WEIGHTS, NUM_LAYER_WEIGHTS = 5, 11


@lru_cache
def error_of(device: torch.device) -> Tensor:
    """The error record of a device's steps."""
    return new_error(device)


@dataclass(frozen=True)
class Cache:
    """k [L, P, G, K, S], v [L, P, G, S, K], hidden [P, S, D], and each sequence's pages int32 [B, max_blocks]."""

    k: Tensor
    v: Tensor
    hidden: Tensor
    block_table: Tensor

    @property
    def reach(self) -> int:
        """Positions that the block table has room for."""
        return self.block_table.size(1) * self.hidden.size(1)


@dataclass(frozen=True)
class Llama:
    """The flat list of weights (reference.MODEL_WEIGHTS, LAYER_WEIGHTS) and the sizes that shapes do not say."""

    weights: list[Tensor]
    num_heads: int
    intermediate_size: int
    vocab_size: int
    eps: float
    scale: float

    def layer(self, index: int) -> list[Tensor]:
        start = NUM_MODEL_WEIGHTS + index * NUM_LAYER_WEIGHTS
        return self.weights[start : start + NUM_LAYER_WEIGHTS]

    @property
    def num_layers(self) -> int:
        return (len(self.weights) - NUM_MODEL_WEIGHTS) // NUM_LAYER_WEIGHTS

    def shape(self, cache: Cache) -> Shape:
        num_kv_heads, head_dim = cache.k.shape[2:4]
        return Shape(
            cache.hidden.size(2), self.intermediate_size, self.num_heads, num_kv_heads, head_dim, cache.k.dtype,
            cache.k.device,
        )  # fmt: skip


def raise_rows(
    llama: Llama, cache: Cache, move: Move, tokens: Tensor, positions: Tensor, stop: int, position_step: int = 0,
    keep: bool = True,
) -> None:  # fmt: skip
    """The one move of the staircase. Leaves the rows' final norms in move.x, and their hidden states in the cache."""
    error = error_of(cache.k.device)
    embedding, final_norm, _, cos, sin = llama.weights[:NUM_MODEL_WEIGHTS]
    joined = 0
    for level, until in zip(move.levels, [*(le.depth for le in move.levels[1:]), stop], strict=True):
        join_rows(
            tokens, positions, move.order, move.sequence_of_row, cache.block_table, embedding, cache.hidden,
            final_norm if level.depth == stop else llama.layer(level.depth)[0], move.positions, move.slots, move.hidden,
            move.x, error, joined, level.num_rows - joined, llama.vocab_size, cos.size(0), llama.eps,
            level.depth == 0, position_step,
        )  # fmt: skip
        joined = level.num_rows
        for layer in range(level.depth, until):
            _, wq, wk, wv, qkv_bias, wo, out_bias, mlp_norm, w_gate, w_up, w_down = llama.layer(layer)
            pages = cache.k[layer], cache.v[layer]
            qkv_rope_append(
                move.x, wq, wk, wv, _bias(qkv_bias), cos, sin, move.positions, move.slots, move.q, *pages, joined
            )  # fmt: skip
            attend(
                move.q, *pages, cache.block_table, level.rows, level.starts, move.positions, llama.scale, move.scratch,
                move.attention,
            )  # fmt: skip
            linear_residual(
                move.attention, wo, _bias(out_bias), move.hidden, joined, move.arrivals, mlp_norm, move.x, llama.eps
            )  # fmt: skip
            gate_up_silu(move.x, w_gate, w_up, move.hidden, move.activation, llama.intermediate_size, joined)
            last = layer + 1 == stop
            next_norm = final_norm if last else llama.layer(layer + 1)[0]
            kept = (move.slots, cache.hidden) if last and keep else (None, None)
            linear_residual(
                move.activation, w_down, None, move.hidden, joined, move.arrivals, next_norm, move.x, llama.eps, *kept
            )  # fmt: skip


def run_layers(
    weights: list[Tensor], k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, tokens: Tensor, positions: Tensor,
    depths: Tensor, query_start_loc: Tensor, block_table: Tensor, stop: int, num_heads: int, intermediate_size: int,
    vocab_size: int, eps: float, scale: float,
) -> None:  # fmt: skip
    """reference.run_layers. Waits for depths and query_start_loc, unless they are on the host."""
    llama = Llama(weights, num_heads, intermediate_size, vocab_size, eps, scale)
    cache = Cache(k_cache, v_cache, hidden_cache, block_table)
    move = Move(llama.shape(cache), depths.tolist(), query_start_loc.tolist(), cache.reach)
    raise_rows(llama, cache, move, tokens, positions, stop)


class DraftPlan:
    """draft_step for certain draft counts: buffers, and a Move for each draft."""

    def __init__(
        self, llama: Llama, cache: Cache, num_drafts: list[int], max_drafts: int, head_size: int
    ) -> None:  # fmt: skip
        shape = llama.shape(cache)
        self.moves = []
        for i in range(max(num_drafts, default=0)):
            rows = [int(count > i) for count in num_drafts]
            starts = [sum(rows[:b]) for b in range(len(rows) + 1)]
            move = Move(shape, [0] * sum(rows), starts, cache.reach)
            # Tokens and positions are given by sequence, whether it still drafts or not.
            move.order.copy_(move.sequence_of_row)
            self.moves.append(move)
        self.rows = torch.arange(len(num_drafts), dtype=torch.int32, device=shape.device)
        self.candidates = Candidates(len(num_drafts), head_size, shape.device)
        self.tokens = torch.zeros(len(num_drafts), dtype=torch.int64, device=shape.device)
        self.drafts = torch.full((len(num_drafts), max_drafts), -1, dtype=torch.int64, device=shape.device)

    def run(
        self, llama: Llama, cache: Cache, tokens: Tensor, positions: Tensor, head: Tensor, head_size: int,
        draft_ids: Tensor | None, exit_layer: int,
    ) -> Tensor:  # fmt: skip
        error = error_of(cache.k.device)
        self.tokens.copy_(tokens)
        for i, move in enumerate(self.moves):
            raise_rows(llama, cache, move, self.tokens, positions, exit_layer, position_step=i)
            head_candidates(move.x, self.rows[: move.num_rows], head, head_size, self.candidates, None)
            take_draft(self.candidates, draft_ids, move.sequence_of_row, self.drafts, i, self.tokens, error)
        return self.drafts


class VerifyPlan:
    """verify_step for certain depths, rows and draft counts."""

    def __init__(self, llama: Llama, cache: Cache, depths: list[int], starts: list[int], num_drafts: list[int]) -> None:
        shape = llama.shape(cache)
        device = shape.device
        self.move = Move(shape, depths, starts, cache.reach)
        judged, first_judged = [], []
        for b, drafts in enumerate(num_drafts):
            first_judged.append(len(judged))
            judged += [self.move.place[given] for given in range(starts[b + 1] - max(0, drafts + 1), starts[b + 1])]
        self.judged = torch.tensor(judged, dtype=torch.int32, device=device)
        self.first_judged = torch.tensor(first_judged, dtype=torch.int32, device=device)
        self.ends = torch.tensor(starts[1:], dtype=torch.int32, device=device)
        self.num_drafts = torch.tensor(num_drafts, device=device)
        self.most_drafts = max(0, *num_drafts) if num_drafts else 0
        self.candidates = Candidates(len(judged), llama.vocab_size, device)
        self.targets = torch.empty(len(judged), dtype=torch.int64, device=device)
        self.logits = torch.empty(len(judged), llama.vocab_size, device=device)

    def run(self, llama: Llama, cache: Cache, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise_rows(llama, cache, self.move, tokens, positions, llama.num_layers)
        if len(self.judged):  # chunks of prompts alone need no token
            head_candidates(self.move.x, self.judged, llama.weights[2], llama.vocab_size, self.candidates, self.logits)
        num_accepted, next_tokens = accept_candidates(
            tokens, self.ends, self.first_judged, self.num_drafts, self.candidates, self.targets,
            error_of(cache.k.device), self.most_drafts,
        )  # fmt: skip
        return num_accepted, next_tokens, self.logits


def draft_step(
    weights: list[Tensor], k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, tokens: Tensor, positions: Tensor,
    num_drafts: Tensor, block_table: Tensor, draft_head: Tensor | None, draft_ids: Tensor | None, exit_layer: int,
    max_drafts: int, num_heads: int, intermediate_size: int, vocab_size: int, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """reference.draft_step. Waits for num_drafts, unless it is on the host; errors are noted (error_of)."""
    llama = Llama(weights, num_heads, intermediate_size, vocab_size, eps, scale)
    cache = Cache(k_cache, v_cache, hidden_cache, block_table)
    counts = num_drafts.tolist()
    head, size = (weights[2], vocab_size) if draft_head is None else (draft_head, len(draft_ids))
    plan = DraftPlan(llama, cache, counts, max_drafts, size)
    return plan.run(llama, cache, tokens, positions, head, size, draft_ids, exit_layer)


def verify_step(
    weights: list[Tensor], k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, tokens: Tensor, positions: Tensor,
    depths: Tensor, query_start_loc: Tensor, num_drafts: Tensor, block_table: Tensor, num_heads: int,
    intermediate_size: int, vocab_size: int, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """reference.verify_step. Waits for depths, query_start_loc, num_drafts, unless they are on the host."""
    llama = Llama(weights, num_heads, intermediate_size, vocab_size, eps, scale)
    cache = Cache(k_cache, v_cache, hidden_cache, block_table)
    plan = VerifyPlan(llama, cache, depths.tolist(), query_start_loc.tolist(), num_drafts.tolist())
    return plan.run(llama, cache, tokens, positions)


def _bias(bias: Tensor) -> Tensor | None:
    return bias if bias.numel() else None
