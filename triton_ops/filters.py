"""Temperature, top-k, top-p, min-p: what each row of scores keeps, in any order of its tokens.

    scores = logits / temperature;  kept: the first of (falling score, rising id) until k tokens, or until masses sum to
    top_p of their total;  mass = exp(score - max) * 2^40, an integer

The cut is found like a digit of a number that is being sorted: three times, the tokens in question are counted (their
masses added up) by the next bits of their scores, by integer atomics, whose sums have one value in any order; the next
launch knows the bits in whose class the cut lies. Tokens that equal the last score share a mass: as many of them are
kept as are missing, the lowest ids. Moves the scores twice, and once for each launch that counts them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function, exp
from .launch import OPTIONS, blocks

__all__ = ["BLOCK", "Cuts", "find_cuts", "key_of", "mass_of", "maximum_of", "scale_rows"]

BLOCK = 1024  # tokens of a program
CLASSES = 2048  # of a launch that counts: by 11 bits, the last one by 10
SHIFTS = (21, 10, 0)  # where those bits begin
EVERYTHING = tl.constexpr(0xFFFFFFFF)  # a cut behind all scores


@triton.jit
def _scale_kernel(
    logits_ptr, temperatures_ptr, sequence_ptr, scores_ptr, maxima_ptr, N, num_blocks,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores, unless the temperature is 0, and the greatest of each block; infinite where one is NaN."""
    pid = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    n = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * N + n, mask=n < N, other=-float("inf"))
    if SCALE:
        sequence = tl.load(sequence_ptr + row)
        if sequence < 0:
            return
        temperature = tl.load(temperatures_ptr + sequence)
        x = tl.div_rn(x, tl.where(temperature == 0.0, 1.0, temperature))
        tl.store(scores_ptr + row * N + n, x, mask=n < N)
    tl.store(maxima_ptr + row * num_blocks + pid, tl.max(tl.where(x == x, x, float("inf"))))


@device_function
def maximum_of(maxima_ptr, row, num_blocks, BLOCKS: tl.constexpr):
    """A row's greatest score; infinite where nothing can be chosen."""
    block = tl.arange(0, BLOCKS)
    return tl.max(tl.load(maxima_ptr + row * num_blocks + block, mask=block < num_blocks, other=-float("inf")))


@device_function
def key_of(score):
    """Scores as uint32 that rise where they fall; 0 and -0 are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)


@device_function
def score_of(key):
    """The inverse of key_of, of an int64."""
    bits = key.to(tl.int32) ^ 0x7FFFFFFF
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device_function
def mass_of(score, maximum):
    """exp(score - maximum) * 2^40, an integer."""
    return (exp(score - maximum) * 1099511627776.0).to(tl.int64)


@device_function
def _known_after(counts_ptr, states_ptr, row, rows, limit_ptr, LAUNCH: tl.constexpr, CLASSES: tl.constexpr):
    """What a launch's counts say of the cut: its bits so far, and how much is missing from the tokens with them on."""
    counts = tl.load(counts_ptr + (LAUNCH * rows + row) * CLASSES + tl.arange(0, CLASSES))
    bits = tl.full([], 0, tl.int64)
    if LAUNCH == 3:
        share = tl.load(limit_ptr) * tl.sum(counts).to(tl.float64)
        missing = tl.maximum(tl.ceil(share).to(tl.int64), 1)
    elif LAUNCH == 0:
        missing = tl.load(limit_ptr)
    else:
        bits = tl.load(states_ptr + ((LAUNCH - 1) * rows + row) * 2)
        missing = tl.load(states_ptr + ((LAUNCH - 1) * rows + row) * 2 + 1)
    before = tl.cumsum(counts) < missing
    width: tl.constexpr = 10 if LAUNCH % 3 == 2 else 11
    return (bits << width) + tl.sum(before.to(tl.int64)), missing - tl.sum(tl.where(before, counts, 0))


