"""run_layers, draft_pass, verify_pass: the fused kernels in order, with no wait for the device between them.

Launches: at most six a layer (qkv, attention and its merge, output projection, gate and up, down projection), and
besides: one for each depth at which rows join, the LM head, and the choice of a draft or the acceptance of drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip_kernels.operands import (
    CacheTensors,
    DraftHead,
    DraftRows,
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
from .paged_attention import ScratchMemory, attend
from .rejection_sample import Rejection
from .sampling import Drawing
from .transfer import to_device
from .workspace import BufferSizes, Move, int32

__all__ = ["draft_pass", "run_layers", "verify_pass"]


@dataclass(frozen=True, eq=False)
class PagedCache:
    """A cache's tensors (CacheTensors) and each sequence's pages int32 [B, max_blocks]."""

    k: Tensor
    v: Tensor
    hidden: Tensor
    block_table: Tensor
    scratch: ScratchMemory = field(default_factory=ScratchMemory)  # of attention, for one step at a time

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
    llama: Llama, cache: PagedCache, move: Move, tokens: Tensor, positions: Tensor, stop: int, position_step: int = 0,
    keep: bool = True,
) -> None:  # fmt: skip
    """The one move of the staircase. Leaves the rows' final norms in move.x, and their hidden states in the cache."""
    error = error_of(cache.k)
    move.arrivals.zero_()  # a launch that was aborted may have left some
    weights, sizes = llama.weights, llama.sizes
    joined = 0
    for level, until in zip(move.levels, [*(le.depth for le in move.levels[1:]), stop], strict=True):
        first_norm = weights.final_norm if level.depth == stop else weights.layers[level.depth].first_norm
        join_rows(
            tokens=tokens, positions=positions, order=move.order, sequence_of_row=move.sequence_of_row,
            block_table=cache.block_table, embedding=weights.embedding, hidden_cache=cache.hidden,
            norm_weight=first_norm, row_positions=move.positions, slots=move.slots, hidden=move.hidden, x=move.x,
            error=error, first_row=joined, num_rows=level.num_rows - joined, vocab_size=sizes.vocab_size,
            max_positions=weights.cos.size(1), from_embedding=level.depth == 0,
            position_step=position_step, multiplier=sizes.embedding_multiplier,
            eps=sizes.eps, norm_offset=sizes.norm_offset,
        )  # fmt: skip
        joined = level.num_rows
        for layer in range(level.depth, until):
            w = weights.layers[layer]
            if w.attends:
                k_pages, v_pages = cache.k[layer], cache.v[layer]
                cos, sin = weights.rope(sizes.ropes[layer])
                qkv_rope_append(
                    x=move.x, wq=w.wq, wk=w.wk, wv=w.wv, qkv_bias=w.qkv_bias, cos=cos, sin=sin,
                    positions=move.positions, slots=move.slots, q=move.q, k_pages=k_pages, v_pages=v_pages,
                    num_rows=joined, q_norm=w.q_norm, k_norm=w.k_norm, raw_k=move.k, eps=sizes.eps,
                    norm_offset=sizes.norm_offset,
                )  # fmt: skip
                attend(
                    q=move.q, k_pages=k_pages, v_pages=v_pages, block_table=cache.block_table, rows=level.rows,
                    starts=level.starts, positions=move.positions, scale=sizes.scale, scratch=move.scratch,
                    out=move.attention.numbers, window=sizes.windows[layer], cap=sizes.score_cap,
                )  # fmt: skip
                linear_residual(
                    x=move.attention, weight=w.wo, bias=w.out_bias, hidden=move.hidden, num_rows=joined,
                    arrivals=move.arrivals, next_norm=w.mlp_norm, next_x=move.x, post_norm=w.attn_post_norm,
                    projected=move.projected, multiplier=sizes.residual_multiplier,
                    eps=sizes.eps, norm_offset=sizes.norm_offset,
                )  # fmt: skip
            gate_up_act(
                x=move.x, w_gate=w.w_gate, w_up=w.w_up, hidden=move.hidden, activation=move.activation,
                intermediate_size=sizes.intermediate_size, num_rows=joined, gate_up_bias=w.gate_up_bias,
                use_gelu=sizes.gelu,
            )  # fmt: skip
            last = layer + 1 == stop
            kept = last and keep
            linear_residual(
                x=move.activation, weight=w.w_down, bias=w.down_bias, hidden=move.hidden, num_rows=joined,
                arrivals=move.arrivals, next_norm=weights.final_norm if last else weights.layers[layer + 1].first_norm,
                next_x=move.x, slots=move.slots if kept else None, hidden_cache=cache.hidden if kept else None,
                post_norm=w.mlp_post_norm, projected=move.projected, multiplier=sizes.residual_multiplier,
                eps=sizes.eps, norm_offset=sizes.norm_offset,
            )  # fmt: skip


