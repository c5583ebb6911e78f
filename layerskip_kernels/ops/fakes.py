"""Shapes and dtypes of every op's results, without data: for torch.compile and export.

In the order of the schemas (csrc/bindings.cpp), whose names and parameters they have.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import register_fake

import layerskip_kernels.ops.extension  # noqa: F401 - registers the ops

__all__: list[str] = []

GROUP = 16  # output columns in a packed weight group of the cpu backend
# Of a block whose packed form has other bytes than a file's (csrc/cpu/block_types.cpp).
PACKED_BYTES = {144: 148, 176: 180}

Fake = TypeVar("Fake", bound=Callable[..., Any])


def _fake(function: Fake) -> Fake:
    """Register a function as the fake of the op that has its name."""
    register_fake(f"layerskip::{function.__name__}")(function)
    return function


def _unknown_size() -> Any:
    """One that depends on data, or on the model behind a number."""
    return torch.library.get_ctx().new_dynamic_size()


@_fake
def exp(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def log(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def silu(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def gelu(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def tanh(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def inverse_sqrt(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake
def pack_weight(weight: Tensor) -> Tensor:
    width = GROUP * PACKED_BYTES.get(weight.size(2), weight.size(2)) if weight.dtype == torch.uint8 else GROUP
    return weight.new_empty((weight.size(0) + GROUP - 1) // GROUP, weight.size(1), width)


@_fake
def select_rows(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.new_empty((rows.size(0) + GROUP - 1) // GROUP, weight.size(1), weight.size(2))


@_fake
def embed_tokens(
    tokens: Tensor, embedding: Tensor, hidden_size: int, dtype: torch.dtype, multiplier: float = 1.0
) -> Tensor:
    return embedding.new_empty(tokens.size(0), hidden_size, dtype=dtype)


@_fake
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(x.size(0), out_features)


@_fake
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return torch.empty_like(x)


@_fake
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
    return hidden.new_empty(hidden.size(0), num_heads, k_pages.size(2))


@_fake
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    return q.new_empty(q.size(0), q.size(1) * q.size(2))


@_fake
def out_residual(
    attention: Tensor,
    wo: Tensor,
    out_bias: Tensor | None,
    residual: Tensor,
    post_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    multiplier: float = 1.0,
) -> Tensor:
    return torch.empty_like(residual)


@_fake
def norm_gate_up_act(
    hidden: Tensor,
    norm_weight: Tensor | None,
    w_gate: Tensor,
    w_up: Tensor,
    intermediate_size: int,
    eps: float,
    norm_offset: float = 0.0,
    gate_up_bias: Tensor | None = None,
    use_gelu: bool = False,
) -> Tensor:
    return hidden.new_empty(hidden.size(0), intermediate_size)


@_fake
def down_residual(
    activation: Tensor,
    w_down: Tensor,
    residual: Tensor,
    down_bias: Tensor | None = None,
    post_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    multiplier: float = 1.0,
) -> Tensor:
    return torch.empty_like(residual)


@_fake
def norm_head_argmax(
    hidden: Tensor,
    norm_weight: Tensor,
    lm_head: Tensor,
    vocab_size: int,
    eps: float,
    norm_offset: float = 0.0,
    multiplier: float = 1.0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    rows = hidden.size(0)
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, vocab_size, dtype=torch.float32)


@_fake
def accept_draft(
    tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor, judged: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(num_drafts), torch.empty_like(num_drafts)


@_fake
def philox(counters: Tensor, seed: int) -> Tensor:
    return torch.empty_like(counters)


@_fake
def gumbel(words: Tensor) -> Tensor:
    return torch.empty_like(words, dtype=torch.float32)


@_fake
def edit_logits(
    logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: list[Tensor]
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


@_fake
def filter_logits(scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    return torch.empty_like(scores)


@_fake
def gumbel_argmax(scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
    return torch.empty_like(positions)


@_fake
def rejection_sample(
    draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
) -> Tensor:
    return torch.empty_like(drafts)


@_fake
def keep_model(weights: list[Tensor], num_kv_heads: int, head_dim: int, ints: list[int], floats: list[float]) -> int:
    raise NotImplementedError("a model is kept before anything is traced")


@_fake
def run_layers(
    model: int,
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    depths: Tensor,
    query_start_loc: Tensor,
    block_table: Tensor,
    stop: int,
) -> None:
    return None


@_fake
def draft_pass(
    model: int,
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    num_drafts: Tensor,
    block_table: Tensor,
    draft_head: Tensor | None,
    draft_ids: Tensor | None,
    sampling: list[Tensor],
    stops: list[Tensor],
    exit_layer: int,
    max_drafts: int,
    keep_scores: bool,
    adapter_exits: list[int],
    adapters: list[int],
    adapter_k: list[Tensor],
    adapter_v: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences, vocab_size = tokens.size(0), _unknown_size()  # of the model
    return (
        tokens.new_empty(sequences, max_drafts),
        torch.empty_like(num_drafts),
        tokens.new_empty(sequences, max_drafts, dtype=torch.float32),
        tokens.new_empty(sequences if keep_scores else 0, max_drafts, vocab_size, dtype=torch.float32),
    )


@_fake
def verify_pass(
    model: int,
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    depths: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    judged: Tensor,
    block_table: Tensor,
    adapter_exits: list[int],
    adapters: list[int],
    adapter_k: list[Tensor],
    adapter_v: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    judged_rows = _unknown_size()  # sum(num_drafts + 1)
    logits = hidden_cache.new_empty(judged_rows, _unknown_size(), dtype=torch.float32)
    return torch.empty_like(num_drafts), torch.empty_like(num_drafts), logits


@_fake
def decode_pass(
    model: int,
    drafting: int,
    k_cache: Tensor,
    v_cache: Tensor,
    hidden_cache: Tensor,
    tokens: Tensor,
    positions: Tensor,
    num_drafts: Tensor,
    block_table: Tensor,
    draft_head: Tensor | None,
    draft_ids: Tensor | None,
    stops: list[Tensor],
    ends: Tensor,
    exit_layer: int,
    max_drafts: int,
    num_cycles: int,
    adapter_exits: list[int],
    adapters: list[int],
    adapter_k: list[Tensor],
    adapter_v: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cycles, sequences = _unknown_size(), tokens.size(0)  # at most num_cycles
    drafts, counts = tokens.new_empty(cycles, sequences, max_drafts), tokens.new_empty(cycles, sequences)
    seconds = tokens.new_empty(cycles, 2, dtype=torch.float64)
    return drafts, counts, drafts.float(), torch.empty_like(counts), torch.empty_like(counts), seconds


@_fake
def copy_pages(
    sources: Tensor, targets: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, error: Tensor
) -> None:
    return None


@_fake
def gather_kv(pages: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, error: Tensor) -> None:
    return None


@_fake
def scatter_kv(
    pages: Tensor, start: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, error: Tensor
) -> None:
    return None
