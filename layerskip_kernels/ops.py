"""Table of contents of the ops.

| op | reads -> gives |
|---|---|
| ``exp``, ``log``, ``silu``, ``inverse_sqrt`` | fp32, elementwise: rule 5, and 1 / sqrt |
| ``pack_weight`` | a linear weight [N, K] -> the backend's own layout |
| ``select_rows`` | rows of a packed weight -> a packed weight |
| ``embed_tokens`` | tokens [T] -> hidden [T, D] |
| ``linear`` | x [T, K] -> [T, N]: rule 1 |
| ``rms_norm`` | x [T, D] -> [T, D]: rule 2 |
| ``norm_qkv_rope_append`` | hidden [T, D] -> q [T, H, K]; k and v into their pages |
| ``paged_attention`` | q [T, H, K], pages -> [T, H*K] |
| ``out_residual`` | attention [T, H*K], residual [T, D] -> [T, D] |
| ``norm_gate_up_silu`` | hidden [T, D] -> activation [T, F] |
| ``down_residual`` | activation [T, F], residual [T, D] -> [T, D] |
| ``norm_head_argmax`` | hidden [T, D] -> tokens [T], logits [T, V] |
| ``accept_draft`` | drafts and targets -> accepted counts [B], next tokens [B] |
| ``philox`` | counters [N, 4] -> random words [N, 4]: rule 7 |
| ``gumbel`` | words [N] -> noise [N] |
| ``filter_logits`` | scores [T, V] -> divided by temperature, cut to top-k, top-p, min-p |
| ``gumbel_argmax`` | scores [T, V] -> tokens [T] drawn from them |
| ``rejection_sample`` | draft scores, scores [T, V], drafts [T] -> tokens [T] |
| ``run_layers`` | the one move: rows from their own depths to a layer |
| ``draft_step``, ``verify_step`` | the two steps, each one call |

Data movement in the cache (``append_kv``, ``copy_pages``, ``swap_out`` and others) is in ``cache_ops.py``. What each op
above means, with shapes and dtypes, is said once, in ``reference.py``; schemas stand in ``csrc/bindings.cpp``,
fakes below. A backend is anything with these names and signatures:

- ``reference``: plain PyTorch, row-major weights.
- ``cpu``: C++ (``torch.ops.layerskip``), weights packed by ``pack_weight``. Checks its arguments.
- ``triton``: kernels for GPUs (``triton_ops/``); its steps leave their results on the device.

and besides, because memory differs: ``empty`` (a tensor where the backend keeps them), ``placer`` (a function that puts
weights there) and ``to_host``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

import layerskip_kernels._C  # noqa: F401 - registers the ops
from layerskip_kernels import cache_ops, memory, reference

__all__ = ["BACKENDS", "backend", "cache_ops"]

BACKENDS = ("cpu", "reference", "triton")

GROUP = 16  # output columns in a packed weight group of the cpu backend


class HostOps:
    """A backend whose tensors are in host memory."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    empty = staticmethod(memory.empty)

    def placer(self) -> Callable[[Tensor], Tensor]:
        return memory.Arena().place

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


@cache
def backend(name: str) -> Any:
    """The ops of a backend, by name.

    Raises ValueError for one that does not exist, RuntimeError for one that can't run here.
    """
    if name == "triton":
        from layerskip_kernels.triton_backend import TritonOps

        return TritonOps()
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return HostOps(torch.ops.layerskip if name == "cpu" else reference)


# ---- fakes: shapes and dtypes without data, for torch.compile and export ----


@register_fake("layerskip::exp")
@register_fake("layerskip::log")
@register_fake("layerskip::silu")
@register_fake("layerskip::inverse_sqrt")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("layerskip::pack_weight")
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.size(0) + GROUP - 1) // GROUP, weight.size(1), GROUP)


@register_fake("layerskip::select_rows")
def _(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.new_empty((rows.size(0) + GROUP - 1) // GROUP, weight.size(1), GROUP)


@register_fake("layerskip::embed_tokens")
def _(tokens: Tensor, embedding: Tensor, hidden_size: int) -> Tensor:
    return embedding.new_empty(tokens.size(0), hidden_size)


@register_fake("layerskip::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(x.size(0), out_features)


@register_fake("layerskip::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@register_fake("layerskip::norm_qkv_rope_append")
def _(
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
    return hidden.new_empty(hidden.size(0), num_heads, k_pages.size(2))


@register_fake("layerskip::paged_attention")
def _(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start_loc: Tensor, positions: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.size(0), q.size(1) * q.size(2))


@register_fake("layerskip::out_residual")
def _(attention: Tensor, wo: Tensor, out_bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@register_fake("layerskip::norm_gate_up_silu")
def _(hidden: Tensor, norm_weight: Tensor, w_gate: Tensor, w_up: Tensor, intermediate_size: int, eps: float) -> Tensor:
    return hidden.new_empty(hidden.size(0), intermediate_size)


@register_fake("layerskip::down_residual")
def _(activation: Tensor, w_down: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@register_fake("layerskip::norm_head_argmax")
def _(hidden: Tensor, norm_weight: Tensor, lm_head: Tensor, vocab_size: int, eps: float) -> tuple[Tensor, Tensor]:
    rows = hidden.size(0)
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, vocab_size, dtype=torch.float32)


@register_fake("layerskip::accept_draft")
def _(tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(num_drafts), torch.empty_like(num_drafts)


@register_fake("layerskip::philox")
def _(counters: Tensor, seed: int) -> Tensor:
    return torch.empty_like(counters)


@register_fake("layerskip::gumbel")
def _(words: Tensor) -> Tensor:
    return torch.empty_like(words, dtype=torch.float32)


@register_fake("layerskip::filter_logits")
def _(scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    return torch.empty_like(scores)


@register_fake("layerskip::gumbel_argmax")
def _(scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
    return torch.empty_like(positions)


@register_fake("layerskip::rejection_sample")
def _(
    draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
) -> Tensor:
    return torch.empty_like(drafts)


@register_fake("layerskip::run_layers")
def _(*args: Any) -> None:
    return None


@register_fake("layerskip::draft_step")
def _(
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
    *sizes: Any,
) -> Tensor:
    return tokens.new_empty(tokens.size(0), max_drafts)


@register_fake("layerskip::verify_step")
def _(
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
    judged = torch.library.get_ctx().new_dynamic_size()  # sum(num_drafts + 1) depends on data
    logits = hidden_cache.new_empty(judged, vocab_size, dtype=torch.float32)
    return torch.empty_like(num_drafts), torch.empty_like(num_drafts), logits
