"""ggml's own quantiser, out of the library that xllamacpp brings."""

import ctypes
import importlib.util
from functools import cache

import torch
from torch import Tensor

from layerskip_kernels.ops import reference
from support.gguf_files import GgmlType


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml_blocks(rows: Tensor, name: str) -> Tensor:
    """Rows of numbers [N, K] as ggml rounds them, K whole blocks -> uint8 [N, blocks, bytes of a block]."""
    rows, kind = rows.float().contiguous(), reference.BLOCK_TYPES[name]
    n, k = rows.shape
    out = torch.zeros(n, k // kind.size, kind.nbytes, dtype=torch.uint8)
    number = int(GgmlType[name.upper()])
    written = _library().ggml_quantize_chunk(number, rows.data_ptr(), out.data_ptr(), 0, n, k, None)
    assert written == out.numel()
    return out
