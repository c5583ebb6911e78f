"""`make gpu-static`: the Triton kernels compiled for the GPUs below at the shapes of real models, without a GPU.

Every kernel of the steps is compiled ahead of time and read: no spills, everything within the GPU's limits, weights
read 16 bytes at a time, no contracted or approximate arithmetic, no atomics on floats. Then what each step launches and
moves is counted against the paper (layerskip_kernels/roofline.py). The table shows registers, resident programs, and
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
SHAPES = ("llama3.2-1b", "llama2-7b", "llama3-8b")
STEPS = (("decode", 1), ("draft", 1), ("verify", 7))
COUNTED = (("decode", 4), ("decode", 8), ("decode", 16))
Case = tuple[str, str, str, int]  # shape, dtype, kind of step, rows
LATENCY = 0.7e-6  # seconds from a load to its data in a busy memory system: assumed, not measured
TOLERANCE = 0.02  # bytes of a step beside the count on paper
MAX_PER_LAYER, MAX_BESIDES = 6, 4
STREAMING = ("_qkv_rope_append_kernel", "_linear_residual_kernel", "_gate_up_silu_kernel", "_head_kernel")
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

    from layerskip_kernels.datasheets import GPUS

    compiled, limits, arguments = launch.compiled, LIMITS[target], launch.arguments
    loop: dict[str, int] = {}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        said = asm.amd_resources(text)
        registers, spilled = said["reg"], said["stack"] + said["local"]
        problems, multiply_adds = asm.amd_forbidden(text), asm.amd_multiply_adds(text)
        narrow: dict[int, int] = {}
    else:
        cubin, ptx = folder / "kernel.cubin", compiled.asm["ptx"]
        cubin.write_bytes(compiled.asm["cubin"])
        said = asm.nvidia_resources(cubin)
        registers, spilled = said["reg"], said["stack"] + said["local"]
        problems, multiply_adds = asm.ptx_forbidden(ptx), asm.ptx_multiply_adds(ptx)
        narrow = dict(asm.ptx_weight_loads(ptx))
        loops = asm.sass_loops(asm.disassemble(cubin)) if launch.name in STREAMING else []
        loop = dict(max(loops, key=lambda ops: ops["FFMA"] + ops["FMUL"], default={}))
    threads, shared = compiled.metadata.num_warps * limits.warp, compiled.metadata.shared
    resident = resident_programs(limits, threads, registers, shared)
    problems += resource_problems(limits, registers, spilled, shared, resident)
    if compiled.metadata.enable_fp_fusion:
        problems.append("compiled with enable_fp_fusion: ptxas and LLVM may contract")
    ir = asm.llvm_multiply_adds(compiled.asm["llir"])
    written, contractible = compiled.asm["ttgir"].count("math.fma"), asm.llvm_may_contract(compiled.asm["llir"])
    problems += arithmetic_problems(launch.name, dtype, written, ir, multiply_adds, contractible)
    kernel = Kernel(
        target, shape, dtype, launch.name, arguments.get("ROWS", 1), launch.grid, threads, registers, spilled, shared,
        resident, multiply_adds=multiply_adds, loop=loop, problems=problems,
    )  # fmt: skip
    if launch.name in STREAMING:
        gpu = GPUS[limits.gpu]
        load = asm.weight_layout(compiled.asm["ttgir"])
        kernel.widths, kernel.sectors = narrow or {load.bytes_at_once: 1}, load.sector_use
        kernel.problems += load_problems(kernel.widths, kernel.sectors, load.columns_first)
        kernel.loop_bytes = streamed_by_loop(loop, arguments, load.bytes_of_thread * limits.warp)
        at_a_time = min(resident, -(-launch.programs // gpu.multiprocessors))
        kernel.in_flight = at_a_time * threads * load.bytes_of_thread * arguments["AHEAD"] * arguments["TILES"]
        kernel.wanted = round(gpu.bandwidth * 1e9 / gpu.multiprocessors * LATENCY)
    return kernel


def streamed_by_loop(loop: dict[str, int], arguments: dict[str, Any], bytes_of_warp: int) -> int:
    """Weight bytes that a warp uses up in one pass through the loop, which may have been unrolled; 0 if unknown."""
    products = loop.get("FFMA" if arguments["FMA"] else "FMUL", 0)
    return products // (8 * arguments["ROWS"]) * bytes_of_warp


def loop_work(kernel: Kernel, num_bytes: int) -> dict[str, float]:
    """Instructions of warps that stream so many bytes of weights: in all, multiply-adds, loads of memory."""
    times = num_bytes / kernel.loop_bytes if kernel.loop_bytes else 0
    return {"instructions": times * sum(kernel.loop.values()), "multiply_adds": times * kernel.loop.get("FFMA", 0),
            "loads": times * kernel.loop.get("LDG", 0)}  # fmt: skip


def paper_bytes(config: Any, gpu: Any, step: Any, dtype: Any) -> int:
    """The same step by layerskip_kernels/roofline.py, after ``context`` positions."""
    from gpu_compile import EXIT_LAYER

    from layerskip_kernels import roofline

    if step.kind == "draft":
        return roofline.draft(config, gpu, EXIT_LAYER, 1, step.context, dtype).bytes
    if step.kind == "verify":
        return roofline.verify(config, gpu, EXIT_LAYER, step.rows - 1, step.context, dtype).bytes
    positions, layers = step.context + step.rows, config.num_layers
    return layers * roofline.layer_bytes(config, dtype, positions) + roofline.head_bytes(config, dtype)


def count_problems(moved: int, paper: int, in_layers: int, layers: int, besides: int) -> list[str]:
    problems = []
    if in_layers > MAX_PER_LAYER * layers or besides > MAX_BESIDES:
        problems.append(f"{in_layers} launches in {layers} layers and {besides} besides")
    if abs(moved - paper) > TOLERANCE * paper:
        problems.append(f"{moved} bytes, {paper} on paper")
    return problems


def count_step(config: Any, gpu: Any, step: Any, dtype: Any, launches: list[Any]) -> dict[str, Any]:
    """Launches and bytes of a step, as launched and on paper; weights that 8 more rows read again are counted apart."""
    from gpu_compile import EXIT_LAYER, activation_bytes, kv_bytes, weight_bytes

    layers = EXIT_LAYER if step.kind == "draft" else config.num_layers
    besides = sum(launch.name in ("_join_rows_kernel", "_head_kernel", "_take_draft_kernel", "_accept_draft_kernel")
                  for launch in launches)  # fmt: skip
    positions = step.context + step.rows
    again = sum(weight_bytes(launch) // launch.grid[1] * (launch.grid[1] - 1) for launch in launches
                if launch.name in STREAMING)  # fmt: skip
    again += sum(kv_bytes(launch, positions) // launch.grid[0] * (launch.grid[0] - 1) for launch in launches
                 if launch.name == "_attend_kernel")  # fmt: skip
    moved = sum(weight_bytes(la) + kv_bytes(la, positions) + activation_bytes(la) for la in launches) - again
    paper = paper_bytes(config, gpu, step, dtype)
    problems = count_problems(moved, paper, len(launches) - besides, layers, besides)
    return {"kind": step.kind, "rows": step.rows, "layers": layers, "launches": len(launches), "besides": besides,
            "bytes": moved, "again": again, "paper": paper, "problems": problems}  # fmt: skip


def check_target(job: tuple[str, list[Case]]) -> dict[str, Any]:
    """Compile and examine everything of a target: in a process of its own, for Triton remembers a target for good."""
    target, cases = job
    import gpu_compile

    from layerskip_kernels.datasheets import GPUS
    from layerskip_kernels.datasheets import SHAPES as CONFIGS

    gpu_compile.set_target(target)
    kernels: dict[str, Kernel] = {}
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, dtype, kind, rows in cases:
            step = gpu_compile.Step(kind, rows)
            launches = gpu_compile.record(CONFIGS[shape], gpu_compile.DTYPES[dtype], step)
            work = Counter[str]()
            for launch in launches:
                key = f"{launch.compiled.hash} {launch.grid}" if launch.name in STREAMING else launch.compiled.hash
                if key not in kernels:
                    kernels[key] = examine(target, shape, dtype, launch, Path(folder))
                work.update(loop_work(kernels[key], gpu_compile.weight_bytes(launch)))
            counts = count_step(CONFIGS[shape], GPUS[LIMITS[target].gpu], step, gpu_compile.DTYPES[dtype], launches)
            plans.append({"target": target, "shape": shape, "dtype": dtype, **counts, **work})
    return {"kernels": [asdict(kernel) for kernel in kernels.values()], "plans": plans}


# ---- the whole grid ----


def whole_grid(target: str) -> list[Case]:
    """bf16 everywhere; the other dtypes, whose kernels differ in their loads and roundings, on the smallest model; the
    rows that docs/performance.md counts on the GPU that it counts them for. More would compile for a long time."""
    counted = COUNTED if target == "sm_90" else ()
    cases = [(shape, "bf16", kind, rows) for shape in SHAPES for kind, rows in (*STEPS, *counted)]
    return cases + [("llama3.2-1b", dtype, "verify", rows) for dtype in ("fp16", "fp32") for rows in (1, 7)]


def check(jobs: list[tuple[str, list[Case]]], processes: int = 2) -> dict[str, Any]:
    """The kernels and the steps of all targets; a job is a target and its cases."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "gpu_static"))
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs)), maxtasksperchild=1) as pool:
        reports = pool.map(check_target, jobs, chunksize=1)
    return {key: [entry for report in reports for entry in report[key]] for key in ("kernels", "plans")}


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{'':<8}{'':<12}{'':<6}{'kernel':<18}{'rows':>5}{'grid':>7}{'threads':>8}{'regs':>6}{'shared':>8}"
             f"{'resident':>9}{'KiB in flight':>14}{'wanted':>8}"]  # fmt: skip
    for k in report["kernels"]:
        flight = f"{k['in_flight'] / 1024:>14.0f}{k['wanted'] / 1024:>8.1f}" if k["wanted"] else ""
        name = k["name"].strip("_").removesuffix("_kernel")
        lines.append(f"{k['target']:<8}{k['shape']:<12}{k['dtype']:<6}{name:<18}{k['rows']:>5}{k['grid'][0]:>7}"
                     f"{k['threads']:>8}{k['registers']:>6}{k['shared']:>8}{k['resident']:>9}{flight}")  # fmt: skip
        lines += [f"  FAILS {k['target']} {k['name']}, {k['rows']} rows: {problem}" for problem in k["problems"]]
    lines.append("")
    for p in report["plans"]:
        lines.append(f"{p['target']:<8}{p['shape']:<12}{p['dtype']:<6}{p['kind']:<7}{p['rows']:>3} rows:"
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
    print(f"\n{len(report['kernels'])} kernels and {len(report['plans'])} steps for "
          f"{', '.join(args.target or LIMITS)}: {failures} with problems")  # fmt: skip
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
