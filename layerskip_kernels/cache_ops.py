"""Data movement in the paged cache: the ops that a GPU needs beside the model's own, and that the CPU has as well.

Layouts, in the model's dtype (bf16, fp16 or fp32): k_cache [L, P, G, K, S], v_cache [L, P, G, S, K],
hidden_cache [P, S, D]. Pages are int32, slots (page * S + position in the page), positions and counts int64; -1
means "skip this one". Only bits are moved.

None of these ops waits for the device, and each may stand in a captured CUDA graph. So a bad slot, page or count does
not raise: it is skipped, nothing is written for it, and it is noted in ``error``, int64 [1] on the cache's device,
made by ``new_error`` and read, once in a while, by ``check_error``. Sizes, dtypes and devices are checked at once:
ValueError or TypeError.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.library import register_fake

import layerskip_kernels._C  # noqa: F401 - registers the ops

__all__ = [
    "CUDA_MISSING",
    "append_kv",
    "check_error",
    "commit_lengths",
    "copy_pages",
    "gather_kv",
    "make_slot_mapping",
    "new_error",
    "new_records",
    "swap_in",
    "swap_out",
]


def _load_cuda() -> str | None:
    """Registers the ops for CUDA tensors, which asks for no driver and no device; or says why they are not there."""
    name = "layerskip_kernels._cuda"
    try:
        import_module(name)
    except ImportError as error:
        if error.name == name:
            return "not built; install with LAYERSKIP_CUDA=1, a CUDA build of torch and nvcc"
        return f"built, but it does not load: {error}"
    return None


CUDA_MISSING = _load_cuda()  # None: cache ops for CUDA tensors are registered

# Refusal of csrc/include/page_ops.h, in words; {} is the index of the first one refused.
REFUSALS = {
    1: "append_kv: slot_mapping[{}] lies outside the pages",
    2: "position {} (make_slot_mapping: the row; gather_kv: the page of the table) lies beyond its block table",
    3: "entry {} of a list of pages or a block table names a page outside the cache",
    4: "move {} of copy_pages or swap_in touches a page that another one writes",
    5: "commit_lengths: sequence {} has num_accepted outside 0..num_drafts, or would pass max_length",
}
REFUSAL_SHIFT = 48


def new_error(device: torch.device | str = "cpu") -> Tensor:
    """An empty error record, int64 [1], for the ops on that device; ops only ever add to it."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def check_error(error: Tensor) -> None:
    """Waits for the device; raises ValueError for what ops refused since the last check, and empties the record."""
    code = int(error)
    if code:
        error.zero_()
        kind, index = code >> REFUSAL_SHIFT, (1 << REFUSAL_SHIFT) - 1 - (code & ((1 << REFUSAL_SHIFT) - 1))
        raise ValueError(f"a cache op refused bad data: {REFUSALS[kind].format(index)}; nothing was written for it")


def append_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, k_pages: Tensor, v_pages: Tensor, error: Tensor) -> None:
    """Write rows of K and V into the pages of one layer.

    k, v [T, G, K]; slot_mapping int64 [T], distinct, or -1; k_pages [P, G, K, S], v_pages [P, G, S, K].
    """
    torch.ops.layerskip.append_kv(k, v, slot_mapping, k_pages, v_pages, error)


def copy_pages(
    sources: Tensor, targets: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, error: Tensor
) -> None:
    """Copy whole pages, all layers and the hidden states: copy-on-write.

    sources, targets int32 [N]. The copies run in any order, so those that touch a page which another one writes
    are refused.
    """
    torch.ops.layerskip.copy_pages(sources, targets, k_cache, v_cache, hidden_cache, error)


def new_records(count: int, k_cache: Tensor, hidden_cache: Tensor) -> Tensor:
    """Host memory for ``count`` pages, [count, R]: a page's k [L, G, K, S], v [L, G, S, K], hidden [S, D] in turn.

    Pinned for a cache on a GPU.
    """
    width = 2 * k_cache.numel() // k_cache.size(1) + hidden_cache[0].numel()
    return torch.empty(count, width, dtype=k_cache.dtype, pin_memory=k_cache.is_cuda)


def swap_out(
    pages: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, records: Tensor, error: Tensor
) -> None:
    """Copy pages int32 [N] to records [N, R] in host memory (``new_records``), which the GPU writes by itself.

    The records may be read on the host once the stream has been waited for.
    """
    torch.ops.layerskip.swap_out(pages, k_cache, v_cache, hidden_cache, records, error)


def swap_in(
    pages: Tensor, records: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, error: Tensor
) -> None:
    """The way back from ``swap_out``, to the same pages or to others: distinct ones, int32 [N]."""
    torch.ops.layerskip.swap_in(pages, records, k_cache, v_cache, hidden_cache, error)


def gather_kv(pages: Tensor, length: int, k_cache: Tensor, v_cache: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``length`` positions of a sequence, k and v, both [L, length, G, K]: for export.

    pages int32 [C]: the sequence's row of a block table. Positions of a refused page are zero.
    """
    return torch.ops.layerskip.gather_kv(pages, length, k_cache, v_cache, error)


def make_slot_mapping(
    block_table: Tensor, positions: Tensor, query_start_loc: Tensor, num_pages: int, page_size: int, error: Tensor
) -> Tensor:
    """Where rows go: slots int64 [T], -1 for those to skip and those refused.

    block_table int32 [B, C]; positions int64 [T], or -1; query_start_loc int32 [B+1]: the rows of sequence b are
    query_start_loc[b] to query_start_loc[b+1] - 1.
    """
    return torch.ops.layerskip.make_slot_mapping(block_table, positions, query_start_loc, num_pages, page_size, error)


def commit_lengths(num_accepted: Tensor, num_drafts: Tensor, lengths: Tensor, max_length: int, error: Tensor) -> None:
    """Raise ``lengths`` by what a verification accepted, num_accepted + 1: rejected rows vanish.

    num_accepted int64 [B], in 0..num_drafts, or -1; num_drafts, lengths int64 [B].
    """
    torch.ops.layerskip.commit_lengths(num_accepted, num_drafts, lengths, max_length, error)


# ---- fakes ----


@register_fake("layerskip::append_kv")
@register_fake("layerskip::copy_pages")
@register_fake("layerskip::swap_out")
@register_fake("layerskip::swap_in")
@register_fake("layerskip::commit_lengths")
def _(*args: object) -> None:
    return None


@register_fake("layerskip::gather_kv")
def _(pages: Tensor, length: int, k_cache: Tensor, v_cache: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    layers, _, heads, head_dim, _ = k_cache.shape
    return k_cache.new_empty(layers, length, heads, head_dim), k_cache.new_empty(layers, length, heads, head_dim)


@register_fake("layerskip::make_slot_mapping")
def _(block_table: Tensor, positions: Tensor, *args: object) -> Tensor:
    return torch.empty_like(positions)
