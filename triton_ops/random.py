"""Random numbers (rule 7): Philox4x32-10 and the Gumbel noise made of its words.

noise = -log(-log(1 - v)),  v = (31 bits + 1/2) / 2^31
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function, log, log_of, log_parts
from .launch import OPTIONS, blocks

__all__ = [
    "ACCEPT_STREAM", "RESIDUAL_STREAM", "TOKEN_STREAM", "gumbel", "noise_of", "noise_of_ids", "philox", "philox_words",
]  # fmt: skip

# The third word of a counter: what the numbers are for.
TOKEN_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0, 1, 2
BLOCK = 1024


@device_function
def philox_words(c0, c1, c2, c3, seed):
    """Four random words for each counter of four: uint32 tensors of one shape. seed int64: the key, low word first."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@device_function
def unit_of(word):
    """31 bits of a word uint32 and a half, fp32: to be multiplied by 2^-31."""
    return (word >> 1).to(tl.int32).to(tl.float32) + 0.5


@device_function
def gumbel_of(word):
    """Noise fp32 of words uint32. The inner logarithm starts from v, not from 1 - v, where that is near 1."""
    v = tl.minimum(unit_of(word) * 4.656612873077393e-10, 0.9999999403953552)  # 2^-31; 1 - 2^-24
    f, e = log_parts((1.0 - v).to(tl.int32, bitcast=True))
    return -log(-log_of(tl.where(e == 0.0, -v, f), e))


@device_function
def noise_of(first, position, stream: tl.constexpr, sample, seed, BLOCK: tl.constexpr):
    """The noise of the token ids first .. first + BLOCK - 1; both are multiples of four."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    words = philox_words(counter, zero + position.to(tl.uint32), zero + stream, zero + sample.to(tl.uint32), seed)
    word = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    return gumbel_of(tl.reshape(word, [BLOCK]))


@device_function
def noise_of_ids(ids, position, stream: tl.constexpr, sample, seed, BLOCK: tl.constexpr):
    """The noise of any token ids int32 [BLOCK]."""
    counter = (ids >> 2).to(tl.uint32)
    zero = counter * 0
    words = philox_words(counter, zero + position.to(tl.uint32), zero + stream, zero + sample.to(tl.uint32), seed)
    even = tl.where(ids & 2 == 0, words[0], words[2])
    odd = tl.where(ids & 2 == 0, words[1], words[3])
    return gumbel_of(tl.where(ids & 1 == 0, even, odd))


@triton.jit
def _philox_kernel(counters_ptr, words_ptr, seed, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.load(counters_ptr + row * 4, mask=row < n, other=0).to(tl.uint32)
    c1 = tl.load(counters_ptr + row * 4 + 1, mask=row < n, other=0).to(tl.uint32)
    c2 = tl.load(counters_ptr + row * 4 + 2, mask=row < n, other=0).to(tl.uint32)
    c3 = tl.load(counters_ptr + row * 4 + 3, mask=row < n, other=0).to(tl.uint32)
    words = philox_words(c0, c1, c2, c3, tl.full([BLOCK], seed, tl.int64))
    for i in tl.static_range(4):
        tl.store(words_ptr + row * 4 + i, words[i].to(tl.int64), mask=row < n)


@triton.jit
def _gumbel_kernel(words_ptr, noise_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + offs, mask=offs < n, other=0).to(tl.uint32)
    tl.store(noise_ptr + offs, gumbel_of(word), mask=offs < n)


def philox(counters: Tensor, seed: int) -> Tensor:
    """reference.philox: counters int64 [N, 4] -> words int64 [N, 4]."""
    counters, words = counters.contiguous(), torch.empty_like(counters)
    _philox_kernel[(blocks(len(counters), BLOCK),)](
        counters_ptr=counters, words_ptr=words, seed=seed, n=len(counters), BLOCK=BLOCK, num_warps=4, **OPTIONS
    )
    return words


def gumbel(words: Tensor) -> Tensor:
    """reference.gumbel: words int64 [N] -> noise fp32 [N]."""
    noise = torch.empty(words.shape, device=words.device)
    _gumbel_kernel[(blocks(words.numel(), BLOCK),)](
        words_ptr=words.contiguous(), noise_ptr=noise, n=words.numel(), BLOCK=BLOCK, num_warps=4, **OPTIONS
    )
    return noise
