"""What the contract's order of sums costs: all matrices of a step in that order, and in a free one.

The package's kernels are compiled twice: as they are, and with one segment to a dot product instead of eight and leave
to reorder (order/kernels.cpp). Both multiply the same rows with the same packed matrices of SmolLM2-135M's shape, a
step's in their turn, on all threads. The first must give the package's bits, and the second others: else it would
be no other order.
"""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels import ModelConfig
from shapes import SMOLLM2, random_weight
from timing import BitsDiffer, Candidate, arguments, described, finish, interleave, limit_candidates, limits_of

HERE = Path(__file__).resolve().parent
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math"]  # fmt: skip
FREE = ["-DFREE_ORDER", "-fassociative-math", "-fno-signed-zeros"]
# Where the bf16 kernels of an instruction set are.
KERNELS = {
    "avx2": ("isa_avx2.cpp", "Avx2Kernels"),
    "avx_vnni": ("isa_avx2.cpp", "Avx2Kernels"),
    "avx512": ("isa_avx512.cpp", "Avx512Kernels"),
    "avx512_vnni": ("isa_avx512.cpp", "Avx512Kernels"),
    "avx512_bf16": ("isa_avx512_bf16.cpp", "Avx512Bf16Kernels"),
    "portable": ("isa_portable.cpp", "PortableKernels"),
}


class Matrix(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64)]


def main() -> None:
    args = arguments(__doc__, rounds=15)
    matrices = [(torch.ops.layerskip.pack_weight(random_weight(n, k)), n, k) for n, k in shapes(SMOLLM2)]
    x = torch.randn(max(ROWS), max(k for _, _, k in matrices), generator=torch.Generator().manual_seed(1)).bfloat16()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.threads) as pool:
        fixed, free = (Order(Path(folder) / name, flags, matrices, x, pool, args.threads)
                       for name, flags in (("fixed.so", []), ("free.so", FREE)))  # fmt: skip
        check(fixed, free, matrices, x)
        candidates = {f"{name} {rows}": Candidate(partial(order.multiply, rows))
                      for rows in ROWS for name, order in (("fixed", fixed), ("free", free))}  # fmt: skip
        timings = interleave(candidates, args.rounds)
    results = []
    for rows in ROWS:
        a, b = timings[f"fixed {rows}"], timings[f"free {rows}"]
        results.append({"rows": rows, "fixed": described(a), "free": described(b), "over_free": a.median / b.median})
    # Not in between: what comes after them, always the same number of rows, would pay for their memory.
    limits = limits_of(interleave(limit_candidates(), args.rounds))
    finish("order", {**limits, "results": results}, args.save)


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of the matrices that a step reads, in its order."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = [(q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size), (c.hidden_size, q)]
    layer += [(c.intermediate_size, c.hidden_size)] * 2 + [(c.hidden_size, c.intermediate_size)]
    return layer * c.num_layers + [(c.vocab_size, c.hidden_size)]


class Order:
    """The kernels in one order, compiled to ``path``. ``x`` [rows, K] bf16; a matrix takes the first of each row."""

    def __init__(self, path: Path, flags: list[str], matrices: list[tuple[Tensor, int, int]], x: Tensor,
                 pool: ThreadPoolExecutor, threads: int) -> None:  # fmt: skip
        source, tables = KERNELS[torch.ops.layerskip.instruction_set()]
        csrc = HERE.parent / "csrc"
        subprocess.run(
            [os.environ.get("CXX", "g++"), *FLAGS, *flags, f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}",
             f'-DKERNELS="{source}"', f"-DTABLES={tables}", str(HERE / "order/kernels.cpp"),
             str(csrc / "cpu/block_types.cpp"), "-o", str(path)],
            check=True,
        )  # fmt: skip
        self._products = ctypes.CDLL(str(path)).products
        self._matrices = (Matrix * len(matrices))(*((w.data_ptr(), n, k) for w, n, k in matrices))
        self._pool, self._threads = pool, threads
        # Each size of inputs has rows of its own, side by side; runs of matrices with the same inputs are one call.
        self._x = {k: x[:, :k].float().contiguous() for _, _, k in matrices}
        self._runs: list[tuple[int, int]] = []
        for i, (_, _, k) in enumerate(matrices):
            if not self._runs or matrices[self._runs[-1][0]][2] != k:
                self._runs.append((i, i))
            self._runs[-1] = (self._runs[-1][0], i + 1)
        self._outs = torch.zeros(threads, x.shape[0] * max(n for _, n, _ in matrices))  # of each thread, all matrices'

    def multiply(self, rows: int) -> None:
        """A step's products for so many rows."""
        list(self._pool.map(partial(self._part, rows), range(self._threads)))

    def last(self, rows: int) -> Tensor:
        """The last matrix's products [rows, n] of the latest ``multiply``: each thread has those of its columns."""
        n = self._matrices[len(self._matrices) - 1].n
        bounds = [-(-n // 16) * part // self._threads * 16 for part in range(self._threads + 1)]
        outs = self._outs[:, : rows * n].view(self._threads, rows, n)
        return torch.cat([outs[part, :, bounds[part] : bounds[part + 1]] for part in range(self._threads)], dim=1)

    def _part(self, rows: int, part: int) -> None:
        for first, end in self._runs:
            x = self._x[self._matrices[first].k]
            self._products(
                ctypes.byref(self._matrices, first * ctypes.sizeof(Matrix)), ctypes.c_int64(end - first),
                ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(rows), ctypes.c_int64(part),
                ctypes.c_int64(self._threads), ctypes.c_void_p(self._outs[part].data_ptr()),
            )  # fmt: skip


def check(fixed: Order, free: Order, matrices: list[tuple[Tensor, int, int]], x: Tensor) -> None:
    """That the last matrix's outputs are the package's, and the free order's others, as near as sums can be."""
    weight, n, k = matrices[-1]
    for rows in ROWS:
        expected = torch.ops.layerskip.linear(x[:rows, :k].contiguous(), weight, None, n).float()
        got: dict[str, Tensor] = {}
        for name, order in (("fixed", fixed), ("free", free)):
            order.multiply(rows)
            got[name] = order.last(rows)
        if not torch.equal(got["fixed"], expected):
            raise BitsDiffer(f"{rows} rows in the contract's order differ from the package's")
        if torch.equal(got["free"], expected) or not torch.allclose(got["free"], expected, rtol=0.02, atol=0.02):
            raise ValueError(f"{rows} rows: the free order is the contract's, or wrong")


if __name__ == "__main__":
    main()
