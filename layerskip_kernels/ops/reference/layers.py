"""The ops of a layer, each row by itself, and those around the layers: embedding and LM head.

Weights are row-major here, ``[out, in]``, as in the checkpoint; another backend may lay them out in its own way
(``pack_weight``). Everything else, the KV pages included, has one layout for all backends.
"""

import torch
from torch import Tensor

from layerskip_kernels.ops.reference.arithmetic import dot, exp, fold, gelu, linear, rms_norm, rope, silu, soft_cap
from layerskip_kernels.ops.reference.blocks import dequantise, is_quantised

CHUNK = 256


def pack_weight(weight: Tensor) -> Tensor:
    """A linear weight [N, K], in the model's dtype or quantised, in this backend's layout: here, as it is."""
    return weight


def select_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """The packed weight made of some rows (int64 [R]) of another."""
    return weight[rows]


def embed_tokens(
    tokens: Tensor, embedding: Tensor, hidden_size: int, dtype: torch.dtype, multiplier: float = 1.0
) -> Tensor:
    """Rows of the embedding [V, D], quantised or in ``dtype``, for tokens [T] int64, times ``multiplier``.

    Returns [T, D] in ``dtype``.
    """
    rows = embedding[tokens]
    return _times(dequantise(rows, hidden_size).to(dtype) if is_quantised(rows) else rows, multiplier)


def _times(x: Tensor, multiplier: float) -> Tensor:
    return (x.float() * multiplier).to(x.dtype)


def norm_qkv_rope_append(
    hidden: Tensor,
    norm_weight: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    qkv_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    num_heads: int,
    eps: float,
    norm_offset: float = 0.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """RMSNorm, the three projections, norms of q and k, RoPE on both, and k and v written into their pages.

    hidden [T, D]; norm_weight [D] or None: no norm; wq, wk, wv packed [H*K, D], [G*K, D], [G*K, D]; qkv_bias
    [(H+2G)*K] or None; cos, sin fp32 [max_positions, R/2] (the first R of a head's K numbers are rotated) or None: no
    RoPE; q_norm, k_norm [K]: of each head, [H*K], [G*K]: of all heads as one, or None; positions int64 [T];
    slot_mapping int64 [T] = page * S + offset, -1 skips the row; one layer's pages k_pages [P, G, K, S] (transposed, so
    that a page is a tile of positions) and v_pages [P, G, S, K], written in place. Returns q [T, H, K].
    """
    T, (_, G, K, S) = hidden.size(0), k_pages.shape
    x = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps, norm_offset)
    bias_q, bias_k, bias_v = (None,) * 3 if qkv_bias is None else qkv_bias.split([num_heads * K, G * K, G * K])
    q, k = linear(x, wq, bias_q, num_heads * K), linear(x, wk, bias_k, G * K)
    if q_norm is not None and k_norm is not None:
        q, k = (rms_norm(y.view(-1, w.numel()), w, eps, norm_offset) for y, w in ((q, q_norm), (k, k_norm)))
    q, k = q.view(T, num_heads, K), k.view(T, G, K)
    if cos is not None and sin is not None:
        q, k = (rope(y, cos[positions], sin[positions]) for y in (q, k))
    v = linear(x, wv, bias_v, G * K).view(T, G, K)
    kept = slot_mapping >= 0
    page, offset = slot_mapping[kept] // S, slot_mapping[kept] % S
    k_pages[page, :, :, offset] = k[kept]
    v_pages[page, :, offset, :] = v[kept]
    return q


