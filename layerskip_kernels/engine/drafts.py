"""What a sequence may draft, and what it drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerskip_kernels.engine.acceptance import BUCKETS, EDGES, DraftHistory, Floats
from layerskip_kernels.operands import DraftStops

__all__ = ["NO_DRAFTS", "DraftRequest", "Drafts"]


@dataclass
class DraftRequest:
    """What a decoding sequence may draft.

    ``exits``: the exit layers it may draft with, the first until more is known; ``most``: how many tokens at
    most before a verification, ``max_drafts`` this time; ``history``: how its drafts have fared; ``stops``: whether
    drafting can stop by confidence; ``drawn``: whether drafts are drawn with noise.
    """

    exits: tuple[int, ...]
    most: int
    max_drafts: int
    history: DraftHistory
    stops: bool = True
    drawn: bool = False


@dataclass(frozen=True)
class Drafts:
    """What a sequence drafts with an exit layer: ``count`` tokens, fewer where a rule stops it (DraftStops)."""

    exit_layer: int
    count: int
    acceptance: Floats | None = None  # [K + 1]; None: nothing stops it
    least: Floats | None = None  # [D], D at least count

    @staticmethod
    def stops(drafts: Sequence[Drafts]) -> DraftStops | None:
        """The rule of sequences that draft together; None where nothing stops any of them."""
        if all(d.acceptance is None for d in drafts):
            return None
        acceptance, least = np.ones((len(drafts), BUCKETS)), np.zeros((len(drafts), max(d.count for d in drafts)))
        for b, d in enumerate(drafts):
            if d.acceptance is not None and d.least is not None:
                acceptance[b], least[b, : d.count] = d.acceptance, d.least[: d.count]
        return DraftStops(torch.tensor(EDGES), torch.from_numpy(acceptance).float(), torch.from_numpy(least).float())


NO_DRAFTS = Drafts(0, 0)
