"""Data movement in the paged cache: copy-on-write, export and swaps, for CPU and CUDA tensors.

Layouts, in the model's dtype (bf16, fp16 or fp32): k_cache [L, P, G, K, S], v_cache [L, P, G, S, K],
hidden_cache [P, S, D]; positions of a sequence outside its pages k, v [L, length, G, K]. Pages are int32. Only bits are
moved.

None of these ops waits for the device. So a bad page does not raise: it is skipped, nothing is written for it, and it
is noted in ``error``, int64 [1] on the cache's device, made by ``new_error`` and read, once in a while, by
``check_error``. Sizes, dtypes and devices are checked at once: ValueError or TypeError.

CPU tensors are served by ``_C``, CUDA tensors by ``_cuda``. Where the package was built without ``_cuda``
(``CUDA_MISSING`` says why), the same ops are torch's indexing on the device, ``copy_pages_by_indexing`` and
``move_kv_by_indexing``: the same bits in several launches, and page ids read back by the host.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

import layerskip_kernels.ops.extension  # noqa: F401 - registers the ops

__all__ = [
    "CUDA_MISSING",
    "check_error",
    "copy_pages",
    "copy_pages_by_indexing",
    "gather_kv",
    "gather_kv_into",
    "move_kv_by_indexing",
    "new_error",
    "raise_noted",
    "scatter_kv",
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
    1: "block {} of a sequence lies beyond its list of pages",
    2: "entry {} of a list of pages names a page outside the cache",
    3: "copy {} of copy_pages touches a page that another one writes",
}
REFUSAL_SHIFT = 48


def new_error(device: torch.device | str = "cpu") -> Tensor:
    """An empty error record, int64 [1], for the ops on that device; ops only ever add to it."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def check_error(error: Tensor) -> None:
    """Waits for the device; raises ValueError for what ops refused since the last check, and empties the record."""
    raise_noted(int(error), error)


def raise_noted(code: int, error: Tensor) -> None:
    """Raises what the ``code`` that was read from ``error`` means, and empties the record; nothing for 0."""
    if code:
        error.zero_()
        kind, index = code >> REFUSAL_SHIFT, (1 << REFUSAL_SHIFT) - 1 - (code & ((1 << REFUSAL_SHIFT) - 1))
        raise ValueError(f"a cache op refused bad data: {REFUSALS[kind].format(index)}; nothing was written for it")


def copy_pages(
    sources: Tensor, targets: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, error: Tensor
) -> None:
    """Copy whole pages, all layers and the hidden states: copy-on-write.

    sources, targets int32 [N], -1 for no copy. The copies run in any order, so those that touch a page which another
    one writes are refused.
    """
    torch.ops.layerskip.copy_pages(sources, targets, k_cache, v_cache, hidden_cache, error)


def gather_kv(
    pages: Tensor, length: int, k_cache: Tensor, v_cache: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first ``length`` positions of a sequence, k and v, both [L, length, G, K], on the cache's device.

    pages int32 [C]: the sequence's row of a block table. Positions of a refused page are zero.
    """
    if length < 0:
        raise ValueError(f"length must be 0 or more, got {length}")
    layers, _, heads, head_dim, _ = k_cache.shape
    k, v = (k_cache.new_empty(layers, length, heads, head_dim) for _ in "kv")
    gather_kv_into(pages, k_cache, v_cache, k, v, error)
    return k, v


def gather_kv_into(pages: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, error: Tensor) -> None:
    """gather_kv into k and v, on the cache's device or, for a cache on a GPU, in pinned host memory.

    The GPU writes there by itself: the host must wait for the stream before it reads.
    """
    torch.ops.layerskip.gather_kv(pages, k_cache, v_cache, k, v, error)


def scatter_kv(
    pages: Tensor, start: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, error: Tensor
) -> None:
    """The way back from ``gather_kv``: positions ``start`` to length - 1 of k and v, into the same pages or others.

    pages int32 [C], distinct. k and v on the cache's device or in host memory, pinned for a cache on a GPU, which reads
    it until the stream has been waited for.
    """
    torch.ops.layerskip.scatter_kv(pages, start, k, v, k_cache, v_cache, error)


# ---- CUDA tensors without _cuda ----


def copy_pages_by_indexing(
    sources: Tensor, targets: Tensor, k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, error: Tensor
) -> None:
    """copy_pages for pages that are all in the cache and distinct, or -1; anything else raises ValueError or noise."""
    chosen = (sources >= 0) & (targets >= 0)
    source, target = sources[chosen].long(), targets[chosen].long()
    for cache, pages in ((k_cache, 1), (v_cache, 1), (hidden_cache, 0)):
        cache.index_copy_(pages, target, cache.index_select(pages, source))


def move_kv_by_indexing(
    pages: Tensor, start: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: bool
) -> None:
    """gather_kv (``out``) and scatter_kv for pages that are all in the cache."""
    positions, size = torch.arange(start, k.size(1), device=k_cache.device), k_cache.size(-1)
    page, offset = pages.long()[positions // size], positions % size
    if out:
        # Contiguous, so that one copy brings them to pinned memory.
        k[:, start:].copy_(k_cache[:, page, :, :, offset].transpose(0, 1).contiguous(), non_blocking=True)
        v[:, start:].copy_(v_cache[:, page, :, offset, :].transpose(0, 1).contiguous(), non_blocking=True)
    else:
        k, v = (tensor.to(k_cache.device, non_blocking=True)[:, start:] for tensor in (k, v))
        k_cache[:, page, :, :, offset] = k.transpose(0, 1)
        v_cache[:, page, :, offset, :] = v.transpose(0, 1)


def _gather_by_indexing(pages: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, error: Tensor) -> None:
    move_kv_by_indexing(pages, 0, k, v, k_cache, v_cache, True)


def _scatter_by_indexing(
    pages: Tensor, start: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, error: Tensor
) -> None:
    move_kv_by_indexing(pages, start, k, v, k_cache, v_cache, False)


if CUDA_MISSING:
    _library = torch.library.Library("layerskip", "IMPL", "CUDA")
    _library.impl("copy_pages", copy_pages_by_indexing)
    _library.impl("gather_kv", _gather_by_indexing)
    _library.impl("scatter_kv", _scatter_by_indexing)
