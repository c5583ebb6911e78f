"""run_layers and what draft_pass and verify_pass launch: the fused kernels in order, with no wait between them.

Launches: at most six a layer (qkv, attention and its merge, output projection, gate and up, down projection), and
besides: one for each depth at which rows join, the LM head, and the choice of a draft or the acceptance of drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip_kernels.operands import (
    CacheTensors,
    DraftHead,
    DraftSampling,
    LogitEdits,
    ModelSizes,
    ModelWeights,
    PendingRows,
)

from .accept_draft import accept_candidates
from .edit_logits import Preceding, edit_rows
from .errors import error_of
from .integer_rows import forms_of
from .join_rows import join_rows
from .norm_gate_up_act import gate_up_act
from .norm_head_argmax import Candidates, head_candidates, take_draft, take_targets
from .norm_qkv_rope_append import qkv_rope_append
from .out_residual import linear_residual
from .paged_attention import attend
from .rejection_sample import Rejection
from .row_maps import MoveKind, VerifyKind, move_rows, packed, split
from .sampling import Drawing
from .transfer import to_device
from .workspace import BufferSizes, Move, Workspace

__all__ = ["DraftPass", "Drawing", "Leg", "Llama", "PagedCache", "VerifyPass", "head_of", "run_layers"]


@dataclass(frozen=True, eq=False)
class PagedCache:
    """A cache's tensors (CacheTensors) and each sequence's pages int32 [B, max_blocks]."""

    k: Tensor
    v: Tensor
    hidden: Tensor
    block_table: Tensor
    workspace: Workspace = field(default_factory=Workspace)  # for one step at a time

    @classmethod
    def of(cls, cache: CacheTensors, block_table: Tensor) -> PagedCache:
        return cls(*cache, block_table)

    @property
    def reach(self) -> int:
        """Positions that the block table has room for."""
        return self.block_table.size(1) * self.hidden.size(1)


@dataclass(frozen=True, eq=False)
class Llama:
    """A model's weights and the sizes that their shapes do not say."""

    weights: ModelWeights
    sizes: ModelSizes

    def buffer_sizes(self, cache: PagedCache, head: Tensor) -> BufferSizes:
        """``head``: the packed LM head that the rows end at."""
        layers = self.weights.layers
        inputs = [weight for la in layers for weight in (la.wq, la.wk, la.wv, la.w_gate, la.w_up)]
        num_kv_heads, head_dim = cache.k.shape[2:4]
        return BufferSizes(
            hidden_size=cache.hidden.size(2),
            intermediate_size=self.sizes.intermediate_size,
            num_heads=self.sizes.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=cache.k.dtype,
            device=cache.k.device,
            forms=(
                forms_of(*inputs, head),
                forms_of(*(la.wo for la in layers)),
                forms_of(*(la.w_down for la in layers)),
            ),
        )


