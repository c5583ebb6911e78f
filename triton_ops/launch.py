"""How the kernels that stream weights are launched: rows and columns a program, warps, registers, steps ahead.

Grids follow from the sizes and the number of rows alone, so that a step can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .contract import GROUP, INTERPRETED, SEGMENTS
from .tuned import config_of

__all__ = [
    "OPTIONS",
    "SPLIT",
    "begun_early",
    "blocks",
    "columns_of",
    "exact_products",
    "is_quantised",
    "is_split",
    "norm_layout",
    "rows_per_program",
    "split_memory",
    "streaming",
    "wide_dots_are_chains",
]

# Never contract a multiply and an add: the contract says where fma may stand.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

MAX_REGISTERS = 255  # of a thread
MAX_ROWS = 8  # rows that share a program's weights; more make more programs, which read them again
MAX_INTEGER_ROWS = 16  # the same where weights are quantised: up to so many cost what one costs
PROMPT_ROWS = 32  # from so many on, tiles of rows and columns are multiplied (prompt_dot.py, integer_tiles.py)
INTEGER_TILES = ((32, 64), (64, 128))  # rows and columns of a tile of quantised weights, by rows
SPLIT = 4  # programs that share a tile's columns where the segments of rule 1 are split over programs, two for each
if INTERPRETED:
    INTEGER_TILES = ((32, 32), (64, 32))

# Where ptxas, to keep one more program resident, lets bf16 kernels of so many rows spill, unless it is told that they
# may have all registers. (In the other dtypes it is told always. Where it does not spill, being told makes it worse.)
SPILLING = {"norm_qkv_rope_append": (1, 2, 4, 8), "out_residual": (1,)}
SPILLING_BEFORE_SM_90 = {"out_residual": (8,)}  # with half the steps ahead, too


def rows_per_program(num_rows: int, most: int = MAX_ROWS) -> int:
    """The power of two that holds ``num_rows``, at most ``most``."""
    return min(most, 1 << max(0, num_rows - 1).bit_length())


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def is_quantised(weight: Tensor) -> bool:
    """Whether a packed weight is multiplied by rule 8."""
    return weight.dtype in (torch.uint8, torch.int8, torch.int16)


def exact_products(dtype: torch.dtype) -> bool:
    """Whether products are exact in fp32, so that fma rounds as multiply and add do."""
    return dtype != torch.float32


def columns_of(op: str, *weights: Tensor) -> int:
    """Columns of a tile of the op's kernel."""
    return GROUP if any(map(is_quantised, weights)) else config_of(op).columns


def threads_per_warp() -> int:
    """32, or 64 on AMD's data-centre GPUs; the interpreter has no warps."""
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def before_sm_90() -> bool:
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < 90


def launches_depend() -> bool:
    """Whether a kernel may begin before the one ahead of it is done (programmatic dependent launch): from sm_90 on."""
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def wide_dots_are_chains() -> bool:
    """Whether Triton makes of attention's dots of fp32 numbers one chain of fma for each sum: not on AMD's GPUs, nor
    from sm_100 on, where it gives them to the tensor cores, as tf32, whatever precision they ask for."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < 100


def begun_early(dependent: bool) -> dict[str, bool]:
    """The argument and the option of a kernel that begins before the one ahead of it is done, or does not."""
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


def norm_layout(size: int, warps: int) -> dict[str, Any]:
    """What contract.norm_rows has to know, of rows of so many numbers, in a program of so many warps."""
    return {"THREADS": warps * threads_per_warp(), "WHOLE": size % (8 * SEGMENTS) == 0}


def is_split(num_rows: int, weight: Tensor) -> bool:
    """Whether the output projection's kernel splits segments over programs: of few rows, where tuned.Config says so."""
    return config_of("out_residual").split and num_rows < PROMPT_ROWS and not is_quantised(weight)