def _chunk_attention(
    q_HK: Tensor, k_nHK: Tensor, v_nHK: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One row over one chunk: maximum m [H], normaliser l [H] and unnormalised output o [H, K], fp32."""
    s_nH = soft_cap(fold((q_HK * k_nHK).permute(2, 0, 1)) * scale, cap)
    m = s_nH.amax(dim=0)
    p_nH = exp(s_nH - m).to(v_nHK.dtype).float()
    return m, fold(p_nH), fold(p_nH[:, :, None] * v_nHK.float())


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start_loc: Tensor, positions: Tensor,
    scale: float, window: int = 0, cap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Rule 4: each row attends to positions 0..positions[row] of its sequence, or to the last ``window`` of them.

    q [T, H, K]; one layer's pages k_pages [P, G, K, S], v_pages [P, G, S, K]; block_table int32 [B, max_blocks];
    query_start_loc int32 [B+1]: the rows of sequence b are query_start_loc[b] .. query_start_loc[b+1];
    positions int64 [T]; scale is rounded to fp32; cap: of the scores (soft_cap). Chunks are
    cut by absolute position, whatever the window. Returns [T, H*K].
    """
    T, H, K = q.shape
    G, S = k_pages.size(1), k_pages.size(3)
    scale = torch.tensor(scale, dtype=torch.float32).item()
    out = torch.empty_like(q)
    sequence_of_row = torch.repeat_interleave(query_start_loc.diff().long())
    for row in range(T):
        end = int(positions[row]) + 1
        first = max(0, end - window) if window else 0
        visible = torch.arange(first, end)
        page, offset = block_table[sequence_of_row[row]][visible // S].long(), visible % S
        k = k_pages[page, :, :, offset].float().repeat_interleave(H // G, dim=1)
        v = v_pages[page, :, offset, :].repeat_interleave(H // G, dim=1)
        q_row = q[row].float()
        chunks = [range(max(0, c - first), c + CHUNK - first) for c in range(first // CHUNK * CHUNK, end, CHUNK)]
        (m, l, o), *rest = (  # noqa: E741
            _chunk_attention(q_row, k[c.start : c.stop], v[c.start : c.stop], scale, cap) for c in chunks
        )
        for m_new, l_new, o_new in rest:
            m_max = torch.maximum(m, m_new)
            a, b = exp(m - m_max), exp(m_new - m_max)
            m, l, o = m_max, l * a + l_new * b, o * a[:, None] + o_new * b[:, None]  # noqa: E741
        out[row] = (o / l[:, None]).to(q.dtype)
    return out.view(T, H * K)


def out_residual(
    attention: Tensor, wo: Tensor, out_bias: Tensor | None, residual: Tensor, post_norm: Tensor | None = None,
    eps: float = 0.0, norm_offset: float = 0.0, multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """Output projection, its norm, and the residual sum.

    [T, H*K], packed [D, H*K], [D] or None, [T, D] -> [T, D]; post_norm [D] or None: no norm; what is added is
    multiplied by ``multiplier``.
    """
    y = linear(attention, wo, out_bias, residual.size(1))
    if post_norm is not None:
        y = rms_norm(y, post_norm, eps, norm_offset)
    return (residual.float() + _times(y, multiplier).float()).to(residual.dtype)


def norm_gate_up_act(
    hidden: Tensor, norm_weight: Tensor | None, w_gate: Tensor, w_up: Tensor, intermediate_size: int, eps: float,
    norm_offset: float = 0.0, gate_up_bias: Tensor | None = None, use_gelu: bool = False,
) -> Tensor:  # fmt: skip
    """RMSNorm, gate and up projections, silu(gate) * up, or gelu(gate) * up: [T, D] -> [T, F].

    norm_weight [D] or None: no norm; w_gate, w_up packed [F, D]; gate_up_bias [2 F] or None.
    """
    x = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps, norm_offset)
    biases = (None, None) if gate_up_bias is None else gate_up_bias.chunk(2)
    gate, up = (linear(x, w, bias, intermediate_size) for w, bias in zip((w_gate, w_up), biases, strict=True))
    activated = gelu(gate.float()) if use_gelu else silu(gate.float())
    return (activated.to(x.dtype).float() * up.float()).to(x.dtype)


def down_residual(
    activation: Tensor, w_down: Tensor, residual: Tensor, down_bias: Tensor | None = None,
    post_norm: Tensor | None = None, eps: float = 0.0, norm_offset: float = 0.0, multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """Down projection, its norm, and the residual sum, as out_residual: [T, F], packed [D, F], [T, D] -> [T, D]."""
    return out_residual(activation, w_down, down_bias, residual, post_norm, eps, norm_offset, multiplier)


def norm_head_argmax(
    hidden: Tensor, norm_weight: Tensor, lm_head: Tensor, vocab_size: int, eps: float, norm_offset: float = 0.0,
    multiplier: float = 1.0, cap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Final RMSNorm, LM head, rule 6: [T, D], [D], packed [V, D] -> tokens int64 [T], logits fp32 [T, V].

    The logits are multiplied by ``multiplier``, then capped (soft_cap). Raises RuntimeError when a logit is NaN.
    """
    logits = soft_cap(dot(rms_norm(hidden, norm_weight, eps, norm_offset), lm_head) * multiplier, cap)
    if logits.isnan().any():
        raise RuntimeError(NAN_LOGITS)
    tokens = torch.tensor([int((row == row.max()).nonzero()[0, 0]) for row in logits], dtype=torch.int64)
    return tokens, logits


NAN_LOGITS = (
    "norm_head_argmax: a logit is NaN, so no token can be chosen: the activations overflowed "
    "(fp16 holds at most 65504; try dtype=torch.bfloat16) or the weights are damaged"
)
