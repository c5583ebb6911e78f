"""What each op means, in plain PyTorch: the arithmetic contract (docs/arithmetic.md), line by line.

Clear before fast. Every backend has these names and signatures and gives these bits (``torch.equal``).
Shape suffixes: B sequences, T rows, L layers, D hidden, F ffn, H query heads, G KV heads, K head dim,
V vocab, P pages, S positions per page.

Weights are row-major here, ``[out, in]``, as in the checkpoint; another backend may lay them out in its own
way (``pack_weight``). Everything else, the KV pages included, has one layout for all backends.
"""

import math

import torch
from torch import Tensor

SEGMENTS = 8
NORM_LANES = 256
CHUNK = 256

# ---- rule 5: exp, log, silu: a fixed sequence of separately rounded fp32 operations ----

LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HI = float.fromhex("0x1.63p-1")
LN2_LO = float.fromhex("-0x1.bd0106p-13")
ROUND_MAGIC = float.fromhex("0x1.8p+23")
EXP_POLYNOMIAL = [
    float.fromhex(c) for c in ("0x1.6db47ep-10", "0x1.123b92p-7", "0x1.55545ep-5", "0x1.55548ep-3", "0x1p-1")
]
LOG_POLYNOMIAL = [
    float.fromhex(c)
    for c in (
        "0x1.1457a2p-4",
        "-0x1.de3c14p-4",
        "0x1.e6f06cp-4",
        "-0x1.fc2208p-4",
        "0x1.233768p-3",
        "-0x1.555c4ep-3",
        "0x1.99a4b6p-3",
        "-0x1.000006p-2",
        "0x1.555548p-2",
    )
]
SQRT_HALF_BITS = 0x3F3504F3


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _exp_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x) = (mantissa + error) * 2**exponent, for x where the exponent fits 9 bits."""
    shifted = x * LOG2_E + ROUND_MAGIC
    n = shifted - ROUND_MAGIC
    a = x - n * LN2_HI
    b = n * LN2_LO
    r = a - b
    r_error = (a - r) - b
    q = _horner(EXP_POLYNOMIAL, r)
    sum_ = 1.0 + r
    sum_error = (1.0 - sum_) + r
    rest = sum_error + (q * (r * r) + r_error)
    mantissa = sum_ + rest
    return mantissa, (sum_ - mantissa) + rest, shifted.view(torch.int32) - 0x4B400000


def _power_of_two(n: Tensor) -> Tensor:
    return ((n + 127) << 23).view(torch.float32)


def _scale_by_power_of_two(mantissa: Tensor, n: Tensor) -> Tensor:
    half = n >> 1
    return mantissa * _power_of_two(half) * _power_of_two(n - half)


def exp(x: Tensor) -> Tensor:
    """exp of an fp32 tensor, within 2 ulp (rule 5)."""
    mantissa, _, exponent = _exp_parts(x.clamp(-105.0, 89.0))
    return _scale_by_power_of_two(mantissa, exponent)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) of an fp32 tensor, within 2 ulp (rule 5).

    The quotient is corrected once by what rounding the denominator lost; where exp(-x) would overflow, the
    denominator is held scaled by 2**-64.
    """
    mantissa, error, exponent = _exp_parts((-x).clamp(-105.0, 128.0))
    shift = torch.where(exponent > 64, 64, 0).to(torch.int32)
    one = torch.where(exponent > 64, 0.0, 1.0)
    power = _scale_by_power_of_two(mantissa, exponent - shift)
    power_error = _scale_by_power_of_two(error, exponent - shift)
    denominator = one + power
    power_part = denominator - one
    sum_error = (one - (denominator - power_part)) + (power - power_part)
    quotient = x / denominator
    y = quotient - (quotient * (sum_error + power_error)) / denominator
    y = y * _power_of_two(-shift)
    y = torch.where(x > 128.0, x, y)
    return torch.where(x < -128.0, -0.0, y)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of an fp32 tensor, within 2 ulp (rule 5)."""
    subnormal = x < 2.0**-126
    bits = torch.where(subnormal, x * 2.0**23, x).view(torch.int32)
    f, e = _log_parts(bits)
    y = _log_of(f, e - torch.where(subnormal, 23.0, 0.0))
    y = torch.where(x == torch.inf, x, y)
    y = torch.where(x == 0.0, -torch.inf, y)
    return torch.where((x < 0.0) | x.isnan(), torch.nan, y)


def _log_parts(bits: Tensor) -> tuple[Tensor, Tensor]:
    """f in [sqrt(1/2) - 1, sqrt(2) - 1) and e, both fp32: the float with these bits is (1 + f) * 2**e."""
    offset = bits - SQRT_HALF_BITS
    return ((offset & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0, (offset >> 23).to(torch.float32)


def _log_of(f: Tensor, e: Tensor) -> Tensor:
    """log((1 + f) * 2**e)."""
    square = f * f
    y = (_horner(LOG_POLYNOMIAL, f) * f) * square + e * LN2_LO
    y = y - 0.5 * square
    return (f + y) + e * LN2_HI


# ---- rules 1 and 2: sums in a written order ----


def fold(terms: Tensor) -> Tensor:
    """Left fold over the first dimension, from +0.0, each sum rounded to fp32."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def tree(partials: Tensor) -> Tensor:
    """Balanced tree of adjacent pairs over the first dimension (a power of two)."""
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