def raise_rows(
    llama: Llama, cache: PagedCache, move: Move, tokens: Tensor, positions: Tensor, stop: int, keep: bool = True
) -> None:
    """The one move of the staircase. Leaves the rows' final norms in x, and their hidden states in the cache."""
    error, rows = error_of(cache.k), move.buffers
    rows.arrivals.zero_()  # a launch that was aborted may have left some
    weights, sizes = llama.weights, llama.sizes
    joined = 0
    for level, until in zip(move.levels, [*(le.depth for le in move.levels[1:]), stop], strict=True):
        first_norm = weights.final_norm if level.depth == stop else weights.layers[level.depth].first_norm
        join_rows(
            tokens=tokens, positions=positions, order=move.order, sequence_of_row=move.sequence_of_row,
            block_table=cache.block_table, embedding=weights.embedding, hidden_cache=cache.hidden,
            norm_weight=first_norm, row_positions=rows.positions, slots=rows.slots, hidden=rows.hidden, x=rows.x,
            error=error, first_row=joined, num_rows=level.num_rows - joined, vocab_size=sizes.vocab_size,
            max_positions=weights.cos.size(1), from_embedding=level.depth == 0,
            multiplier=sizes.embedding_multiplier, eps=sizes.eps, norm_offset=sizes.norm_offset,
        )  # fmt: skip
        joined = level.num_rows
        for layer in range(level.depth, until):
            w = weights.layers[layer]
            if w.attends:
                k_pages, v_pages = cache.k[layer], cache.v[layer]
                cos, sin = weights.rope(sizes.ropes[layer])
                qkv_rope_append(
                    x=rows.x, wq=w.wq, wk=w.wk, wv=w.wv, qkv_bias=w.qkv_bias, cos=cos, sin=sin,
                    positions=rows.positions, slots=rows.slots, q=rows.q, k_pages=k_pages, v_pages=v_pages,
                    num_rows=joined, q_norm=w.q_norm, k_norm=w.k_norm, raw_k=rows.k, eps=sizes.eps,
                    norm_offset=sizes.norm_offset,
                )  # fmt: skip
                attend(
                    q=rows.q, k_pages=k_pages, v_pages=v_pages, block_table=cache.block_table, rows=level.rows,
                    starts=level.starts, positions=rows.positions, scale=sizes.scale, scratch=move.scratch,
                    out=rows.attention.numbers, window=sizes.windows[layer], cap=sizes.score_cap,
                )  # fmt: skip
                linear_residual(
                    x=rows.attention, weight=w.wo, bias=w.out_bias, hidden=rows.hidden, num_rows=joined,
                    arrivals=rows.arrivals, next_norm=w.mlp_norm, next_x=rows.x, post_norm=w.attn_post_norm,
                    projected=rows.projected, partials=rows.partials,
                    multiplier=sizes.residual_multiplier, eps=sizes.eps, norm_offset=sizes.norm_offset,
                )  # fmt: skip
            gate_up_act(
                x=rows.x, w_gate=w.w_gate, w_up=w.w_up, hidden=rows.hidden, activation=rows.activation,
                intermediate_size=sizes.intermediate_size, num_rows=joined, gate_up_bias=w.gate_up_bias,
                use_gelu=sizes.gelu,
            )  # fmt: skip
            last = layer + 1 == stop
            kept = last and keep
            linear_residual(
                x=rows.activation, weight=w.w_down, bias=w.down_bias, hidden=rows.hidden, num_rows=joined,
                arrivals=rows.arrivals, next_norm=weights.final_norm if last else weights.layers[layer + 1].first_norm,
                next_x=rows.x, slots=rows.slots if kept else None, hidden_cache=cache.hidden if kept else None,
                post_norm=w.mlp_post_norm, projected=rows.projected, partials=rows.partials,
                multiplier=sizes.residual_multiplier, eps=sizes.eps, norm_offset=sizes.norm_offset,
            )  # fmt: skip


def run_layers(weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int) -> None:
    """reference.run_layers. Waits for depths and query_start_loc, unless they are on the host."""
    llama, paged = Llama(weights, sizes), PagedCache.of(cache, rows.block_table)
    kind, maps, _ = move_rows(rows.depths.tolist(), rows.query_start_loc.tolist(), size=int)
    [placed] = to_device(cache.k.device, packed(maps))
    buffer_sizes = llama.buffer_sizes(paged, weights.lm_head)
    move = Move(buffer_sizes, kind, split(placed, kind.lengths()), paged.reach, paged.workspace)
    raise_rows(llama, paged, move, rows.tokens, rows.positions, stop)


@dataclass(frozen=True, eq=False)
class Leg:
    """A part of a draft's way: a move to layer ``stop`` of the model, or of an exit adapter (AdapterLayers), whose rows
    begin at depth 1 and are not kept."""

    llama: Llama
    cache: Callable[[], PagedCache]
    move: Move
    stop: int
    keep: bool = True