@triton.jit
def _count_kernel(
    scores_ptr, maxima_ptr, sequence_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, counts_ptr, states_ptr, ties_ptr,
    rows, N, num_blocks,
    BEFORE: tl.constexpr, NOW: tl.constexpr, TOP_K: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Launch NOW: 0, 1, 2 count tokens for top-k, 3, 4, 5 add up masses for top-p, 6 counts in each block the tokens
    that equal the last score. BEFORE: the launch before it, whose counts are read first; -1: none."""
    pid = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence = tl.load(sequence_ptr + row)
    if sequence < 0:
        return
    scaled = tl.load(temperatures_ptr + sequence) != 0.0
    top_k, top_p = tl.load(top_ks_ptr + sequence), tl.load(top_ps_ptr + sequence)
    by_count, by_mass = scaled & (top_k > 0) & (top_k < N), scaled & (top_p < 1.0)

    k_cut, k_missing = tl.full([], EVERYTHING, tl.int64), tl.full([], 0, tl.int64)
    if TOP_K and NOW > 3:
        k_cut = tl.load(states_ptr + (2 * rows + row) * 2)
        k_missing = tl.load(states_ptr + (2 * rows + row) * 2 + 1)
    cut, missing = k_cut, k_missing
    if NOW >= 3:
        maximum = maximum_of(maxima_ptr, row, num_blocks, BLOCKS)
    if BEFORE >= 0:
        limit_ptr = (top_ps_ptr if BEFORE >= 3 else top_ks_ptr) + sequence
        cut, missing = _known_after(counts_ptr, states_ptr, row, rows, limit_ptr, BEFORE, CLASSES)
        if BEFORE == 2:
            cut, missing = tl.where(by_count, cut, EVERYTHING), tl.where(by_count, missing, 0)
            k_cut, k_missing = cut, missing
        elif BEFORE == 5:
            mass = tl.maximum(mass_of(score_of(cut), maximum), 1)
            missing = (missing + mass - 1) // mass  # tokens of that mass
            cut, missing = tl.where(by_mass, cut, k_cut), tl.where(by_mass, missing, k_missing)
        if pid == 0:
            tl.store(states_ptr + (BEFORE * rows + row) * 2, cut)
            tl.store(states_ptr + (BEFORE * rows + row) * 2 + 1, missing)

    n = pid * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + row * N + n, mask=n < N, other=-float("inf"))
    key = key_of(score).to(tl.int64)
    if NOW == 6:
        tl.store(ties_ptr + row * num_blocks + pid, tl.sum(((key == cut) & (n < N)).to(tl.int32)))
    else:
        counted = n < tl.where(by_mass if NOW >= 3 else by_count, N, 0)
        if NOW % 3 > 0:
            counted = counted & (key >> (SHIFT + (10 if NOW % 3 == 2 else 11)) == cut)
        classes_ptr = counts_ptr + (NOW * rows + row) * CLASSES
        of_launch: tl.constexpr = CLASSES // 2 if NOW % 3 == 2 else CLASSES
        weight = tl.full([BLOCK], 1, tl.int64)
        if NOW >= 3:
            weight = mass_of(score, maximum)
            counted = counted & (key < k_cut)
            if TOP_K and pid == 0:  # the tokens that equal top-k's last score
                asked = by_mass & by_count
                if NOW % 3 > 0:
                    asked = asked & (k_cut >> (SHIFT + (10 if NOW % 3 == 2 else 11)) == cut)
                tied = mass_of(score_of(k_cut), maximum) * k_missing
                tl.atomic_add(classes_ptr + (k_cut >> SHIFT) % of_launch, tied, mask=asked)
        tl.atomic_add(classes_ptr + (key >> SHIFT) % of_launch, weight, mask=counted & (weight > 0))


@device_function
def is_kept(score, n, N, cut_ptr, ties_ptr, row, pid, num_blocks, BLOCKS: tl.constexpr):
    """Which tokens n [BLOCK] of block ``pid`` are before a row's cut."""
    cut, missing = tl.load(cut_ptr + row * 2), tl.load(cut_ptr + row * 2 + 1)
    block = tl.arange(0, BLOCKS)
    ties = tl.load(ties_ptr + row * num_blocks + block, mask=block < pid, other=0)
    key = key_of(score).to(tl.int64)
    equal = (key == cut) & (n < N)
    place = tl.sum(ties) + tl.cumsum(equal.to(tl.int32))
    return (key < cut) | (equal & (place <= missing))


class Cuts:
    """Where the scores of rows are cut: buffers of find_cuts for so many rows of N tokens.

    After launches of T rows, ``cut(T)`` int64 [T, 2]: the key of the last score that is kept, and how many tokens that
    equal it; ties int32 [T, blocks].
    """

    def __init__(self, num_rows: int, size: int, top_k: bool, top_p: bool, device: torch.device) -> None:
        self.top_k, self.launches = top_k, [*(range(3) if top_k else ()), *(range(3, 6) if top_p else ())]
        self.counts = torch.zeros(6 * num_rows * CLASSES, dtype=torch.int64, device=device)
        self.states = torch.zeros(6 * num_rows * 2, dtype=torch.int64, device=device)
        self.ties = torch.zeros(num_rows, blocks(size, BLOCK), dtype=torch.int32, device=device)

    def cut(self, num_rows: int) -> Tensor:
        return self.states[self.launches[-1] * num_rows * 2 :]


def scale_rows(
    logits: Tensor, temperatures: Tensor | None, sequences: Tensor, scores: Tensor, maxima: Tensor
) -> None:  # fmt: skip
    """Scores fp32 [T, N] of T = len(sequences) rows of logits, and the greatest of each block, fp32 [T, blocks].

    sequences int32 [T]: where each row has its settings, -1: left out. Temperatures None: maxima alone.
    """
    _scale_kernel[(maxima.size(1), len(sequences))](
        logits_ptr=logits,
        temperatures_ptr=sequences if temperatures is None else temperatures,
        sequence_ptr=sequences,
        scores_ptr=scores,
        maxima_ptr=maxima,
        N=logits.size(1),
        num_blocks=maxima.size(1),
        SCALE=temperatures is not None,
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )


def find_cuts(
    cuts: Cuts, scores: Tensor, maxima: Tensor, sequences: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor
) -> None:  # fmt: skip
    """What top-k and top-p leave of scores fp32 [T, N] -> cuts."""
    cuts.counts.zero_()
    for before, now in zip([-1, *cuts.launches], [*cuts.launches, 6], strict=True):
        _count_kernel[(maxima.size(1), len(sequences))](
            scores_ptr=scores,
            maxima_ptr=maxima,
            sequence_ptr=sequences,
            temperatures_ptr=temperatures,
            top_ks_ptr=top_ks,
            top_ps_ptr=top_ps,
            counts_ptr=cuts.counts,
            states_ptr=cuts.states,
            ties_ptr=cuts.ties,
            rows=len(sequences),
            N=scores.size(1),
            num_blocks=maxima.size(1),
            BEFORE=before,
            NOW=now,
            TOP_K=cuts.top_k,
            SHIFT=SHIFTS[now % 3],
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(maxima.size(1)),
            CLASSES=CLASSES,
            num_warps=4,
            **OPTIONS,
        )