def split_memory(num_rows: int, size: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """For up to so many rows of ``size`` columns: the counters of the output projection's kernel, int32, all 0, of
    groups of rows and then of tiles; and partial sums, fp32, or None where no segments are split."""
    config, most = config_of("out_residual"), min(num_rows, PROMPT_ROWS - 1)
    if not config.split:
        return torch.zeros(num_rows, dtype=torch.int32, device=device), None
    rows = rows_per_program(most)
    groups, tiles = blocks(most, rows), blocks(size, SPLIT * config.columns)
    counters = max(num_rows, groups * (1 + tiles))
    partials = torch.empty(groups * tiles * rows * SPLIT * SPLIT * config.columns, device=device)
    return torch.zeros(counters, dtype=torch.int32, device=device), partials


def needs_all_registers(op: str, rows: int, dtype: torch.dtype) -> bool:
    """Whether ptxas must be told of a thread's registers lest it spill some: what it spares by itself differs."""
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return False
    spilling = (*SPILLING.get(op, ()), *(SPILLING_BEFORE_SM_90.get(op, ()) if before_sm_90() else ()))
    return dtype != torch.bfloat16 or rows in spilling


def streaming(op: str, num_rows: int, tiles: int, k: int, *weights: Tensor) -> dict[str, Any]:
    """The compile-time arguments and options of a kernel built on ``products``, with ``tiles`` tiles a program.

    weights: all that it streams, packed, of k inputs, in the model's dtype or quantised. Of the former, a thread holds
    a segment of one column of a tile: with more threads, they would load fewer bytes at once.
    """
    weight = next((weight for weight in weights if not is_quantised(weight)), None)
    config = config_of(op)
    dependent = config.dependent and launches_depend()
    many = num_rows >= PROMPT_ROWS and threads_per_warp() == 32  # on AMD's GPUs no dot's order is known
    if weight is None and many and config.prompt is not None:
        return streaming_tiles(num_rows, tiles, k)
    if weight is None or any(map(is_quantised, weights)):
        return streaming_integers(num_rows, tiles, k, weight, dependent)
    if many and config.prompt is not None:
        return streaming_prompts(tiles, *config.prompt, exact_products(weight.dtype))
    rows, columns = rows_per_program(num_rows), config.columns
    ahead = 1 if INTERPRETED else max(1, config.ahead[rows] * 2 // weight.element_size())
    if before_sm_90() and rows in SPILLING_BEFORE_SM_90.get(op, ()):
        ahead = max(1, ahead // 2)
    threads = SEGMENTS * columns
    options = dict(OPTIONS)
    if needs_all_registers(op, rows, weight.dtype):
        options["maxnreg"] = MAX_REGISTERS
    return dict(
        ROWS=rows, TILES=tiles, C=columns, AHEAD=ahead, EVEN=weight.size(1) % ahead == 0,
        FMA=exact_products(weight.dtype), PROMPT=False, num_warps=threads // threads_per_warp(),
        **begun_early(dependent), **options,
    )  # fmt: skip


def streaming_prompts(tiles: int, rows: int, columns: int, warps: int, exact: bool) -> dict[str, Any]:
    """The same for many rows, whose sums a program computes as one tile; ``tiles`` weights share its columns."""
    options = dict(OPTIONS, num_stages=1)
    if not INTERPRETED:
        options["maxnreg"] = MAX_REGISTERS
    return dict(
        ROWS=rows, TILES=tiles, C=columns // tiles, AHEAD=1, EVEN=False, FMA=exact, PROMPT=True, DEPENDENT=False,
        num_warps=warps, **options,
    )  # fmt: skip


def streaming_integers(num_rows: int, tiles: int, k: int, other: Tensor | None, dependent: bool) -> dict[str, Any]:
    """The same where a weight is quantised; ``other``: one that is not, if they are mixed.

    Four warps have two segments each; a product of theirs has eight rows or sixteen, asked for or not.
    """
    rows = rows_per_program(num_rows, MAX_INTEGER_ROWS if other is None else MAX_ROWS)
    if threads_per_warp() == 64 and other is None:
        rows = MAX_INTEGER_ROWS  # AMD multiplies no fewer
    options = dict(OPTIONS, num_stages=1)  # loads go straight to the registers of those who multiply them
    if not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    return dict(
        ROWS=rows, TILES=tiles, C=GROUP, AHEAD=1, EVEN=blocks(k, 32 * SEGMENTS) % 2 == 0,
        FMA=other is not None and exact_products(other.dtype), PROMPT=False, num_warps=4,
        **begun_early(dependent), **options,
    )  # fmt: skip


def streaming_tiles(num_rows: int, tiles: int, k: int) -> dict[str, Any]:
    """The same for many rows of quantised weights: a warp has sixteen columns of all of a program's rows."""
    rows, columns = next((tile for tile in INTEGER_TILES if num_rows <= tile[0]), INTEGER_TILES[-1])
    options = dict(OPTIONS, num_stages=1)
    if not INTERPRETED:
        options["maxnreg"] = MAX_REGISTERS
    return dict(
        ROWS=rows, TILES=tiles, C=columns // tiles, AHEAD=1, EVEN=blocks(k, 32 * SEGMENTS) % 2 == 0, FMA=False,
        PROMPT=True, DEPENDENT=False, num_warps=columns // GROUP, **options,
    )  # fmt: skip