def run_layers(weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int) -> None:
    """reference.run_layers. Waits for depths and query_start_loc, unless they are on the host."""
    llama, paged = Llama(weights, sizes), PagedCache.of(cache, rows.block_table)
    move = Move(
        llama.buffer_sizes(paged, weights.lm_head), rows.depths.tolist(), rows.query_start_loc.tolist(), paged.reach,
        paged.scratch,
    )  # fmt: skip
    raise_rows(llama, paged, move, rows.tokens, rows.positions, stop)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An exit adapter's layers with their pages (AdapterLayers); rows at the exit are at depth 1."""

    llama: Llama
    cache: PagedCache


class DraftPass:
    """draft_pass for certain draft counts: buffers, and for each draft a Move to the exit and one through an adapter
    that has layers."""

    def __init__(
        self, llama: Llama, cache: PagedCache, num_drafts: list[int], max_drafts: int, head: Tensor, head_size: int,
        drawing: Drawing | None = None, keep_scores: bool = False, adapter: Adapter | None = None,
        columns: Tensor | None = None,
    ) -> None:  # fmt: skip
        """columns int32 [V]: where each token stands in the head's rows, for edits (None: token n is column n)."""
        sizes = llama.buffer_sizes(cache, head)
        adapter_sizes = adapter.llama.buffer_sizes(adapter.cache, head) if adapter else sizes
        self.moves: list[tuple[Move, Move | None]] = []
        for i in range(max(num_drafts, default=0)):
            rows = [int(count > i) for count in num_drafts]
            starts = [sum(rows[:b]) for b in range(len(rows) + 1)]
            to_exit = Move(sizes, [0] * sum(rows), starts, cache.reach, cache.scratch)
            onward = Move(adapter_sizes, [1] * sum(rows), starts, cache.reach, cache.scratch) if adapter else None
            for move in (to_exit, onward or to_exit):
                # Tokens and positions are given by sequence, whether it still drafts or not.
                move.order.copy_(move.sequence_of_row)
            self.moves.append((to_exit, onward))
        self.rows = torch.arange(len(num_drafts), dtype=torch.int32, device=sizes.device)
        self.candidates = Candidates.of_head(len(num_drafts), head, head_size, sizes.device)
        self.tokens = torch.zeros(len(num_drafts), dtype=torch.int64, device=sizes.device)
        self.drafts = torch.full((len(num_drafts), max_drafts), -1, dtype=torch.int64, device=sizes.device)
        self.chooser = drawing.chooser(len(num_drafts), head_size, sizes.device) if drawing else None
        self.logits = torch.empty(len(num_drafts), head_size, device=sizes.device) if drawing else None
        self.columns, count = columns, len(num_drafts)
        firsts = torch.arange(0, count * max_drafts, max_drafts, dtype=torch.int32, device=sizes.device)
        self.preceding = [
            Preceding(firsts, torch.full((count,), i, dtype=torch.int32, device=sizes.device), i)
            for i in range(len(self.moves) if drawing and drawing.edits else 0)
        ]
        kept = len(num_drafts) if keep_scores else 0
        # Tokens outside a draft vocabulary are never written.
        self.scores = torch.full((kept, max_drafts, llama.sizes.vocab_size), -torch.inf, device=sizes.device)

    def run(
        self, llama: Llama, cache: PagedCache, tokens: Tensor, positions: Tensor, head: Tensor, head_size: int,
        draft_ids: Tensor | None, exit_layer: int, sampling: DraftSampling | None = None,
        adapter: Adapter | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The drafts, and the scores that they were drawn from, if these are kept."""
        error = error_of(cache.k)
        self.tokens.copy_(tokens)
        for i, (move, onward) in enumerate(self.moves):
            raise_rows(llama, cache, move, self.tokens, positions, exit_layer, position_step=i)
            if adapter is not None and onward is not None:  # the kept hidden states stay the exit's
                depth, move = len(adapter.llama.weights.layers), onward
                raise_rows(adapter.llama, adapter.cache, move, self.tokens, positions, depth, i, keep=False)
            head_candidates(
                move.x, self.rows[: move.num_rows], head, head_size, self.candidates, self.logits,
                llama.sizes.logits_multiplier, llama.sizes.logits_cap,
            )  # fmt: skip
            candidates = self.candidates
            if self.chooser is not None and self.logits is not None and sampling is not None:
                if sampling.edits is not None:
                    edit_rows(
                        self.logits, move.sequence_of_row, move.sequence_of_row, positions, self.drafts,
                        self.preceding[i], sampling.edits, llama.sizes.vocab_size, self.columns, position_step=i + 1,
                    )  # fmt: skip
                self.chooser.run(
                    self.logits, self.logits, move.sequence_of_row, sampling, positions, error, position_step=i + 1,
                    ids=draft_ids, kept=self.scores if len(self.scores) else None, kept_row=i,
                )  # fmt: skip
                candidates = self.chooser.candidates
            take_draft(candidates, draft_ids, move.sequence_of_row, self.drafts, i, self.tokens, error)
        return self.drafts, self.scores


class VerifyPass:
    """verify_pass for certain depths, rows, draft counts, judged sequences and, of these, rejecting ones."""

    def __init__(
        self, llama: Llama, cache: PagedCache, depths: list[int], starts: list[int], num_drafts: list[int],
        judged: list[bool], drawing: Drawing | None = None, rejecting: tuple[bool, ...] = (),
    ) -> None:  # fmt: skip
        head = llama.weights.lm_head
        sizes = llama.buffer_sizes(cache, head)
        device = sizes.device
        self.move = Move(sizes, depths, starts, cache.reach, cache.scratch)
        judged_rows: list[int] = []
        first_judged: list[int] = []
        rejecting_rows: list[int] = []  # among the judged
        draft_places: list[int] = []  # among the tokens
        judged_of: list[tuple[int, int, int]] = []  # the sequence, where its drafts begin, how many are before the row
        for b, drafts in enumerate(num_drafts):
            first_judged.append(len(judged_rows))
            if judged[b] and any(rejecting[b : b + 1]):
                rejecting_rows += range(len(judged_rows), len(judged_rows) + drafts)
                draft_places += range(starts[b + 1] - drafts, starts[b + 1])
            if judged[b]:
                rows = range(starts[b + 1] - drafts - 1, starts[b + 1])
                judged_rows += [self.move.place[given] for given in rows]
                judged_of += [(b, starts[b + 1] - drafts, i) for i in range(drafts + 1)]
        self.judged_rows, self.first_judged, self.ends, self.num_drafts, self.judged, *of_drawing = to_device(
            device, int32(judged_rows), int32(first_judged), int32(starts[1:]),
            torch.tensor(num_drafts, dtype=torch.int64), torch.tensor(judged, dtype=torch.bool),
            int32(list(range(len(judged_rows)))), int32(rejecting_rows), int32(draft_places),
            *(int32(list(column)) for column in zip(*judged_of, strict=True)),
        )  # fmt: skip
        self.num_accepted, self.next_tokens = torch.empty_like(self.num_drafts), torch.empty_like(self.num_drafts)
        self.most_drafts = max(num_drafts, default=0)
        vocab_size = llama.sizes.vocab_size
        self.candidates = Candidates.of_head(len(judged_rows), head, vocab_size, device)
        self.targets = torch.empty(len(judged_rows), dtype=torch.int64, device=device)
        self.logits = torch.empty(len(judged_rows), vocab_size, device=device)
        self.chooser = drawing.chooser(len(judged_rows), vocab_size, device) if drawing else None
        self.rows, rejecting_row, draft_place, *of_judged = of_drawing
        self.edited = None if not of_judged else (of_judged[0], Preceding(of_judged[1], of_judged[2], self.most_drafts))
        self.rejection = Rejection(rejecting_row, draft_place, vocab_size) if rejecting_rows else None
        self.scores = torch.empty_like(self.logits if drawing else self.logits[:0])

    def run(
        self, llama: Llama, cache: PagedCache, tokens: Tensor, positions: Tensor,
        sampling: DraftSampling | None = None, chosen_positions: Tensor | None = None,
        draft_scores: Tensor | None = None, edits: LogitEdits | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        raise_rows(llama, cache, self.move, tokens, positions, len(llama.weights.layers))
        if len(self.judged_rows):  # chunks of prompts alone need no token
            head_candidates(
                self.move.x, self.judged_rows, llama.weights.lm_head, llama.sizes.vocab_size, self.candidates,
                self.logits, llama.sizes.logits_multiplier, llama.sizes.logits_cap,
            )  # fmt: skip
        candidates: Candidates | None = self.candidates
        if sampling is not None and chosen_positions is not None and len(self.judged_rows):
            self._draw(tokens, sampling, chosen_positions, draft_scores, edits, error_of(cache.k))
            candidates = None
        accept_candidates(
            tokens=tokens, ends=self.ends, first_judged=self.first_judged, num_drafts=self.num_drafts,
            judged=self.judged, candidates=candidates, targets=self.targets, num_accepted=self.num_accepted,
            next_tokens=self.next_tokens, error=error_of(cache.k), most_drafts=self.most_drafts,
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
        if edits is not None and self.edited is not None:
            sequences, preceding = self.edited
            logits = self.scores.copy_(self.logits)  # which are the model's own to those who ask for them
            edit_rows(logits, sequences, self.rows, positions, tokens, preceding, edits, logits.size(1))
        chooser.run(logits, self.scores, self.rows, sampling, positions, error, kept=kept)
        take_targets(chooser.candidates, self.rows, self.targets, error)
        if rejection is not None and draft_scores is not None:
            rejection.run(
                draft_scores, self.scores, chooser.maxima, tokens, positions, sampling.seeds, sampling.samples,
                self.targets, error,
            )  # fmt: skip


def draft_pass(
    weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: DraftRows, head: DraftHead | None,
    exit_layer: int, max_drafts: int,
) -> Tensor:  # fmt: skip
    """reference.draft_pass. Waits for num_drafts, unless it is on the host; errors are noted (error_of)."""
    llama, paged = Llama(weights, sizes), PagedCache.of(cache, rows.block_table)
    weight, size, ids = head_of(weights, sizes, head)
    draft = DraftPass(llama, paged, rows.num_drafts.tolist(), max_drafts, weight, size)
    return draft.run(llama, paged, rows.tokens, rows.positions, weight, size, ids, exit_layer)[0]


def head_of(weights: ModelWeights, sizes: ModelSizes, head: DraftHead | None) -> tuple[Tensor, int, Tensor | None]:
    """The head that drafts: its packed weight, its number of columns, the token ids they stand for (None: all)."""
    return (weights.lm_head, sizes.vocab_size, None) if head is None else (head.weight, len(head.ids), head.ids)


def verify_pass(
    weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, num_drafts: Tensor,
    judged: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """reference.verify_pass. Waits for depths, query_start_loc, num_drafts and judged, unless they are on the host."""
    llama, paged = Llama(weights, sizes), PagedCache.of(cache, rows.block_table)
    verify = VerifyPass(
        llama, paged, rows.depths.tolist(), rows.query_start_loc.tolist(), num_drafts.tolist(), judged.tolist()
    )  # fmt: skip
    return verify.run(llama, paged, rows.tokens, rows.positions)
