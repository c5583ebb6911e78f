"""The nouns of decoding: a sequence in a cache, a draft of what may follow it, the verdict of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["CachedSequence", "Draft", "Verdict"]


@dataclass(eq=False)
class CachedSequence:
    """One text in a cache.

    ``tokens`` is everything known: the prompt and what was generated. The cache holds K and V of a prefix of it,
    after prefill of all tokens but the last.
    """

    id: int
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """Guessed continuations: tokens int64 [B, max_drafts] (-1 beyond a sequence's own), num_tokens int64 [B].

    Where a backend's passes leave their results on a device, the tokens are there; num_tokens is on the host.

    ``num_waiting``, for each sequence: known tokens at its end that wait for a later step, 0 except for a chunk of a
    prompt. Verification brings the known tokens before them into the cache. A sequence with waiting tokens drafts
    nothing and is not ``judged``: nothing can be said yet about what follows.

    ``scores``: what the drafts of sampled sequences were drawn from, fp32 [num_tokens[b], V] by the sequence's
    index b; the rejection rule needs it. ``confidences``: the exit's greatest probability at each draft, by b, where
    the backend says it.
    """

    sequences: tuple[CachedSequence, ...]
    tokens: Tensor
    num_tokens: Tensor
    num_waiting: tuple[int, ...]
    scores: Mapping[int, Tensor] = field(default_factory=dict)
    confidences: Mapping[int, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def none(cls, sequences: Sequence[CachedSequence]) -> Draft:
        """An empty draft: verifying it is plain decoding."""
        num_sequences = len(sequences)
        empty = torch.empty(num_sequences, 0, dtype=torch.int64)
        return cls(tuple(sequences), empty, torch.zeros(num_sequences, dtype=torch.int64), (0,) * num_sequences)

    @classmethod
    def of_tokens(cls, sequences: Sequence[CachedSequence], drafts: Sequence[Sequence[int]]) -> Draft:
        """Drafts that come from elsewhere, a list of tokens for each sequence; they count as certain."""
        counts = torch.tensor([len(tokens) for tokens in drafts], dtype=torch.int64)
        tokens = torch.full((len(sequences), max(map(len, drafts))), -1)
        for b, drafted in enumerate(drafts):
            tokens[b, : len(drafted)] = torch.tensor(drafted, dtype=torch.int64)
        return cls(tuple(sequences), tokens, counts, (0,) * len(sequences))

    @classmethod
    def joined(
        cls, sequences: Sequence[CachedSequence], parts: Sequence[Draft], num_waiting: Sequence[int] | None = None
    ) -> Draft:
        """One draft of ``sequences``: their drafts out of ``parts``, none for the others. ``num_waiting``: None: 0.

        The tokens stay where the parts have theirs: reading them on the host would wait for the device.
        """
        counts = [0] * len(sequences)
        waiting = (0,) * len(sequences) if num_waiting is None else tuple(num_waiting)
        if not parts:
            return replace(cls.none(sequences), num_waiting=waiting)
        if len(parts) == 1 and [*map(id, parts[0].sequences)] == [*map(id, sequences)]:
            return replace(parts[0], num_waiting=waiting)
        width = max(part.tokens.size(1) for part in parts)
        tokens = torch.full((len(sequences), width), -1, device=parts[0].tokens.device)
        row_of = {id(sequence): b for b, sequence in enumerate(sequences)}
        for part in parts:
            for sequence, drafted, count in zip(part.sequences, part.tokens, part.counts, strict=True):
                tokens[row_of[id(sequence)], : len(drafted)] = drafted
                counts[row_of[id(sequence)]] = count
        scores = {row_of[id(part.sequences[b])]: kept for part in parts for b, kept in part.scores.items()}
        confidences = {row_of[id(part.sequences[b])]: kept for part in parts for b, kept in part.confidences.items()}
        return cls(tuple(sequences), tokens, torch.tensor(counts, dtype=torch.int64), waiting, scores, confidences)

    @cached_property
    def judged(self) -> Tensor:
        """Of which sequences verification says what follows, bool [B]: those with no known tokens left to wait."""
        return torch.tensor([waiting == 0 for waiting in self.num_waiting])

    @cached_property
    def counts(self) -> list[int]:
        """num_tokens, read out of its tensor once."""
        return self.num_tokens.tolist()

    @cached_property
    def logit_rows(self) -> list[int]:
        """Where each sequence's rows begin among a verification's logits, and last where they all end: B + 1."""
        counts = zip(self.counts, self.num_waiting, strict=True)
        return [0, *accumulate(0 if waiting else count + 1 for count, waiting in counts)]

    def of(self, b: int) -> list[int]:
        """The drafted tokens of sequence ``b``."""
        return list(self._lists[b])

    @cached_property
    def _lists(self) -> list[list[int]]:
        """All sequences' drafts, read out of the tensors once: a read of each element alone takes a microsecond."""
        return [row[:count] for row, count in zip(self.tokens.tolist(), self.counts, strict=True)]

    def scores_of(self, b: int, vocab_size: int) -> Tensor:
        """The scores that sequence ``b``'s drafts were drawn from; a draft of unknown origin was certain."""
        if b in self.scores:
            return self.scores[b]
        scores = torch.full((self.counts[b], vocab_size), -torch.inf, device=self.tokens.device)
        return scores.scatter_(1, self.tokens[b, : len(scores), None], 0.0)


@dataclass(frozen=True)
class Verdict:
    """What the full model made of a draft.

    num_accepted int64 [B]: drafts that agree; next_tokens int64 [B]: the token after them; logits fp32
    [sum(num_tokens + 1), V]: for each judged sequence, of the row before each draft and of the last draft. A sequence
    that is not judged (``Draft.judged``) gains nothing; its count is 0 and its next token has no meaning.
    """

    draft: Draft
    num_accepted: Tensor
    next_tokens: Tensor
    logits: Tensor

    def new_tokens(self, b: int) -> list[int]:
        """What sequence ``b`` gains: its accepted drafts and one token more."""
        if self.draft.num_waiting[b]:
            return []
        return [*self.draft.of(b)[: self.accepted[b]], self._next[b]]

    def new_logits(self, b: int) -> Tensor:
        """The logits [num_accepted + 1, V] that new_tokens were chosen by."""
        first = self.draft.logit_rows[b]
        return self.logits[first : first + len(self.new_tokens(b))]

    @cached_property
    def accepted(self) -> list[int]:
        """num_accepted, read out of its tensor once."""
        return self.num_accepted.tolist()

    @cached_property
    def _next(self) -> list[int]:
        return self.next_tokens.tolist()
