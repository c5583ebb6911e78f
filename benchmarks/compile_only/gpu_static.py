"""`make gpu-static`: the Triton kernels compiled for the GPUs below at the shapes of real models, without a GPU.

Every kernel of the steps is compiled ahead of time and read: no spills, everything within the GPU's limits, weights
read 16 bytes at a time, no contracted or approximate arithmetic, no atomics on floats; quantised weights are multiplied
by integer tensor cores, as they were loaded, without a word between threads. Then what each step launches and moves is
counted against the paper (layerskip_kernels/evaluation/floors.py). The table shows registers, resident programs, and
the bytes that they have on their way beside what the memory's latency asks for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = ("llama3.2-1b", "llama2-7b", "llama3-8b")
STEPS = (("decode", 1), ("draft", 1), ("verify", 7))
CHUNK = 256  # rows of a prompt that go through the layers at once
PROMPTS = ("bf16", "fp32", "int8", "int15", "q8_0", "q4_0", "q4_k_m")  # whose prompts docs/performance.md counts
COUNTED = (("decode", 4), ("decode", 8), ("decode", 16))
Case = tuple[str, str, str, int]  # shape, dtype, kind of step (one of CONFIGURED: a verification so launched), rows
CONFIGURED = ("dependent", "split")
LATENCY = 0.7e-6  # seconds from a load to its data in a busy memory system: assumed, not measured
TOLERANCE = 0.02  # bytes of a step beside the count on paper
MAX_PER_LAYER, MAX_BESIDES = 6, 4
MAX_ROUNDINGS = 4  # of rows to integers, a layer
CODES_OF_STEP = 1024  # bytes of codes that a warp takes from sixteen columns in a step
# Instructions of a warp for 2 KB of codes at up to 8 rows: what was reached, and a tenth. By far the most are the fp32
# terms of blocks (four to seven operations for each column, row and block of 32), which scales of segments have not.
MAX_INSTRUCTIONS = {
    "q4_0": 410, "q4_1": 530, "q5_0": 510, "q5_1": 630, "q8_0": 300, "q4_k": 650, "q5_k": 750, "q6_k": 950, "int8": 90,
    "int15": 90,
}  # fmt: skip
# The same of a tile of 64 rows, whose weights are unpacked once for all of them.
MAX_OF_TILE = {
    "q4_0": 1510, "q4_1": 2430, "q5_0": 1650, "q5_1": 2560, "q8_0": 1020, "q4_k": 2520, "q5_k": 2650, "q6_k": 3040,
    "int8": 200, "int15": 340,
}  # fmt: skip
# Instructions of a warp for each position of V in attention, by rows of a program, where the products are exact: what
# was reached (9 and 27), and room for other compilers.
MAX_PER_POSITION = {1: 14, 8: 35}
MOST_DECODED = 16  # rows that this is asked of: a prompt's attention is a small part of its work
MOST_SPILLED = 0.03  # of the instructions of a tile of quantised weights, some of whose types have many scales
LEAST_FMA = 0.75  # of the instructions in the loop of a prompt's kernel; 0.84 was reached
LEAST_FMA_OF_ATTENTION = 0.65  # the same of its loops over K and V, whose heads have fewer numbers; 0.68 to 0.79
KIND_ARGUMENTS = ("KIND", "Q_KIND", "K_KIND", "V_KIND", "GATE_KIND", "UP_KIND")
DEPENDENT = ("sm_90", "sm_100")  # which may begin before the kernel ahead of them is done
LEAST_EARLY = 0.8  # of the loads before its wait: ptxas put 2 of 15 behind it where q6_k takes 225 registers
MAY_DEPEND = (("bf16", 1), ("bf16", 7), ("fp32", 1), ("q4_k_m", 7), ("q4_k_m", 16), ("int8", 7))
STREAMING = ("_qkv_rope_append_kernel", "_linear_residual_kernel", "_gate_up_act_kernel", "_head_kernel")
MAY_FUSE = (*STREAMING, "_attend_kernel")  # in 16 bits: their products are exact


@dataclass(frozen=True)
class Limits:
    """A multiprocessor of a target: registers, threads, programs, shared bytes (and for one program), and a data sheet.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD Instinct MI300 ISA guide: a
    compute unit's four SIMDs have 512 registers for each of 64 lanes and room for 8 waves.
    """

    gpu: str
    registers: int
    register_unit: int
    threads: int
    programs: int
    shared: int
    shared_per_program: int
    warp: int = 32
    per_thread: int = 255


LIMITS = {
    "sm_80": Limits("a100", 65536, 256, 2048, 32, 164 << 10, 163 << 10),
    "sm_90": Limits("h100", 65536, 256, 2048, 32, 228 << 10, 227 << 10),
    "sm_100": Limits("b200", 65536, 256, 2048, 32, 228 << 10, 227 << 10),
    "gfx942": Limits("mi300x", 4 * 512 * 64, 8 * 64, 2048, 32, 64 << 10, 64 << 10, warp=64, per_thread=512),
}


@dataclass
class Kernel:
    """What was read of a kernel; ``in_flight`` are weight bytes on their way a multiprocessor, ``wanted`` what the
    data sheet's bandwidth asks for in LATENCY; ``loop`` counts the instructions of the loop that streams weights."""

    target: str
    shape: str
    dtype: str
    name: str
    rows: int
    grid: tuple[int, ...]
    threads: int
    registers: int
    spilled: int
    shared: int
    resident: int
    in_flight: int = 0
    wanted: int = 0
    widths: dict[int, int] = field(default_factory=dict)
    sectors: float = 1.0
    multiply_adds: int = 0
    loop: dict[str, int] = field(default_factory=dict)
    loop_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def resident_programs(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time; registers are given out a warp at a time."""
    warps = -(-threads // limits.warp)
    of_warp = -(-registers * limits.warp // limits.register_unit) * limits.register_unit
    by_registers = limits.registers // (of_warp * warps)
    by_shared = limits.shared // (shared + 1024) if shared else limits.programs
    return min(limits.programs, limits.threads // threads, by_registers, by_shared)


def arithmetic_problems(name: str, dtype: str, written: int, ir: int, assembly: int, contractible: int) -> list[str]:
    """Multiply-adds: those of the source (``written``; ``ir`` counts them unrolled) and no more, where allowed."""
    problems = []
    if contractible:
        problems.append(f"{contractible} operations that LLVM may contract or reorder")
    if written and (dtype == "fp32" or name not in MAY_FUSE):
        problems.append("fma where the contract has none")
    if assembly != ir or bool(written) != bool(ir):
        problems.append(f"{assembly} multiply-adds in the assembly, {ir} in LLVM's IR, {written} in the source")
    return problems


def resource_problems(limits: Limits, registers: int, spilled: int, shared: int, resident: int) -> list[str]:
    problems = []
    if spilled:
        problems.append(f"{spilled} bytes of registers spilled to memory")
    if registers > limits.per_thread:
        problems.append(f"{registers} registers, more than {limits.per_thread}")
    if shared > limits.shared_per_program:
        problems.append(f"{shared} shared bytes, more than {limits.shared_per_program}")
    if resident < 1:
        problems.append("no program fits into a multiprocessor")
    return problems


def load_problems(widths: dict[int, int], sectors: float, columns_first: bool) -> list[str]:
    problems = [f"weight loads of {width} bytes a thread, not 16" for width in widths if width != 16]
    if not widths:
        problems.append("no weight load was found")
    if not columns_first:
        problems.append("a warp holds several segments of few columns, so that it loads x many times over")
    if sectors < 1:
        problems.append(f"a warp's weight load uses {sectors:.0%} of the sectors that it touches")
    return problems


# ---- one process a target ----


def examine(target: str, shape: str, dtype: str, launch: Any, folder: Path) -> Kernel:
    """Everything above, of one compiled kernel."""
    import gpu_assembly as asm
    from layerskip_kernels.evaluation.datasheets import GPUS

    compiled, limits, arguments = launch.compiled, LIMITS[target], launch.arguments
    kinds = [arguments[key] for key in KIND_ARGUMENTS if arguments.get(key)]
    loop: dict[str, int] = {}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        said = asm.amd_resources(text)
        registers, spilled = said["reg"], said["stack"] + said["local"]
        problems, multiply_adds = asm.amd_forbidden(text), asm.amd_multiply_adds(text)
        problems += asm.amd_stores_on_their_way(text)
        narrow: dict[int, int] = {}
    else:
        cubin, ptx = folder / "kernel.cubin", compiled.asm["ptx"]
        cubin.write_bytes(compiled.asm["cubin"])
        said = asm.nvidia_resources(cubin)
        registers, spilled = said["reg"], said["stack"] + said["local"]
        problems, multiply_adds = asm.ptx_forbidden(ptx), asm.ptx_multiply_adds(ptx)
        narrow = dict(asm.ptx_weight_loads(ptx))
        if arguments.get("DEPENDENT"):
            asked = asked_besides(launch.name, arguments), launch.name in STREAMING
            problems += dependence_problems(ptx, asm.disassemble(cubin), *asked)
        sass = asm.disassemble(cubin) if launch.name in MAY_FUSE else ""
        loops = asm.sass_loops(sass)
        prompt = arguments.get("PROMPT", False)
        if launch.name == "_attend_kernel" and arguments["FMA"] and arguments["q_ptr"].size(0) <= MOST_DECODED:
            problems += position_problems(arguments["ROWS"], arguments["AT_ONCE"], loops)
        if launch.name == "_linear_residual_kernel" and arguments["FMA"] and not arguments["KIND"]:
            problems += norm_problems(8 if prompt else arguments["ROWS"], loops)
        if launch.name == "_linear_residual_kernel":
            problems += norm_store_problems(loops, asm.sass_stores(sass))
        if arguments.get("TILED"):
            problems += attention_tile_problems(asm.ptx_tile_loop(ptx), arguments, loops)
        loops = loops if launch.name in STREAMING else []
        if prompt:  # loops within loops, all of which have its products
            products = ("IMMA",) if kinds else ("FFMA", "FFMA2")
            if arguments["FMA"] or kinds:
                loops = [min(loops, key=lambda ops: (not any(map(ops.get, products)), sum(ops.values())))]
            else:
                loops = [max(loops, key=two_roundings)]
        loop = dict(max(loops, key=lambda ops: (ops["IMMA"], ops["FFMA"] + ops["FFMA2"] + ops["FMUL"]), default={}))
    threads, shared = compiled.metadata.num_warps * limits.warp, compiled.metadata.shared
    resident = resident_programs(limits, threads, registers, shared)
    # Of a prompt's tile, the sums of other segments may lie in memory while those of one grow, but no word of the loop.
    in_the_way = sum(loop.get(op, 0) for op in ("LDL", "STL")) if arguments.get("PROMPT") else spilled
    if arguments.get("TILED"):
        in_the_way = 0  # its loops were looked at
    if arguments.get("PROMPT") and kinds and in_the_way <= MOST_SPILLED * sum(loop.values()):
        in_the_way = 0
    problems += resource_problems(limits, registers, in_the_way, shared, resident)
    if compiled.metadata.enable_fp_fusion:
        problems.append("compiled with enable_fp_fusion: ptxas and LLVM may contract")
    ir = asm.llvm_multiply_adds(compiled.asm["llir"])
    written = compiled.asm["ttgir"].count("math.fma")
    if arguments.get("TILED") or (arguments.get("PROMPT") and arguments["FMA"]):
        written += compiled.asm["ttgir"].count("tt.dot ")
    contractible = asm.llvm_may_contract(compiled.asm["llir"])
    problems += arithmetic_problems(launch.name, dtype, written, ir, multiply_adds, contractible)
    kernel = Kernel(
        target, shape, dtype, launch.name, arguments.get("ROWS", 1), launch.grid, threads, registers, spilled, shared,
        resident, multiply_adds=multiply_adds, loop=loop, problems=problems,
    )  # fmt: skip
    if launch.name in STREAMING and kinds:
        kernel.widths = narrow or {16: 1}
        of_step = min(map(products_of_step, kinds)) * max(1, kernel.rows // 8)
        kernel.loop_bytes = loop.get("IMMA", 0) // of_step * CODES_OF_STEP
        kernel.problems += integer_problems(target, compiled.asm, loop, narrow)
        most = {8: MAX_INSTRUCTIONS, 64: MAX_OF_TILE}.get(max(8, kernel.rows))
        if most and len(set(kinds)) == 1:
            kernel.problems += instruction_problems(kinds[0], loop_work(kernel, 2048)["instructions"], most)
        kernel.in_flight = resident * threads * 32 * (1 if arguments["PROMPT"] else arguments["TILES"])
        kernel.wanted = round(GPUS[limits.gpu].bandwidth * 1e9 / GPUS[limits.gpu].multiprocessors * LATENCY)
    elif launch.name in STREAMING and arguments["PROMPT"] and not arguments["FMA"]:
        share = two_roundings(loop)
        kernel.problems += [] if share >= LEAST_FMA else [f"{share:.0%} of the loop are products and sums"]
        kernel.loop_bytes = loop.get("FMUL", 0) * 32 // kernel.rows * 4
    elif launch.name in STREAMING and arguments["PROMPT"]:
        tile = asm.ptx_tile_loop(compiled.asm["ptx"])
        kernel.widths, columns = dict(tile.widths), arguments["TILES"] * arguments["C"]
        kernel.problems += tile_problems(tile, columns * kernel.rows // threads, loop)
        adds = loop.get("FFMA", 0) + 2 * loop.get("FFMA2", 0)
        kernel.loop_bytes = adds * 32 // kernel.rows * 2  # of the warp's columns, each k of which has so many rows
    elif launch.name in STREAMING:
        gpu = GPUS[limits.gpu]
        load = asm.weight_layout(compiled.asm["ttgir"])
        kernel.widths, kernel.sectors = narrow or {load.bytes_at_once: 1}, load.sector_use
        kernel.problems += load_problems(kernel.widths, kernel.sectors, load.columns_first)
        kernel.loop_bytes = streamed_by_loop(loop, arguments, load.bytes_of_thread * limits.warp)
        at_a_time = min(resident, -(-launch.programs // gpu.multiprocessors))
        kernel.in_flight = at_a_time * threads * load.bytes_of_thread * arguments["AHEAD"] * arguments["TILES"]
        kernel.wanted = round(gpu.bandwidth * 1e9 / gpu.multiprocessors * LATENCY)
    return kernel


def two_roundings(loop: Counter[str] | dict[str, int]) -> float:
    """The share of fp32 products and sums in a loop, of a kernel whose products are rounded before they are added."""
    return (loop.get("FMUL", 0) + loop.get("FADD", 0)) / max(1, sum(loop.values()))


def tile_problems(tile: Any, sums: int, loop: dict[str, int]) -> list[str]:
    """Of a kernel that multiplies tiles, with so many sums a thread: chains of a dot's sixteen k."""
    problems = list(tile.problems)
    if len(tile.chains) != sums or set(tile.chains) != {16}:
        problems.append(f"chains of {sorted(set(tile.chains))} multiply-adds for {len(tile.chains)} sums, not {sums}")
    problems += [f"loads of {width} bytes a thread, not 16" for width in tile.widths if width != 16]
    if not tile.widths:
        problems.append("no load from memory was found in the loop")
    share = (loop.get("FFMA", 0) + loop.get("FFMA2", 0)) / max(1, sum(loop.values()))
    if not loop.get("FFMA2") and share < LEAST_FMA:
        problems.append(f"{share:.0%} of the loop's instructions are multiply-adds, not {LEAST_FMA:.0%}")
    return problems


def asked_besides(name: str, arguments: dict[str, Any]) -> int:
    """Loads of a dependent kernel before it waits that are no weights or codes: scales and high bits of a first step,
    for both columns of a lane, and the head's rows, which are copied in before a step. Where q, k and v differ in kind,
    each waits in a place of its own; of gate and up, the first alone waits."""
    if name not in STREAMING:
        return 0
    kinds = [arguments[key] for key in KIND_ARGUMENTS if key in arguments]
    rows, several = arguments["ROWS"], len(set(kinds)) > 1
    tiles = 1 if rows > 8 or (several and "GATE_KIND" in arguments) else arguments["TILES"]
    asked = [2 * tiles * (((kind & 15) in (5, 6)) + (not kind & 64)) if kind else 0 for kind in kinds]
    of_rows = (3 * max(1, rows // 8) if kinds[0] else rows) if name == "_head_kernel" else 0
    return of_rows + sum(asked if several and "Q_KIND" in arguments else asked[:1])


def dependence_problems(ptx: str, sass: str, others: int, weights: bool = True) -> list[str]:
    """Of a kernel that may begin before the one ahead: in PTX (ptx_dependence), and in what ptxas made of it."""
    import gpu_assembly as asm

    problems, asked = asm.ptx_dependence(ptx, others, weights), asm.sass_asked_before_wait(sass)
    wanted = asm.ptx_asked_before_wait(ptx)
    if asked is None or not LEAST_EARLY * wanted <= asked <= wanted:
        problems.append(f"{asked} loads before the wait for the kernel ahead in the machine's code, {wanted} in PTX")
    return problems


def products_of_step(kind: int) -> int:
    """Integer MMAs of a warp in a step of sixteen columns and eight rows: of two segments, blocks or planes, halves."""
    return 8 if kind & 15 == 6 else 4


def integer_problems(target: str, asm: dict[str, str], loop: dict[str, int], widths: dict[int, int]) -> list[str]:
    """Of a kernel that streams quantised weights."""
    if target == "gfx942":
        return [] if "v_mfma_i32" in asm["amdgcn"] else ["no integer MFMA"]
    problems = [f"code loads of {width} bytes a thread, not 16" for width in widths if width != 16]
    if not loop.get("IMMA"):
        problems.append("no integer MMA in a loop")
    moved = {op: loop[op] for op in ("STS", "LDS", "SHFL", "BAR") if loop.get(op)}
    if moved:
        problems.append(f"threads exchange what they loaded: {moved}")
    return problems


def instruction_problems(kind: int, instructions: float, most_of: dict[str, int]) -> list[str]:
    from gpu_compile import KIND_NAMED

    most = {KIND_NAMED[name].code: most for name, most in most_of.items()}[kind]
    return [f"{instructions:.0f} instructions for 2 KB of codes, at most {most}"] if instructions > most else []


def position_problems(rows: int, at_once: int, loops: list[Counter[str]]) -> list[str]:
    """Of attention's loop over V: it adds up p, and so has an addition for each of the positions of a turn."""
    of_v = [sum(ops.values()) / at_once for ops in loops
            if ops["FFMA"] + ops["FFMA2"] >= at_once <= ops["FADD"] and not ops["FMUL"]]  # fmt: skip
    most = MAX_PER_POSITION.get(rows)
    if not of_v:
        return ["no loop over V was found"]
    return [f"{min(of_v):.0f} instructions a position of V, at most {most}"] if most and min(of_v) > most else []


def attention_tile_problems(tile: Any, arguments: dict[str, Any], loops: list[Counter[str]]) -> list[str]:
    """Of attention to many rows: its loops over K and over V have sixteen products of each of a thread's sums."""
    threads = 32 * arguments["num_warps"]
    products = [16 * arguments["R"] * arguments[width] // threads for width in ("TILE", "K_PADDED")]
    found = [min((ops for ops in loops if ops["FFMA"] == count), key=lambda ops: sum(ops.values()), default=None)
             for count in products]  # fmt: skip
    problems = [problem for problem in tile.problems if not problem.startswith("beside")]  # p is added up there, too
    if set(tile.chains) != {16}:
        problems.append(f"chains of {sorted(set(tile.chains))} multiply-adds")
    for ops in found:
        if ops is None:
            problems.append("a loop of tiles was not found")
        elif ops["FFMA"] < LEAST_FMA_OF_ATTENTION * sum(ops.values()) or ops["LDL"] or ops["STL"]:
            problems.append(f"{ops['FFMA']} multiply-adds in a loop of {sum(ops.values())} instructions, or spills")
    return problems


def norm_problems(rows: int, loops: list[Counter[str]]) -> list[str]:
    """Of the norm at the end of a kernel, whose loops square and scale: its loads go out together."""
    loads = [ops["LDG"] for ops in loops if ops["FMUL"] + ops["FMUL2"] and ops["LDG"] and not ops["FFMA"]]
    least = 16 if rows == 1 else 8
    if len(loads) != 2:
        return [f"{len(loads)} loops of a norm, not 2"]
    return [f"a norm's loop loads {min(loads)} times before it computes, not {least}"] if min(loads) < least else []


def norm_store_problems(loops: list[Counter[str]], stores: list[Counter[int]]) -> list[str]:
    """Of the same norm's loop that scales and stores: 16 bytes a thread at once, and no thread waits for another."""
    scaling = [(ops, widths) for ops, widths in zip(loops, stores, strict=True)
               if widths and ops["FMUL"] + ops["FMUL2"] and ops["LDG"] and not ops["FFMA"]]  # fmt: skip
    if not scaling:
        return ["no loop of a norm that stores was found"]
    problems = [f"a norm stores {width} bytes a thread at once, not 16" for _, widths in scaling
                for width in widths if width != 16]  # fmt: skip
    return problems + [f"{ops['BAR']} barriers in a norm's loop" for ops, _ in scaling if ops["BAR"]]


def streamed_by_loop(loop: dict[str, int], arguments: dict[str, Any], bytes_of_warp: int) -> int:
    """Weight bytes that a warp uses up in one pass through the loop, which may have been unrolled; 0 if unknown."""
    op = "FFMA" if arguments["FMA"] else "FMUL"
    products = loop.get(op, 0) + 2 * loop.get(op + "2", 0)  # two at a time: sm_100
    return products // (8 * arguments["ROWS"]) * bytes_of_warp


def loop_work(kernel: Kernel, num_bytes: int) -> dict[str, float]:
    """Instructions of warps that stream so many bytes of weights: in all, multiply-adds, loads of memory."""
    times = num_bytes / kernel.loop_bytes if kernel.loop_bytes else 0
    return {"instructions": times * sum(kernel.loop.values()), "multiply_adds": times * kernel.loop.get("FFMA", 0),
            "loads": times * kernel.loop.get("LDG", 0), "shared_loads": times * kernel.loop.get("LDS", 0),
            "integer_products": times * kernel.loop.get("IMMA", 0)}  # fmt: skip


def packed_bytes(n: int, k: int, weights: str) -> int:
    """Of a matrix as kernels read it: what a file has of it, but that scales of six bits are bytes."""
    import torch

    from layerskip_kernels.evaluation.floors import matrix_bytes

    of_scales = 4 * n * -(-k // 256) if weights in ("q4_k", "q5_k") else 0
    return matrix_bytes((n, k), torch.bfloat16, weights) + of_scales


def quantised_bytes(config: Any, weights: str, layers: int) -> int:
    """Beyond a bf16 model's bytes (a negative number): those of quantised matrices."""
    from gpu_compile import types_of

    def beyond(n: int, k: int, name: str) -> int:
        return packed_bytes(n, k, name) - 2 * n * k

    fine, outer, other = types_of(weights)
    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    of_layer = beyond(2 * config.num_heads * k + config.num_kv_heads * k + 2 * f, d, other)
    of_layer += beyond(config.num_kv_heads * k, d, fine) + beyond(d, f, fine)
    return layers * of_layer + beyond(config.vocab_size, d, outer)


def paper_bytes(config: Any, gpu: Any, step: Any, numbers: str) -> int:
    """The same step by layerskip_kernels/evaluation/floors.py, after ``context`` positions."""
    from gpu_compile import EXIT_LAYER, NUMBERS

    dtype, weights = NUMBERS[numbers]
    if weights is not None:
        layers = EXIT_LAYER if step.kind == "draft" else config.num_layers
        return paper_bytes(config, gpu, step, "bf16") + quantised_bytes(config, weights, layers)
    from layerskip_kernels.evaluation import floors

    if step.kind == "draft":
        return floors.draft(config, gpu, EXIT_LAYER, 1, step.context, dtype).bytes
    if step.kind == "verify":
        return floors.verify(config, gpu, EXIT_LAYER, step.rows - 1, step.context, dtype).bytes
    positions, layers = step.context + step.rows, config.num_layers
    return layers * floors.layer_bytes(config, dtype, positions) + floors.head_bytes(config, dtype)


def count_problems(moved: int, paper: int, in_layers: int, layers: int, besides: int, roundings: int = 0) -> list[str]:
    problems = []
    if roundings > MAX_ROUNDINGS * layers + 1:
        problems.append(f"{roundings} times rows are rounded to integers in {layers} layers")
    if in_layers > MAX_PER_LAYER * layers or besides > MAX_BESIDES:
        problems.append(f"{in_layers} launches in {layers} layers and {besides} besides")
    if abs(moved - paper) > TOLERANCE * paper:
        problems.append(f"{moved} bytes, {paper} on paper")
    return problems


def count_step(config: Any, gpu: Any, step: Any, numbers: str, launches: list[Any]) -> dict[str, Any]:
    """Launches and bytes of a step, as launched and on paper; weights that 8 more rows read again are counted apart."""
    from gpu_compile import EXIT_LAYER, activation_bytes, kv_bytes, row_bytes, weight_bytes

    layers = EXIT_LAYER if step.kind == "draft" else config.num_layers
    besides = sum(launch.name in ("_join_rows_kernel", "_head_kernel", "_take_draft_kernel", "_accept_draft_kernel")
                  for launch in launches)  # fmt: skip
    roundings = sum(launch.name in ("_round_rows_kernel", "_turn_rows_kernel") for launch in launches)
    positions = step.context + step.rows
    again = sum(weight_bytes(launch) // launch.grid[0] * (launch.grid[0] - 1) for launch in launches
                if launch.name in STREAMING)  # fmt: skip
    again += sum(kv_bytes(launch, positions) // launch.grid[0] * (launch.grid[0] - 1) for launch in launches
                 if launch.name == "_attend_kernel")  # fmt: skip
    activations = sum(map(activation_bytes, launches))
    moved = sum(weight_bytes(la) + kv_bytes(la, positions) for la in launches) + activations - again
    paper = paper_bytes(config, gpu, step, numbers)
    # Beside weights of 4 bits, activations, which paper has none of, are several hundredths.
    compared = moved - (activations if roundings else 0)
    problems = count_problems(compared, paper, len(launches) - besides - roundings, layers, besides, roundings)
    return {"kind": step.kind, "rows": step.rows, "layers": layers, "launches": len(launches), "besides": besides,
            "roundings": roundings, "bytes": moved, "again": again, "paper": paper,
            "rows_read": sum(map(row_bytes, launches)), "problems": problems}  # fmt: skip


def check_target(job: tuple[str, list[Case]]) -> dict[str, Any]:
    """Compile and examine everything of a target: in a process of its own, for Triton remembers a target for good."""
    target, cases = job
    import gpu_compile
    from layerskip_kernels.evaluation.datasheets import GPUS
    from layerskip_kernels.evaluation.datasheets import SHAPES as CONFIGS

    gpu_compile.set_target(target)
    kernels: dict[str, Kernel] = {}
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (shape, dtype, kind, rows) in enumerate(cases, 1):
            print(f"{target}, {number} of {len(cases)}: {shape} {dtype} {kind}, {rows} rows", file=sys.stderr)
            said = {kind: True} if kind in CONFIGURED else {}
            step = gpu_compile.Step("verify" if said else kind, rows)
            if kind == "sampling":
                launches = gpu_compile.record_sampling(CONFIGS[shape], rows)
            else:
                with gpu_compile.configured(**said):
                    launches = gpu_compile.record(CONFIGS[shape], dtype, step)
            work = Counter[str]()
            for launch in launches:
                key = f"{launch.compiled.hash} {launch.grid}" if launch.name in STREAMING else launch.compiled.hash
                if key not in kernels:
                    kernels[key] = examine(target, shape, dtype, launch, Path(folder))
                work.update(loop_work(kernels[key], gpu_compile.weight_bytes(launch)))
            if kind == "sampling":  # a few rows of scores beside all weights: not on paper
                continue
            counts = count_step(CONFIGS[shape], GPUS[LIMITS[target].gpu], step, dtype, launches)
            counts["dependent"] = sum(bool(launch.arguments.get("DEPENDENT")) for launch in launches)
            steps.append({"target": target, "shape": shape, "dtype": dtype, **counts, **work})
    return {"kernels": [asdict(kernel) for kernel in kernels.values()], "steps": steps}


# ---- the whole grid ----


def whole_grid(target: str) -> list[Case]:
    """bf16 everywhere; the other dtypes, whose kernels differ in their loads and roundings, on the smallest model; the
    rows that docs/performance.md counts on the GPU that it counts them for; types of quantised weights on the smallest
    model, the mix that most files have at more rows. More would compile for a long time."""
    counted = COUNTED if target == "sm_90" else ()
    cases = [(shape, "bf16", kind, rows) for shape in SHAPES for kind, rows in (*STEPS, *counted)]
    cases += [("llama3.2-1b", dtype, "verify", rows) for dtype in ("fp16", "fp32") for rows in (1, 7)]
    cases += [("llama3.2-1b", "fp32", "sampling", 7)]
    cases += [("llama3.2-1b", dtype, "split", rows) for dtype in ("bf16", "fp32") for rows in (1, 7)]
    if target in DEPENDENT:
        cases += [("llama3.2-1b", numbers, "dependent", rows) for numbers, rows in MAY_DEPEND]
    cases += [("llama3.2-1b", "q4_k_m", kind, rows) for kind, rows in (*STEPS, ("verify", 16))]
    if target != "gfx942":
        cases += [("llama3.2-1b", numbers, "prompt", 64) for numbers in ("bf16", "fp32", "q4_0", "int8")]
    if target == "sm_90":
        cases += [("llama3-8b", numbers, "prompt", CHUNK) for numbers in PROMPTS]
    return cases + [("llama3.2-1b", name, "verify", 7) for name in MAX_INSTRUCTIONS]


def check(jobs: list[tuple[str, list[Case]]], processes: int = 2) -> dict[str, Any]:
    """The kernels and the steps of all targets; a job is a target and its cases."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "gpu_static"))
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs)), maxtasksperchild=1) as pool:
        reports = pool.map(check_target, jobs, chunksize=1)
    return {key: [entry for report in reports for entry in report[key]] for key in ("kernels", "steps")}


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{'':<8}{'':<12}{'':<7}{'kernel':<18}{'rows':>5}{'grid':>7}{'threads':>8}{'regs':>6}{'shared':>8}"
             f"{'resident':>9}{'KiB in flight':>14}{'wanted':>8}"]  # fmt: skip
    for k in report["kernels"]:
        flight = f"{k['in_flight'] / 1024:>14.0f}{k['wanted'] / 1024:>8.1f}" if k["wanted"] else ""
        if k["loop"].get("IMMA") and k["loop_bytes"]:
            flight += f"{sum(k['loop'].values()) * 2048 / k['loop_bytes']:>6.0f} instructions for 2 KB of codes"
        name = k["name"].strip("_").removesuffix("_kernel")
        lines.append(f"{k['target']:<8}{k['shape']:<12}{k['dtype']:<7}{name:<18}{k['rows']:>5}{max(k['grid']):>7}"
                     f"{k['threads']:>8}{k['registers']:>6}{k['shared']:>8}{k['resident']:>9}{flight}")  # fmt: skip
        lines += [f"  FAILS {k['target']} {k['name']}, {k['rows']} rows: {problem}" for problem in k["problems"]]
    lines.append("")
    for p in report["steps"]:
        lines.append(f"{p['target']:<8}{p['shape']:<12}{p['dtype']:<7}{p['kind']:<7}{p['rows']:>3} rows:"
                     f"{p['launches']:>5} launches ({p['besides']} besides the layers'){p['bytes'] / 1e6:>10.1f} MB, "
                     f"{p['paper'] / 1e6:.1f} on paper; {p['again'] / 1e6:.1f} read again")  # fmt: skip
        lines += [f"  FAILS {p['shape']} {p['kind']}: {problem}" for problem in p["problems"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=tuple(LIMITS), help="default: all")
    parser.add_argument("--case", action="append", help="shape,dtype,kind,rows; default: the whole grid")
    parser.add_argument("--json", type=Path, help="write everything that was found")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/performance.md, too")
    args = parser.parse_args()
    cases = [(*case.split(",")[:3], int(case.split(",")[3])) for case in args.case or ()]
    report = check([(target, cases or whole_grid(target)) for target in args.target or LIMITS])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.markdown:
        import gpu_paper

        print(gpu_paper.as_markdown(report), end="\n\n")
    print(as_text(report))
    failures = sum(bool(entry["problems"]) for key in report for entry in report[key])
    print(f"\n{len(report['kernels'])} kernels and {len(report['steps'])} steps for "
          f"{', '.join(args.target or LIMITS)}: {failures} with problems")  # fmt: skip
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