class DraftPass:
    """draft_pass for so many sequences, row after row: a step drafts one token of each that still drafts.

    Sequences that draft more come first, so those that still draft are the first rows. ``maps`` int32: the order of
    rows (-1: no draft is wanted), how many each sequence drafts and how many it has. tokens and positions int64: the
    next row of each. All of these change from step to step.
    """

    MAPS = 3

    def __init__(
        self, llama: Llama, cache: PagedCache, maps: Sequence[Tensor], tokens: Tensor, positions: Tensor,
        max_drafts: int, head: Tensor, head_size: int, drawing: Drawing | None = None, keep_scores: bool = False,
        columns: Tensor | None = None,
    ) -> None:  # fmt: skip
        """columns int32 [V]: where each token stands in the head's rows, for edits (None: token n is column n)."""
        self.order, self.counts, self.drafted = maps
        self.columns = columns
        self.tokens, self.positions, self.head, self.head_size = tokens, positions, head, head_size
        num_sequences, device, workspace = len(tokens), tokens.device, cache.workspace
        self.rows = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
        self.candidates = Candidates.of_head(num_sequences, head, head_size, device)
        self.drafts = torch.empty(num_sequences, max_drafts, dtype=torch.int64, device=device)
        self.chooser = drawing.chooser(num_sequences, head_size, device) if drawing else None
        logits = (num_sequences, head_size)
        self.logits = workspace.scratch.take(math.prod(logits), device).view(logits) if drawing else None
        firsts = torch.arange(0, num_sequences * max_drafts, max_drafts, dtype=torch.int32, device=device)
        self.preceding = Preceding(firsts, self.drafted, max_drafts)
        kept = (num_sequences if keep_scores else 0, max_drafts, llama.sizes.vocab_size)
        self.scores = workspace.scores.take(math.prod(kept), device).view(kept)

    def begin(self) -> None:
        self.drafts.fill_(-1)
        if len(self.scores) and self.head_size < self.scores.size(2):  # tokens outside a draft vocabulary
            self.scores.fill_(-torch.inf)

    def move(self, llama: Llama, cache: PagedCache, num_rows: int, depth: int = 0) -> Move:
        """Of the first rows, from this depth on."""
        rows, kind = self.rows[:num_rows], MoveKind(((depth, num_rows),), num_rows, 1)
        maps = self.order[:num_rows], rows, rows, self.rows[: num_rows + 1]
        return Move(llama.buffer_sizes(cache, self.head), kind, maps, cache.reach, cache.workspace)

    def step(
        self, legs: Sequence[Leg], draft_ids: Tensor | None, sampling: DraftSampling | None = None
    ) -> None:  # fmt: skip
        """The next draft of each row that wants one; the head sees what comes of the last leg."""
        llama, move = legs[0].llama, legs[-1].move
        error, candidates, order = error_of(legs[0].cache().k), self.candidates, move.order
        for leg in legs:
            raise_rows(leg.llama, leg.cache(), leg.move, self.tokens, self.positions, leg.stop, leg.keep)
        head_candidates(
            move.buffers.x, self.rows[: len(order)], self.head, self.head_size, candidates, self.logits,
            llama.sizes.logits_multiplier, llama.sizes.logits_cap,
        )  # fmt: skip
        if self.chooser is not None and self.logits is not None and sampling is not None:
            if sampling.edits is not None:
                edit_rows(
                    self.logits, order, self.rows, self.positions, self.drafts, self.preceding, sampling.edits,
                    llama.sizes.vocab_size, self.columns, position_step=1,
                )  # fmt: skip
            self.chooser.run(
                self.logits, self.logits, order, sampling, self.positions, error, position_step=1, ids=draft_ids,
                kept=self.scores if len(self.scores) else None, columns=self.drafted,
            )  # fmt: skip
            candidates = self.chooser.candidates
        take_draft(
            candidates, draft_ids, order, self.counts, self.drafted, self.drafts, self.tokens, self.positions, error
        )


