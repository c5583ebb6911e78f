"""The groups of tensors and sizes that ops take: a model's weights, its sizes, a cache, and the rows of a step.

B sequences, T rows, L layers, D hidden, F ffn, H query heads, G KV heads, K head dim, R of it rotated, V vocab, P
pages, S positions per page. Linear weights and the embedding have the model's dtype, or are quantised
(reference/blocks.py), and have the layout of the backend they were packed for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AdapterLayers", "CacheTensors", "Cycle", "DraftHead", "DraftRows", "DraftSampling", "DraftStops", "Drafted",
    "JudgeSampling", "LayerWeights", "LogitEdits",
    "ModelSizes", "ModelWeights", "PendingRows",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; what the model does not have is None. A layer without attention has empty matrices there.

    A norm stands before what it is named after, a ``post_norm`` between that and the residual sum. ``q_norm`` and
    ``k_norm`` hold one head's weights, or those of all heads, which are then normed as one.
    """

    attn_norm: Tensor | None  # [D]
    wq: Tensor  # packed [H*K, D]
    wk: Tensor  # packed [G*K, D]
    wv: Tensor  # packed [G*K, D]
    qkv_bias: Tensor | None  # [(H + 2G)*K]
    wo: Tensor  # packed [D, H*K]
    out_bias: Tensor | None  # [D]
    mlp_norm: Tensor | None  # [D]
    w_gate: Tensor  # packed [F, D]
    w_up: Tensor  # packed [F, D]
    w_down: Tensor  # packed [D, F]
    q_norm: Tensor | None = None  # [K] or [H*K]
    k_norm: Tensor | None = None  # [K] or [G*K]
    attn_post_norm: Tensor | None = None  # [D]
    mlp_post_norm: Tensor | None = None  # [D]
    gate_up_bias: Tensor | None = None  # [2 F]
    down_bias: Tensor | None = None  # [D]

    @property
    def attends(self) -> bool:
        """Whether it has attention, so K and V; else it is its MLP alone."""
        return self.wq.numel() > 0

    @property
    def first_norm(self) -> Tensor | None:
        """The norm that a row passes first."""
        return self.attn_norm if self.attends else self.mlp_norm

    @property
    def tensors(self) -> list[Tensor]:
        """Those that the model has."""
        return [tensor for field in fields(self) if (tensor := getattr(self, field.name)) is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(eq=False)
class ModelWeights:
    """All weights of a model. ``embedding`` and ``lm_head`` may be one tensor."""

    embedding: Tensor  # packed [V, D]
    final_norm: Tensor  # [D]
    lm_head: Tensor  # packed [V, D]
    cos: Tensor  # fp32 [ropes, positions, R / 2]: of each kind of RoPE, for as many as a cache of the model can hold
    sin: Tensor
    layers: tuple[LayerWeights, ...]

    @cached_property
    def flat(self) -> list[Tensor]:
        """One list, made once: how the schemas in csrc/bindings.cpp take them, an absent tensor being an empty one.

        The order is that of the fields; csrc/cpu/operands.cpp reads it.
        """
        absent = self.final_norm.new_empty(0)
        layers = [getattr(layer, field.name) for layer in self.layers for field in fields(LayerWeights)]
        outer = [self.embedding, self.final_norm, self.lm_head, self.cos, self.sin]
        return outer + [absent if tensor is None else tensor for tensor in layers]

    def rope(self, table: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """cos and sin [positions, R / 2] of one kind of RoPE; -1: of none."""
        return (None, None) if table < 0 else (self.cos[table], self.sin[table])

    def replace_tables(self, cos: Tensor, sin: Tensor) -> None:
        """Take longer RoPE tables; holders of the old ones may keep using them."""
        self.cos, self.sin = cos, sin
        self.flat[3:5] = [cos, sin]  # at once: another thread may be reading the list


@dataclass(frozen=True)
class ModelSizes:
    """What the shapes of packed weights do not say: sizes, and the switches of ModelConfig as the ops take them.

    ``scale``: what attention scores are multiplied by; ``windows`` and ``ropes``: one for each layer, a window of 0
    being none, and a rope the number of its table, -1 none. Caps of 0 are none.
    """

    num_heads: int
    intermediate_size: int
    vocab_size: int
    eps: float
    scale: float
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    gelu: bool = False
    norm_offset: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    score_cap: float = 0.0
    logits_cap: float = 0.0

    @cached_property
    def ints(self) -> list[int]:
        """The integers, as the schemas in csrc/bindings.cpp take them; csrc/cpu/operands.cpp reads them."""
        return [self.num_heads, self.intermediate_size, self.vocab_size, int(self.gelu), *self.windows, *self.ropes]

    @cached_property
    def floats(self) -> list[float]:
        """The other numbers, in the order that csrc/cpu/operands.cpp reads."""
        multipliers = [self.embedding_multiplier, self.residual_multiplier, self.logits_multiplier]
        return [self.eps, self.norm_offset, self.scale, *multipliers, self.score_cap, self.logits_cap]

    @property
    def head(self) -> tuple[float, float, float, float]:
        """What norm_head_argmax takes after the number of columns."""
        return self.eps, self.norm_offset, self.logits_multiplier, self.logits_cap


class CacheTensors(NamedTuple):
    """Pages of K, V and hidden states. ``hidden`` keeps, for each pending position, its hidden state at its depth."""

    k: Tensor  # [L, P, G, K, S]: transposed, so that a page is a tile of positions
    v: Tensor  # [L, P, G, S, K]
    hidden: Tensor  # [P, S, D]


class AdapterLayers(NamedTuple):
    """The A + 1 layers of an exit adapter as run_layers takes them, and their pages in the cache.

    The first stands for the ``exit_layer`` layers that a row has passed. It is never run: rows start at depth 1. An
    adapter without attention has pages of that one alone. Passes take those that their rows pass, in the order of their
    exits, no two of one.
    """

    weights: ModelWeights
    sizes: ModelSizes
    cache: CacheTensors
    exit_layer: int

    @property
    def depth(self) -> int:
        """That of a row which has passed them."""
        return len(self.weights.layers)


@dataclass(frozen=True, eq=False)
class PendingRows:
    """Rows of B sequences: those of sequence b are query_start_loc[b] .. query_start_loc[b + 1].

    Depths never rise within a sequence.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    depths: Tensor  # int32 [T]: layers passed so far
    query_start_loc: Tensor  # int32 [B + 1]
    block_table: Tensor  # int32 [B, max_blocks]: the pages of each sequence

    def below(self, depth: int) -> PendingRows | None:
        """Those of a lower depth, of the same sequences; None: there are none. ``depths`` must be on the host."""
        chosen = self.depths < depth
        if not chosen.any():
            return None
        starts = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))[self.query_start_loc.long()].int()
        there = chosen.nonzero()[:, 0].to(self.tokens.device, non_blocking=True)
        return PendingRows(self.tokens[there], self.positions[there], self.depths[chosen], starts, self.block_table)

    def raised_to(self, depth: int) -> PendingRows:
        """The same, once those of a lower depth have come to it."""
        return replace(self, depths=self.depths.clamp(min=depth))


@dataclass(frozen=True, eq=False)
class DraftRows:
    """Each sequence's last known token, not yet in the cache, its position, and how many tokens to draft after it."""

    tokens: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]
    num_drafts: Tensor  # int64 [B]
    block_table: Tensor  # int32 [B, max_blocks]


@dataclass(frozen=True, eq=False)
class DraftHead:
    """Rows of the LM head: the tokens of a draft vocabulary of N tokens, which are all that a draft can be."""

    weight: Tensor  # packed [N, D]
    ids: Tensor  # int64 [N], ascending: the token that each row stands for


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """Bias, penalties and a least length of B sequences: what edit_logits does to their logits before all else.

    Of each sequence up to E tokens are listed, each once: those with a bias, those that the penalties are for, those
    that end its text. A penalty of 1 (repetitions) or 0 (the others) is none.
    """

    repetitions: Tensor  # fp32 [B]: of tokens in the prompt or generated
    frequencies: Tensor  # fp32 [B]: of tokens generated, for each time
    presences: Tensor  # fp32 [B]: of tokens generated
    least_positions: Tensor  # int64 [B]: no token before that position may end the text
    ids: Tensor  # int64 [B, E], -1 beyond a sequence's own
    biases: Tensor  # fp32 [B, E]; -0.0, which leaves every number as it is: none
    counts: Tensor  # int64 [B, E]: times generated; -1: not in the prompt either
    ends: Tensor  # bool [B, E]: whether the token ends the text

    @property
    def flat(self) -> list[Tensor]:
        """As the schemas in csrc/bindings.cpp take them; csrc/cpu/edits.cpp reads them."""
        return [getattr(self, field.name) for field in fields(self)]

    def changes(self, b: int) -> bool:
        """Whether sequence ``b`` has any, so that its greatest logit may be another one."""
        neutral = self.repetitions[b] == 1 and self.frequencies[b] == 0 and self.presences[b] == 0
        return not neutral or bool((self.ids[b] >= 0).any())


@dataclass(frozen=True, eq=False)
class DraftSampling:
    """How the drafts of B sequences are drawn: edit_logits, filter_logits, then gumbel_argmax at the draft's position.

    A sequence of temperature 0 takes the greatest of its exit's logits, edited.
    """

    temperatures: Tensor  # fp32 [B]
    top_ks: Tensor  # int64 [B]
    top_ps: Tensor  # fp64 [B]
    min_ps: Tensor  # fp32 [B]
    seeds: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]
    edits: LogitEdits | None = None

    @property
    def flat(self) -> list[Tensor]:
        """As the schema in csrc/bindings.cpp takes them: 6 tensors, and those of the edits."""
        own = [self.temperatures, self.top_ks, self.top_ps, self.min_ps, self.seeds, self.samples]
        return own + (self.edits.flat if self.edits else [])

    @classmethod
    def of_flat(cls, flat: list[Tensor]) -> DraftSampling:
        temperatures, top_ks, top_ps, min_ps, seeds, samples, *edits = flat
        return cls(temperatures, top_ks, top_ps, min_ps, seeds, samples, LogitEdits(*edits) if edits else None)

    def changes(self, b: int) -> bool:
        """Whether sequence ``b`` may take another token than the greatest of its exit's logits."""
        return bool(self.temperatures[b] != 0) or (self.edits is not None and self.edits.changes(b))