def dot(x: Tensor, weight: Tensor) -> Tensor:
    """Rule 1: ``x`` [T, K] times ``weight`` [N, K], or int8 as quantize_int8 makes it -> fp32 [T, N].

    K is cut into eight contiguous segments of ceil(K / 8); each is folded in ascending k; the partials are
    summed in a tree. The zeros that fill the last segments change nothing: a fold from +0.0 is never -0.0.
    """
    length = -(-x.size(1) // SEGMENTS)
    padding = (0, SEGMENTS * length - x.size(1))
    weight, scales_SN = _int8_parts(weight) if weight.dtype == torch.int8 else (weight, None)
    x_kST = torch.nn.functional.pad(x.float(), padding).view(-1, SEGMENTS, length).permute(2, 1, 0).contiguous()
    w_kSN = torch.nn.functional.pad(weight.float(), padding).view(-1, SEGMENTS, length).permute(2, 1, 0).contiguous()
    partials_STN = x.new_zeros(SEGMENTS, x.size(0), weight.size(0), dtype=torch.float32)
    for x_ST, w_SN in zip(x_kST, w_kSN, strict=True):
        partials_STN = partials_STN + x_ST[:, :, None] * w_SN[:, None, :]
    if scales_SN is not None:
        partials_STN = partials_STN * scales_SN[:, None, :]
    return tree(partials_STN)


def quantize_int8(weight: Tensor) -> Tensor:
    """A linear weight [N, K] as int8 [N, K + 32]: K numbers of -127..127, then the bytes of eight fp32 scales.

    One scale for each row and segment of rule 1: the segment's largest magnitude / 127. ``dot`` folds the integers
    (their products with 16-bit numbers are exact in fp32, too) and applies the scale once per segment.
    """
    N, K = weight.shape
    length = -(-K // SEGMENTS)
    segments = torch.nn.functional.pad(weight.float(), (0, SEGMENTS * length - K)).view(N, SEGMENTS, length)
    scales = segments.abs().amax(dim=2) / 127.0
    safe = torch.where(scales > 0, scales, 1.0)
    integers = (segments / safe[:, :, None]).round().clamp(-127, 127).view(N, -1)[:, :K].to(torch.int8)
    return torch.cat([integers, scales.view(torch.int8)], dim=1)


def _int8_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers [N, K] and the scales fp32 [8, N] of an int8 weight."""
    scale_bytes = SEGMENTS * 4
    return weight[:, :-scale_bytes], weight[:, -scale_bytes:].contiguous().view(torch.float32).T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Rule 1 with the bias added in fp32 and one rounding to x's dtype: [T, K], packed [N, K], [N] -> [T, N]."""
    y = dot(x, weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def inverse_sqrt(x: Tensor) -> Tensor:
    """1 / sqrt of an fp32 tensor, both correctly rounded. PyTorch's fp32 sqrt is not; through float64 it is."""
    return 1.0 / x.double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rule 2: x [T, D], weight [D] -> [T, D]."""
    x32 = x.float()
    squares = torch.nn.functional.pad(x32 * x32, (0, -x.size(1) % NORM_LANES))
    lanes = fold(squares.unflatten(1, (-1, NORM_LANES)).transpose(0, 1))
    mean = tree(lanes.T) / x.size(1)
    inv = inverse_sqrt(mean + eps)
    return ((x32 * inv[:, None]).to(x.dtype).float() * weight.float()).to(x.dtype)


# ---- rule 3: RoPE ----


def rope_tables(inverse_frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [num_positions, K / 2], of position times inverse frequency, computed in float64."""
    positions = torch.arange(num_positions, dtype=torch.float64)
    angles = positions[:, None] * inverse_frequencies.double()[None, :]
    return angles.cos().float(), angles.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rule 3: rotate x [T, heads, K] by cos, sin [T, K / 2]; the halves of a head are the pairs."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---- the ops ----


def pack_weight(weight: Tensor) -> Tensor:
    """A linear weight [N, K] in this backend's layout: here, as it is."""
    return weight


def select_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """The packed weight made of some rows (int64 [R]) of another."""
    return weight[rows]


def embed_tokens(tokens: Tensor, embedding: Tensor, hidden_size: int) -> Tensor:
    """Rows of the embedding [V, D] for tokens [T] int64 -> [T, D]."""
    return embedding[tokens]


def norm_qkv_rope_append(
    hidden: Tensor,
    norm_weight: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    qkv_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """RMSNorm, the three projections, RoPE on q and k, and k and v written into their pages.

    hidden [T, D]; norm_weight [D]; wq, wk, wv packed [H*K, D], [G*K, D], [G*K, D]; qkv_bias [(H+2G)*K] or None;
    cos, sin fp32 [max_positions, K/2]; positions int64 [T]; slot_mapping int64 [T] = page * S + offset, -1 skips
    the row; one layer's pages k_pages [P, G, K, S] (transposed, so that a page is a tile of positions) and
    v_pages [P, G, S, K], written in place. Returns q [T, H, K].
    """
    T, (_, G, K, S) = hidden.size(0), k_pages.shape
    x = rms_norm(hidden, norm_weight, eps)
    bias_q, bias_k, bias_v = (None,) * 3 if qkv_bias is None else qkv_bias.split([num_heads * K, G * K, G * K])
    q = rope(linear(x, wq, bias_q, num_heads * K).view(T, num_heads, K), cos[positions], sin[positions])
    k = rope(linear(x, wk, bias_k, G * K).view(T, G, K), cos[positions], sin[positions])
    v = linear(x, wv, bias_v, G * K).view(T, G, K)
    kept = slot_mapping >= 0
    page, offset = slot_mapping[kept] // S, slot_mapping[kept] % S
    k_pages[page, :, :, offset] = k[kept]
    v_pages[page, :, offset, :] = v[kept]
    return q


def _chunk_attention(q_HK: Tensor, k_nHK: Tensor, v_nHK: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One row over one chunk: maximum m [H], normaliser l [H] and unnormalised output o [H, K], fp32."""
    s_nH = fold((q_HK * k_nHK).permute(2, 0, 1)) * scale
    m = s_nH.amax(dim=0)
    p_nH = exp(s_nH - m).to(v_nHK.dtype).float()
    return m, fold(p_nH), fold(p_nH[:, :, None] * v_nHK.float())


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start_loc: Tensor, positions: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Rule 4: each row attends to positions 0..positions[row] of its sequence.

    q [T, H, K]; one layer's pages k_pages [P, G, K, S], v_pages [P, G, S, K]; block_table int32 [B, max_blocks];
    query_start_loc int32 [B+1]: the rows of sequence b are query_start_loc[b] .. query_start_loc[b+1];
    positions int64 [T]; scale is rounded to fp32. Returns [T, H*K].
    """
    T, H, K = q.shape
    G, S = k_pages.size(1), k_pages.size(3)
    scale = torch.tensor(scale, dtype=torch.float32).item()
    out = torch.empty_like(q)
    sequence_of_row = torch.repeat_interleave(query_start_loc.diff().long())
    for row in range(T):
        visible = torch.arange(int(positions[row]) + 1)
        page, offset = block_table[sequence_of_row[row]][visible // S].long(), visible % S
        k = k_pages[page, :, :, offset].float().repeat_interleave(H // G, dim=1)
        v = v_pages[page, :, offset, :].repeat_interleave(H // G, dim=1)
        q_row = q[row].float()
        m, l, o = _chunk_attention(q_row, k[:CHUNK], v[:CHUNK], scale)  # noqa: E741
        for start in range(CHUNK, len(visible), CHUNK):
            m_new, l_new, o_new = _chunk_attention(q_row, k[start : start + CHUNK], v[start : start + CHUNK], scale)
            m_max = torch.maximum(m, m_new)
            a, b = exp(m - m_max), exp(m_new - m_max)
            m, l, o = m_max, l * a + l_new * b, o * a[:, None] + o_new * b[:, None]  # noqa: E741
        out[row] = (o / l[:, None]).to(q.dtype)
    return out.view(T, H * K)


def out_residual(attention: Tensor, wo: Tensor, out_bias: Tensor | None, residual: Tensor) -> Tensor:
    """Output projection and the residual sum: [T, H*K], packed [D, H*K], [D] or None, [T, D] -> [T, D]."""
    y = linear(attention, wo, out_bias, residual.size(1))
    return (residual.float() + y.float()).to(residual.dtype)


def norm_gate_up_silu(
    hidden: Tensor, norm_weight: Tensor, w_gate: Tensor, w_up: Tensor, intermediate_size: int, eps: float
) -> Tensor:
    """RMSNorm, gate and up projections, silu(gate) * up: [T, D] -> [T, F]; w_gate, w_up packed [F, D]."""
    x = rms_norm(hidden, norm_weight, eps)
    gate, up = (linear(x, w, None, intermediate_size) for w in (w_gate, w_up))
    return (silu(gate.float()).to(x.dtype).float() * up.float()).to(x.dtype)


def down_residual(activation: Tensor, w_down: Tensor, residual: Tensor) -> Tensor:
    """Down projection and the residual sum: [T, F], packed [D, F], [T, D] -> [T, D]."""
    y = linear(activation, w_down, None, residual.size(1))
    return (residual.float() + y.float()).to(residual.dtype)


def norm_head_argmax(
    hidden: Tensor, norm_weight: Tensor, lm_head: Tensor, vocab_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Final RMSNorm, LM head, rule 6: [T, D], [D], packed [V, D] -> tokens int64 [T], logits fp32 [T, V].

    Raises RuntimeError when a logit is NaN.
    """
    logits = dot(rms_norm(hidden, norm_weight, eps), lm_head)
    if logits.isnan().any():
        raise RuntimeError(NAN_LOGITS)
    tokens = torch.tensor([int((row == row.max()).nonzero()[0, 0]) for row in logits], dtype=torch.int64)
    return tokens, logits


NAN_LOGITS = (
    "norm_head_argmax: a logit is NaN, so no token can be chosen: the activations overflowed "
    "(fp16 holds at most 65504; try dtype=torch.bfloat16) or the weights are damaged"
)


def accept_draft(tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """The longest agreeing prefix of each sequence's drafts, and the token that follows it.

    tokens int64 [T]: pending rows, of which the last num_drafts[b] of sequence b are drafts; targets int64
    [sum(num_drafts + 1)]: what the full model says after the last num_drafts[b] + 1 rows of each sequence;
    query_start_loc int32 [B+1]; num_drafts int64 [B]. Returns num_accepted int64 [B], next_tokens int64 [B].

    A sequence with negative num_drafts (a chunk of a prompt) has no targets and gets num_drafts[b] and -1.
    """
    accepted, following, first_target = [], [], 0
    for b, drafts in enumerate(num_drafts.tolist()):
        if drafts < 0:
            accepted.append(drafts)
            following.append(-1)
            continue
        draft = tokens[int(query_start_loc[b + 1]) - drafts : int(query_start_loc[b + 1])]
        target = targets[first_target : first_target + drafts + 1]
        agreed = int((draft == target[:drafts]).long().cumprod(0).sum())
        accepted.append(agreed)
        following.append(int(target[agreed]))
        first_target += drafts + 1
    return torch.tensor(accepted), torch.tensor(following)


# ---- rule 7: random numbers, and what is chosen by them ----

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
# The third word of a counter: what the numbers are for.
TOKEN_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0, 1, 2
MASS_ONE = 2**40  # the probability of the likeliest token, in the integers that probabilities are summed in


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low word of a product; int64 wraps, which leaves its bits right."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def philox(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): counters int64 [N, 4] of 32-bit words -> as many random words.

    ``seed`` is the key, its low 32 bits first.
    """
    c0, c1, c2, c3 = (counters & WORD).unbind(1)
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        high0, low0 = _multiply_words(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + step) & WORD for k, step in zip(key, PHILOX_KEY_STEPS, strict=True)]
    return torch.stack([c0, c1, c2, c3], dim=1)


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise -log(-log(1 - v)) of random words, int64 [N] of 32 bits -> fp32 [N].

    v = (31 bits + 1/2) / 2^31 in fp32. The inner logarithm starts from v, not from 1 - v, where that is near 1:
    great noise, which decides, comes from small v and so keeps 31 bits of resolution.
    """
    v = (((words >> 1).to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1.0 - 2.0**-24)
    f, e = _log_parts((1.0 - v).view(torch.int32))
    return -log(-_log_of(torch.where(e == 0.0, -v, f), e))


def _noise(vocab_size: int, position: int, seed: int, stream: int, sample: int) -> Tensor:
    """The noise of every token id at a position: word id % 4 of the counter (id / 4, position, stream, sample)."""
    counters = torch.tensor([[0, position, stream, sample]]).repeat(-(-vocab_size // 4), 1)
    counters[:, 0] = torch.arange(len(counters))
    return gumbel(philox(counters, seed).view(-1)[:vocab_size])


def _masses(scores: Tensor) -> Tensor:
    """exp(scores - their maximum) as integers, int64: sums of them are exact, so no order has to be fixed."""
    return (exp(scores - scores.max()) * MASS_ONE).to(torch.int64)


def filter_logits(scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Divide by temperature, then keep what top-k, top-p and min-p leave; the rest becomes -inf.

    scores fp32 [T, V]; for each row temperatures fp32 [T] (0: the row stays as it is), top_ks int64 [T] (0: all),
    top_ps fp64 [T] (1: all), min_ps fp32 [T] (0: all) -> fp32 [T, V]. Tokens are ordered by falling score, then
    rising id; top-k and top-p keep the first of them, at least one. Raises RuntimeError for NaN or +inf, and for a
    row that is -inf throughout.
    """
    rows = [_filter_row(*row) for row in zip(scores, temperatures, top_ks, top_ps, min_ps, strict=True)]
    return torch.stack(rows)


def _filter_row(row: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    if temperature == 0:
        return row.clone()
    row = row / temperature
    _check_scores(row)
    order = row.argsort(descending=True, stable=True)
    kept = len(row) if top_k == 0 else min(int(top_k), len(row))
    masses = _masses(row)[order]
    if top_p < 1:
        limit = max(1, math.ceil(float(top_p) * float(masses[:kept].sum())))
        kept = int((masses[:kept].cumsum(0) - masses[:kept] < limit).sum())
    filtered = torch.full_like(row, -torch.inf)
    filtered[order[:kept]] = row[order[:kept]]
    return torch.where(exp(row - row.max()) >= min_p, filtered, -torch.inf)


def _check_scores(scores: Tensor) -> None:
    if scores.isnan().any() or not -torch.inf < scores.max() < torch.inf:
        raise RuntimeError(BAD_SCORES)


BAD_SCORES = (
    "no token can be chosen: a score is NaN or +infinite, or all are -infinite. The logits overflowed, or every token "
    "was excluded: check temperature, penalties and logit_bias"
)


def gumbel_argmax(scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
    """Draw a token of each row: argmax(scores + noise), which has the distribution softmax(scores).

    scores fp32 [T, V]; positions int64 [T] of the tokens to be drawn; seeds, samples int64 [T]; noisy bool [T]:
    False takes the greatest score. Returns int64 [T]. Raises RuntimeError as filter_logits does.
    """
    tokens = []
    for row, position, seed, sample, noise in zip(scores, positions, seeds, samples, noisy, strict=True):
        _check_scores(row)
        if noise:
            row = row + _noise(len(row), int(position), int(seed), TOKEN_STREAM, int(sample))
        tokens.append((row == row.max()).nonzero()[0, 0])
    return torch.stack(tokens)


def rejection_sample(
    draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
) -> Tensor:
    """Keep a draft with probability min(1, p / q), or else draw from max(p - q, 0): the token has distribution p.

    draft_scores, scores fp32 [T, V]: the logarithms of q, which the drafts int64 [T] were drawn from, and of p, up
    to a constant; positions, seeds, samples as in gumbel_argmax. Returns int64 [T], the draft where it was kept; a
    token drawn instead is another one. (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.)
    """
    tokens = []
    for q_row, p_row, draft, position, seed, sample in zip(
        draft_scores, scores, drafts, positions.tolist(), seeds.tolist(), samples.tolist(), strict=True
    ):
        _check_scores(q_row)
        _check_scores(p_row)
        q, p = (masses.double() / masses.sum().double() for masses in (_masses(q_row), _masses(p_row)))
        word = philox(torch.tensor([[0, position, ACCEPT_STREAM, sample]]), seed)[0, 0]
        u = ((word >> 1).double() + 0.5) * 2.0**-31
        if u * q[draft] < p[draft]:
            tokens.append(draft)
            continue
        residual = (p - q).clamp(min=0.0).float()
        # Nothing is left only where p and q are equal up to rounding.
        weights = log(residual) if residual.any() else p_row
        noisy = weights + _noise(len(weights), position, seed, RESIDUAL_STREAM, sample)
        tokens.append((noisy == noisy.max()).nonzero()[0, 0])
    return torch.stack(tokens)


# ---- the steps ----
#
# ``weights`` is one flat list: embedding, final norm, LM head, cos, sin, then LAYER_WEIGHTS for each layer. A bias
# that the model does not have is an empty tensor. The caches hold all layers: k_cache [L, P, G, K, S],
# v_cache [L, P, G, S, K], and hidden_cache [P, S, D]: for each position the hidden state at its depth.

MODEL_WEIGHTS = ("embedding", "final_norm", "lm_head", "cos", "sin")
LAYER_WEIGHTS = (
    "attn_norm",
    "wq",
    "wk",
    "wv",
    "qkv_bias",
    "wo",
    "out_bias",
    "mlp_norm",
    "w_gate",
    "w_up",
    "w_down",
)


def _layer(weights: list[Tensor], layer: int) -> dict[str, Tensor]:
    start = len(MODEL_WEIGHTS) + layer * len(LAYER_WEIGHTS)
    return dict(zip(LAYER_WEIGHTS, weights[start : start + len(LAYER_WEIGHTS)], strict=True))


def _bias(bias: Tensor) -> Tensor | None:
    return bias if bias.numel() else None


def run_layers(
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    depths: Tensor,
    query_start_loc: Tensor,
    block_table: Tensor,
    stop: int,
    num_heads: int,
    intermediate_size: int,
    vocab_size: int,
    eps: float,
    scale: float,
) -> None:
    """The one move of the staircase: raise every row from its own depth to ``stop``.

    tokens, positions int64 [T]; depths int32 [T], never rising within a sequence; query_start_loc int32 [B+1];
    block_table int32 [B, max_blocks]. A row of depth 0 starts from its embedding, any other from its kept hidden
    state. Writes K and V of the layers passed, and the hidden states at ``stop``.
    """
    S, D = hidden_cache.shape[1:]
    embedding, _, _, cos, sin = weights[: len(MODEL_WEIGHTS)]
    sequence_of_row = torch.repeat_interleave(query_start_loc.diff().long())
    page = block_table[sequence_of_row, positions // S].long()
    slots = page * S + positions % S
    hidden = torch.where((depths == 0)[:, None], embed_tokens(tokens, embedding, D), hidden_cache.view(-1, D)[slots])
    for layer in range(int(depths.min()), stop):
        w = _layer(weights, layer)
        active = depths <= layer
        rows_of_sequence = torch.bincount(sequence_of_row[active], minlength=len(query_start_loc) - 1)
        active_start_loc = torch.nn.functional.pad(rows_of_sequence.cumsum(0), (1, 0))
        h, pages = hidden[active], (k_cache[layer], v_cache[layer])
        q = norm_qkv_rope_append(
            h, w["attn_norm"], w["wq"], w["wk"], w["wv"], _bias(w["qkv_bias"]), cos, sin,
            positions[active], slots[active], *pages, num_heads, eps,
        )  # fmt: skip
        attention = paged_attention(q, *pages, block_table, active_start_loc, positions[active], scale)
        h = out_residual(attention, w["wo"], _bias(w["out_bias"]), h)
        activation = norm_gate_up_silu(h, w["mlp_norm"], w["w_gate"], w["w_up"], intermediate_size, eps)
        hidden[active] = down_residual(activation, w["w_down"], h)
    hidden_cache.view(-1, D)[slots] = hidden


def draft_step(
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    num_drafts: Tensor,
    block_table: Tensor,
    draft_head: Tensor | None,
    draft_ids: Tensor | None,
    exit_layer: int,
    max_drafts: int,
    num_heads: int,
    intermediate_size: int,
    vocab_size: int,
    eps: float,
    scale: float,
) -> Tensor:
    """Draft num_drafts[b] tokens for each sequence with the first ``exit_layer`` layers, one row at a time.

    tokens, positions, num_drafts int64 [B]: each sequence's last known token, not yet in the cache, where it
    stands, and how many tokens to draft after it. A draft vocabulary restricts what drafts can be: draft_ids int64
    [N], ascending, and their rows of the LM head, packed [N, D]; both None: all tokens. Returns int64
    [B, max_drafts], -1 where a sequence drafts fewer.
    """
    drafts = torch.full((len(tokens), max_drafts), -1)
    final_norm = weights[1]
    head = weights[2] if draft_head is None else draft_head
    ids = torch.arange(vocab_size) if draft_ids is None else draft_ids
    tokens, S = tokens.clone(), hidden_cache.size(1)
    for i in range(max_drafts):
        rows = (num_drafts > i).nonzero()[:, 0]
        if len(rows) == 0:
            break
        at, table = positions[rows] + i, block_table[rows]
        depths, start_loc = torch.zeros(len(rows), dtype=torch.int32), torch.arange(len(rows) + 1)
        run_layers(
            weights, k_cache, v_cache, hidden_cache, tokens[rows], at, depths, start_loc, table, exit_layer,
            num_heads, intermediate_size, vocab_size, eps, scale,
        )  # fmt: skip
        page = table[torch.arange(len(rows)), at // S].long()
        chosen, _ = norm_head_argmax(hidden_cache[page, at % S], final_norm, head, len(ids), eps)
        drafts[rows, i] = tokens[rows] = ids[chosen]
    return drafts


def verify_step(
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    depths: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    block_table: Tensor,
    num_heads: int,
    intermediate_size: int,
    vocab_size: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise every pending row to the last layer in one batched pass, and judge the drafts.

    Rows as in run_layers; the last num_drafts[b] (int64 [B]) rows of a sequence are its drafts. Returns
    num_accepted int64 [B], next_tokens int64 [B] and, for the last num_drafts[b] + 1 rows of each sequence,
    logits fp32 [sum(num_drafts + 1), V]. With no drafts this is plain decoding, and with many rows prefill;
    with a negative count, a sequence's rows are raised and not judged (accept_draft).
    """
    num_layers = len(weights[len(MODEL_WEIGHTS) :]) // len(LAYER_WEIGHTS)
    run_layers(
        weights, k_cache, v_cache, hidden_cache, tokens, positions, depths, query_start_loc, block_table, num_layers,
        num_heads, intermediate_size, vocab_size, eps, scale,
    )  # fmt: skip
    S = hidden_cache.size(1)
    sequence_of_row = torch.repeat_interleave(query_start_loc.diff().long())
    judged = torch.arange(len(tokens)) >= (query_start_loc[1:] - num_drafts - 1)[sequence_of_row]
    page = block_table[sequence_of_row, positions // S].long()
    hidden = hidden_cache[page[judged], (positions % S)[judged]]
    targets, logits = norm_head_argmax(hidden, weights[1], weights[2], vocab_size, eps)
    return *accept_draft(tokens, targets, query_start_loc, num_drafts), logits