class VerifyPass:
    """verify_pass of a kind: maps that are on the device (row_maps.verify_rows), and buffers."""

    def __init__(
        self, llama: Llama, cache: PagedCache, kind: VerifyKind, maps: Sequence[Tensor], drawing: Drawing | None = None
    ) -> None:
        head, vocab_size, num_judged = llama.weights.lm_head, llama.sizes.vocab_size, kind.num_judged
        sizes = llama.buffer_sizes(cache, head)
        device, of_move = sizes.device, len(kind.move.lengths())
        self.kind, self.move = kind, Move(sizes, kind.move, maps[:of_move], cache.reach, cache.workspace)
        self.judged_rows, self.rows, self.sequences, first_drafts, before, *of_sequences = maps[of_move:]
        self.ends, self.first_judged, self.num_drafts, self.judged, rejecting, draft_rows = of_sequences
        self.preceding = Preceding(first_drafts, before, kind.most_drafts)
        self.num_accepted = torch.empty(kind.move.num_sequences, dtype=torch.int64, device=device)
        self.next_tokens = torch.empty_like(self.num_accepted)
        self.candidates = Candidates.of_head(num_judged, head, vocab_size, device)
        self.targets = torch.empty(num_judged, dtype=torch.int64, device=device)
        self.chooser = drawing.chooser(num_judged, vocab_size, device) if drawing else None
        self.rejection = Rejection(rejecting, draft_rows, vocab_size) if len(rejecting) else None
        both = 2 if drawing else 1, num_judged, vocab_size  # the logits, and the scores that tokens are drawn from
        memory = cache.workspace.scratch.take(math.prod(both), device).view(both)
        self.logits, self.scores = memory[0], memory[-1]

    def run(
        self, llama: Llama, cache: PagedCache, tokens: Tensor, positions: Tensor,
        sampling: DraftSampling | None = None, chosen_positions: Tensor | None = None,
        draft_scores: Tensor | None = None, edits: LogitEdits | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        raise_rows(llama, cache, self.move, tokens, positions, len(llama.weights.layers))
        if len(self.judged_rows):  # chunks of prompts alone need no token
            head_candidates(
                self.move.buffers.x, self.judged_rows, llama.weights.lm_head, llama.sizes.vocab_size, self.candidates,
                self.logits, llama.sizes.logits_multiplier, llama.sizes.logits_cap,
            )  # fmt: skip
        candidates: Candidates | None = self.candidates
        if sampling is not None and chosen_positions is not None and len(self.judged_rows):
            self._draw(tokens, sampling, chosen_positions, draft_scores, edits, error_of(cache.k))
            candidates = None
        accept_candidates(
            tokens=tokens, ends=self.ends, first_judged=self.first_judged, num_drafts=self.num_drafts,
            judged=self.judged, candidates=candidates, targets=self.targets, num_accepted=self.num_accepted,
            next_tokens=self.next_tokens, error=error_of(cache.k), most_drafts=self.kind.most_drafts,
        )  # fmt: skip
        return self.num_accepted, self.next_tokens, self.logits

    def _draw(
        self, tokens: Tensor, sampling: DraftSampling, positions: Tensor, draft_scores: Tensor | None,
        edits: LogitEdits | None, error: Tensor,
    ) -> None:  # fmt: skip
        """The targets, drawn from the logits; those that judge a draft by the rejection rule, by it."""
        chooser, rejection = self.chooser, self.rejection
        assert chooser is not None
        kept, logits = self.scores.view(len(self.scores), 1, -1) if rejection is not None else None, self.logits
        if edits is not None:
            logits = self.scores.copy_(self.logits)  # which are the model's own to those who ask for them
            edit_rows(
                logits, self.sequences, self.rows, positions, tokens, self.preceding, edits, logits.size(1)
            )  # fmt: skip
        chooser.run(logits, self.scores, self.rows, sampling, positions, error, kept=kept)
        take_targets(chooser.candidates, self.rows, self.targets, error)
        if rejection is not None and draft_scores is not None:
            rejection.run(
                draft_scores, self.scores, chooser.maxima, tokens, positions, sampling.seeds, sampling.samples,
                self.targets, error,
            )  # fmt: skip


def head_of(weights: ModelWeights, sizes: ModelSizes, head: DraftHead | None) -> tuple[Tensor, int, Tensor | None]:
    """The head that drafts: its packed weight, its number of columns, the token ids they stand for (None: all)."""
    return (weights.lm_head, sizes.vocab_size, None) if head is None else (head.weight, len(head.ids), head.ids)