@dataclass(frozen=True, eq=False)
class JudgeSampling:
    """How the tokens after J judged rows are chosen: drawn, as drafts are, each row with its own settings.

    Drafts of ``rejecting`` sequences are judged by the rejection rule: ``draft_scores`` are what they were drawn from,
    sequence by sequence. ``edits`` are the sequences', their drafts not being counted.
    """

    draws: DraftSampling  # of J rows, without edits
    positions: Tensor  # int64 [J]: of the tokens to be chosen
    rejecting: tuple[bool, ...]  # B
    draft_scores: Tensor  # fp32 [R, V]: of the drafts of rejecting sequences
    edits: LogitEdits | None = None  # of B sequences


@dataclass(frozen=True, eq=False)
class DraftStops:
    """Where a sequence stops to draft before it has all its drafts: an expectation has become too small.

    ``expected``, 1 at first, is multiplied in fp32 by ``acceptance[b, n]`` with every draft, n being the number of
    ``edges`` that its confidence reaches; after draft i the sequence goes on if it is at least ``least[b, i]``.
    """

    edges: Tensor  # fp32 [K], ascending
    acceptance: Tensor  # fp32 [B, K + 1]: the probability that a draft of such confidence is accepted
    least: Tensor  # fp32 [B, max_drafts]

    @property
    def flat(self) -> list[Tensor]:
        """As the schema in csrc/bindings.cpp takes them."""
        return [self.edges, self.acceptance, self.least]


class Drafted(NamedTuple):
    """What a draft_pass made, for B sequences."""

    tokens: Tensor  # int64 [B, max_drafts], -1 beyond a sequence's own
    counts: Tensor  # int64 [B]: how many each drafted
    confidences: Tensor  # fp32 [B, max_drafts]: the exit's greatest probability at each draft, 0 beyond them
    scores: Tensor  # fp32 [B, max_drafts, V]: what sampled drafts were drawn from; [0, max_drafts, V] if not kept

    @classmethod
    def none(cls, num_sequences: int) -> Drafted:
        """No drafts."""
        empty = torch.empty(num_sequences, 0)
        return cls(empty.long(), torch.zeros(num_sequences, dtype=torch.int64), empty, empty[:0, :, None])


class Cycle(NamedTuple):
    """What one cycle of a decode_pass made of B sequences: drafts as in Drafted, what was accepted of them, the token
    after those, and the seconds of both passes."""

    drafts: Tensor  # int64 [B, max_drafts]
    num_drafted: Tensor  # int64 [B]
    confidences: Tensor  # fp32 [B, max_drafts]
    num_accepted: Tensor  # int64 [B]
    next_tokens: Tensor  # int64 [B]
    draft_seconds: float
    verify_seconds: float
