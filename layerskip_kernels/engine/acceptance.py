"""How often drafts are right: by the exit that made them and by how confident it was, recent ones counting most."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["EDGES", "Calibration", "DraftHistory", "Floats", "Pool"]

Floats = NDArray[np.float64]

EDGES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # between the buckets of confidence: finer where drafts are worth most
UNKNOWN = 0.6  # the confidence of drafts that none is known of: one bucket holds them all
BUCKETS = len(EDGES) + 1
MIDDLES = (np.array([0.0, *EDGES]) + np.array([*EDGES, 1.0])) / 2


class Calibration:
    """From a draft's confidence to the probability that it is accepted.

    Of each bucket of confidence: how many drafts were judged, and how many of them accepted. Earlier drafts fade by
    ``fading`` with each one judged since.
    """

    def __init__(self, fading: float) -> None:
        self._fading = fading
        self._judged, self._accepted = [0.0] * BUCKETS, [0.0] * BUCKETS

    @property
    def judged(self) -> float:
        """Drafts that say something, the faded ones in part."""
        return sum(self._judged)

    def add(self, confidences: Sequence[float], accepted: int) -> None:
        """A verification accepted the first of these drafts; those after the first wrong one say nothing."""
        said = confidences[: accepted + 1]
        kept = self._fading ** len(said)
        self._judged = [value * kept for value in self._judged]
        self._accepted = [value * kept for value in self._accepted]
        for i, confidence in enumerate(said):
            bucket = bisect_right(EDGES, confidence)
            self._judged[bucket] += 1
            self._accepted[bucket] += i < accepted

    def rates(self, prior: Floats, weight: float) -> Floats:
        """The acceptance of each bucket, ``prior`` counting as much as ``weight`` drafts judged in each."""
        return (np.array(self._accepted) + prior * weight) / (np.array(self._judged) + weight)

    def shares(self, prior: Floats, weight: float) -> Floats:
        """How many of the drafts are in each bucket, ``prior`` counting as much as ``weight`` drafts."""
        shares = np.array(self._judged) + prior * weight
        return shares / shares.sum()

    def mean(self, prior: float, weight: float) -> float:
        """The acceptance whatever the confidence."""
        return (sum(self._accepted) + prior * weight) / (self.judged + weight)


@dataclass(eq=False)
class DraftHistory:
    """How one sequence's drafts have fared, by the exit layer that made them."""

    by_exit: dict[int, Calibration] = field(default_factory=dict)
    exit_layer: int | None = None  # what was chosen last; None: nothing was

    FADING = 0.98

    def of(self, exit_layer: int) -> Calibration:
        return self.by_exit.setdefault(exit_layer, Calibration(self.FADING))


class Pool:
    """How the drafts of all sequences have fared, by exit layer and by whether they were drawn with noise.

    ``exit_layer``: the one that was chosen last; None: none was.
    """

    FADING = 0.995

    def __init__(self) -> None:
        self.exit_layer: int | None = None
        self._by_exit: dict[tuple[int, bool], Calibration] = {}

    def of(self, exit_layer: int, drawn: bool = False) -> Calibration:
        return self._by_exit.setdefault((exit_layer, drawn), Calibration(self.FADING))
