"""What is to be expected of drafting that stops by confidence.

Drafts of a sequence fall into buckets of confidence, each independently of the others with probability ``shares[k]``,
and are accepted with probability ``rates[k]``. Draft i is made if the product of the rates so far is at least
``least[i]``, and is of use only if all up to it are accepted.
"""

from __future__ import annotations

import numpy as np

from layerskip_kernels.engine.acceptance import Floats

__all__ = ["expected_drafts", "least_products"]

STEP, CELLS = 0.1, 32  # products are kept as their logarithms, down to exp(-3.2)
PRODUCTS = np.exp(-STEP * np.arange(CELLS))
# From cell j to cell i a kernel moves by i - j; what would come from behind reads a zero after its end.
MOVES = np.subtract.outer(np.arange(CELLS), np.arange(CELLS))
MOVES[MOVES < 0] = CELLS
SELDOM = 1e-3  # a draft less probable than this is not expected


def least_products(cost: Floats, value: float, mean: Floats) -> Floats:
    """The products [N, D] from which on a draft pays that costs this many seconds [N, D].

    ``value``: seconds that a token is worth; ``mean`` [N]: the acceptance of a draft whatever its confidence. Whether
    one more draft pays is all that counts: products only fall, so where the next does not pay, none after it does.
    """
    return np.minimum(cost / (value * mean[:, None]), 2.0)


def expected_drafts(rates: Floats, shares: Floats, least: Floats, most: Floats) -> tuple[Floats, Floats]:
    """rates, shares [N, K], least [N, D], most [N] -> of each draft the probabilities, [N, D] each:

    that it is made, and that it is made and accepted with all before it.
    """
    count, depth = least.shape
    going_on = (PRODUCTS >= least.T[:, :, None]) & (most > np.arange(depth)[:, None])[:, :, None]
    masses = np.zeros((depth, count, CELLS, 1))
    masses[0, :, 0, 0] = going_on[0, :, 0]
    transition = _transitions(rates, shares)
    for i in range(1, depth):
        np.matmul(transition, masses[i - 1], out=masses[i])
        masses[i, :, :, 0] *= going_on[i]
    made = masses.sum(axis=(2, 3)).T
    gained = (masses[:, :, :, 0] @ PRODUCTS).T * (rates * shares).sum(axis=1)[:, None]
    return made, gained


def _transitions(rates: Floats, shares: Floats) -> Floats:
    """How a draft moves products from cell to cell, [N, CELLS, CELLS]; between two cells in parts."""
    shift = np.minimum(-np.log(np.maximum(rates, 1e-9)) / STEP, CELLS - 1.0)
    low = np.floor(shift).astype(np.int64)
    kernel = np.zeros((len(rates), CELLS + 1))
    row = np.arange(len(rates))[:, None]
    np.add.at(kernel, (row, low), shares * (1 - (shift - low)))
    np.add.at(kernel, (row, np.minimum(low + 1, CELLS)), shares * (shift - low))
    kernel[:, CELLS] = 0.0
    return kernel[:, MOVES]
