"""What a compiled Triton kernel is made of, read from its assembly: arithmetic, loads, registers. Text in, numbers out.

NVIDIA: PTX for the arithmetic (ptxas adds none of its own under --fmad=false, but for the expansions of div.rn and
sqrt.rn), cuobjdump for registers and stack, SASS for loops. AMD: the amdgcn assembly, where IEEE divisions and roots
are expanded already: each has a known number of multiply-adds, which are taken off.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import triton

NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"

# ---- NVIDIA ----

PTX_FORBIDDEN = {
    "an approximation": r"\S*\.approx\S*|(?:ex2|lg2|rcp|rsqrt|sin|cos|tanh)\.\S+",
    "denormals flushed to zero": r"\S+\.ftz\S*",
    "div.full": r"div\.full\S*",
    "a division or root that is not rounded to nearest": r"(?:div|sqrt)\.(?!rn\b)(?:\S*\.)?f(?:16|32|64)\b",
    "floats that tensor cores multiply": r"(?:tcgen05\.|wg)?mma\S*(?:tf32|f16|bf16|f8)\S*",
    "an atomic on floats": r"(?:atom|red)\.\S*\.b?f(?:16|32|64)\S*",
    "a conversion to 16 bits that is not rounded to nearest": r"cvt\.(?!rn\b)\S*\bb?f16(?:x2)?\.f32\S*",
}

BF16_ONE, BF16_ZERO = "0x3F80|16256|1065369472", "0x8000|-32768|-2147450880"  # 1 and -0, alone and in pairs


def ptx_instructions(ptx: str) -> list[str]:
    """Opcodes with their suffixes; no comments, labels, directives or predicates."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx.splitlines())
    return re.findall(r"^(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)", "\n".join(lines), re.MULTILINE)


def ptx_forbidden(ptx: str) -> list[str]:
    """Instructions that the contract forbids everywhere, each with what is wrong with it."""
    found = Counter(
        f"{what}: {op}"
        for op in ptx_instructions(ptx)
        for what, pattern in PTX_FORBIDDEN.items()
        if re.fullmatch(pattern, op) or re.match(pattern + "$", op)
    )
    return [f"{text} ({count} times)" for text, count in found.items()]


def ptx_multiply_adds(ptx: str) -> int:
    """Floating-point multiply-adds; one on two numbers counts twice. A bf16 sum or product is none: sm_80 has no other
    instruction for them than a multiply-add with the factor 1 or the summand -0, which rounds once and the same way."""
    ops = [op for op in ptx_instructions(ptx) if re.fullmatch(r"(?:fma|mad)\.(?:\S*\.)?b?f(?:16|32|64)(?:x2)?", op)]
    one, zero = (
        set(re.findall(rf"mov\.[bu](?:16|32)\s+(%rs?\d+), (?:{bits});", ptx)) for bits in (BF16_ONE, BF16_ZERO)
    )
    bf16 = re.findall(r"fma\.rn\.bf16(x2)?\s+%rs?\d+, %rs?\d+, (%rs?\d+), (%rs?\d+);", ptx)
    single = sum(1 + bool(pair) for pair, factor, summand in bf16 if factor in one or summand in zero)
    return sum(1 + op.endswith("x2") for op in ops) - single


def ptx_weight_loads(ptx: str) -> Counter[int]:
    """Bytes a thread loads at once, of the loads that leave the caches first: how kernels read weights."""
    widths: Counter[int] = Counter()
    for op in ptx_instructions(ptx):
        if match := re.fullmatch(r"ld\.global\S*evict_first\S*?(?:\.v(\d))?\.[bsuf](\d+)", op):
            widths[int(match[1] or 1) * int(match[2]) // 8] += 1
    return widths


@dataclass(frozen=True)
class TileLoop:
    """The loop of a kernel that multiplies tiles, in PTX: for each sum how many multiply-adds follow one another in a
    turn; bytes that a thread loads at once from memory; and what is wrong with it."""

    chains: list[int]
    widths: Counter[int]
    problems: list[str]


def ptx_tile_loop(ptx: str) -> TileLoop:
    """Each sum must be one chain: what a multiply-add gives is the summand of one other, and nothing else. (A compiler
    may write the same one down twice.)"""
    lines = [re.sub(r"//.*", "", line).strip() for line in ptx.splitlines()]
    blocks = re.split(r"^(?:\$L__BB\S+:|(?:@!?%p\d+ )?bra\S* .*)$", "\n".join(lines), flags=re.MULTILINE)
    block = max(blocks, key=lambda text: text.count("fma.rn.f32"))
    length: dict[str, int] = {}
    passed: dict[str, tuple[str, str]] = {}  # sums that were taken on, and what was added
    problems = []
    for result, a, b, summand in _ptx_single_adds(block):
        if a in length or b in length or a in passed or b in passed:
            problems.append("a sum is multiplied")
        if summand in passed:
            if passed[summand] != (a, b):
                problems.append("a sum is used twice")
            continue
        if summand in length:
            passed[summand] = (a, b)
        length[result] = length.pop(summand, 0) + 1
    chains = list(length.values())
    others = re.findall(r"\b(?:add|mul|sub)\.\S*f32\S*", block)
    problems += [f"beside the chains: {op}" for op in sorted(set(others))]
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", block)
    return TileLoop(chains, Counter(int(count or 1) * int(bits) // 8 for count, bits in loads), sorted(set(problems)))


def _ptx_single_adds(block: str) -> Iterator[tuple[str, str, str, str]]:
    """Multiply-adds as (result, factor, factor, summand); those of pairs one by one, however numbers are paired."""
    same: dict[str, str] = {}  # numbers of pairs (register.0, register.1) and what they are known by elsewhere
    add = r"fma\.rn\.f32(x2)?\s+(%\w+), (%\w+), (%\w+), (%\w+);"
    pairing = r"mov\.b64\s+(%\w+), \{(%\w+), (%\w+)\};|mov\.b64\s+\{(%\w+), (%\w+)\}, (%\w+);"
    for match in re.finditer(f"{add}|{pairing}", block):
        pair, result, a, b, summand, paired, first, second, *single = match.groups()
        if paired:
            same |= {f"{paired}.{i}": same.get(name, name) for i, name in enumerate((first, second))}
        elif single[0]:
            same |= {single[i]: same.get(f"{single[2]}.{i}", f"{single[2]}.{i}") for i in range(2)}
        for lane in (".0", ".1") if pair else ("",) if result else ():
            same.pop(result + lane, None)
            yield result + lane, *(same.get(name + lane, name + lane) for name in (a, b, summand))


def ptx_dependence(ptx: str, others: int, weights: bool = True) -> list[str]:
    """Of a kernel that may begin before the one ahead of it is done: what it does, on any way through it, before it
    waits for that one. It may ask for weights, which leave the caches first, and for so many ``others`` that nobody
    writes; if it has ``weights``, it must ask for some.
    """
    ways = _ptx_ways(ptx)
    before = _before_wait(ways, "griddepcontrol.wait")
    ops = [op for op, *_ in ways]
    waits, lets = (ops.count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
    if before is None or waits != lets:
        return [f"waits for the kernel ahead in {waits} places, on some way in none, and lets the next begin in {lets}"]
    touched = [op for op in before if re.match(r"(?:ld|st|atom|red|cp)\.(?!param)(?:\S*\.)?(?:global|async)", op)]
    asked = [op for op in touched if op.startswith("ld.global") and "evict_first" in op]
    problems = []
    if weights and len(asked) < waits:
        problems.append("asks for no weight before it waits for the kernel ahead")
    strange = [op for op in touched if op not in asked]
    if len(strange) > others or any(not op.startswith("ld.global") for op in strange):
        problems.append(f"before it waits for the kernel ahead: {len(strange)} of {', '.join(sorted(set(strange)))}")
    if "griddepcontrol.launch_dependents" in before:
        problems.append("lets the next kernel begin before it has waited for the one ahead")
    return problems


def ptx_asked_before_wait(ptx: str) -> int | None:
    """Loads of memory on all ways to the wait for the kernel ahead. None: some way has no wait."""
    before = _before_wait(_ptx_ways(ptx), "griddepcontrol.wait")
    return None if before is None else sum(op.startswith("ld.global") for op in before)


def sass_asked_before_wait(sass: str) -> int | None:
    """The same in the machine's code, whose wait is ACQBULK."""
    before = _before_wait(_sass_ways(sass), "ACQBULK")
    return None if before is None else before.count("LDG")


Ways = list[tuple[str, bool, int | None]]  # opcodes; whether one may be skipped; where it jumps to


def _before_wait(ways: Ways, wait: str) -> list[str] | None:
    """The opcodes that a thread may come to before ``wait``. None: it may end without."""
    seen, to_see = set(), [0]
    while to_see:
        at = to_see.pop()
        if at in seen:
            continue
        if at == len(ways):
            return None
        seen.add(at)
        op, skipped, target = ways[at]
        if op == wait and not skipped:
            continue
        if op in ("ret", "exit", "EXIT", "RET"):
            return None
        if target is not None:
            to_see.append(target)
        if skipped or target is None:
            to_see.append(at + 1)
    return [ways[at][0] for at in sorted(seen) if ways[at][0] != wait]


def _ptx_ways(ptx: str) -> Ways:
    lines = [re.sub(r"//.*", "", line).strip() for line in ptx.splitlines()]
    return _ways(lines, r"(@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)(.*)")


def _sass_ways(sass: str) -> Ways:
    return _ways(sass.splitlines(), r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z]\w*)(.*)")


def _ways(lines: list[str], instruction: str) -> Ways:
    found: list[tuple[str, bool, str | None]] = []
    places: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"([$.]L\w+):", line):
            places[label[1]] = len(found)
        elif match := re.match(instruction, line):
            predicate, op, rest = match.groups()
            jump = re.search(r"[$.]L\w+", rest) if op in ("bra", "bra.uni", "BRA") else None
            skipped = bool(predicate) or (op == "BRA" and not rest.startswith(" `"))  # its condition may come behind it
            found.append((op, skipped, jump[0] if jump else None))
    return [(op, skipped, None if target is None else places[target]) for op, skipped, target in found]


def llvm_multiply_adds(llir: str) -> int:
    """fma calls in LLVM's IR, as the kernel's source has them (unrolled), a dot's among them; vectors count by their
    length."""
    calls = re.findall(r"call \S*(?:<\d+ x float> |float )@llvm\.fm(?:a|uladd)\.(?:v(\d+))?f32", llir)
    return sum(int(width or 1) for width in calls)


def llvm_may_contract(llir: str) -> int:
    """Additions and multiplications that LLVM may contract, reorder or approximate."""
    return len(re.findall(r"= f(?:add|mul|sub|div) (?:\w+ )*(?:fast|contract|reassoc|arcp|afn)\b", llir))


def nvidia_resources(cubin: Path) -> dict[str, int]:
    """Registers, stack and local bytes a thread, shared bytes a program. Raises ValueError if cuobjdump says else."""
    said = _run("cuobjdump", "-res-usage", str(cubin))
    return parse_resources(said)


def parse_resources(said: str) -> dict[str, int]:
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    if set(found) != {"reg", "stack", "shared", "local"}:
        raise ValueError(f"cannot read what cuobjdump says: {said!r}")
    return found


def disassemble(cubin: Path) -> str:
    return _run("nvdisasm", "-c", str(cubin))


def sass_loops(sass: str) -> list[Counter[str]]:
    """The instructions of every loop (a branch back), by opcode."""
    return [Counter(filter(None, map(_sass_opcode, loop))) for loop in _loops(sass)]


def sass_stores(sass: str) -> list[Counter[int]]:
    """Of the same loops: how often a thread stores to memory, by the bytes that it stores at once."""
    return [
        Counter(
            int(bits or 32) // 8 for bits in re.findall(r"\bSTG\.E(?:\.[A-Z]+\b)*(?:\.[US]?(\d+))?", "\n".join(loop))
        )
        for loop in _loops(sass)
    ]


def _loops(sass: str) -> list[list[str]]:
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\.L_", line)]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA\S* (?:\S+, )?`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], i) < i - 1:
            loops.append(lines[labels[match[1]] : i + 1])
    return loops


def _sass_opcode(line: str) -> str | None:
    match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", line)
    return match[1] if match else None


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA / tool, *arguments], capture_output=True, text=True, check=True).stdout


# ---- how threads share a weight load: Triton's GPU dialect, for both ----


@dataclass(frozen=True)
class WeightLoad:
    """A load of packed weights: bytes a thread loads at once and in all, the used share of the 32-byte sectors that a
    warp touches, and whether a warp has all of a tile's columns that it has threads for before a second segment."""

    bytes_at_once: int
    bytes_of_thread: int
    sector_use: float
    columns_first: bool


def weight_layout(ttgir: str) -> WeightLoad:
    """The loads of tiles [8, 8 C], or of two segments (contract.packed_offsets): those of norms, which may be as large,
    name a cache. Raises ValueError unless all have one layout."""
    loads = set(re.findall(
        r"(?:tt\.load|buffer_load) (?!.*cache_?[mM]odifier = c).*: (?:!tt\.ptr<\w+> -> )?"
        r"tensor<([28])x(\d\d+)x(?:!tt\.ptr<)?b?f(16|32)>?, (#blocked\d*)>", ttgir,
    ))  # fmt: skip
    if len(loads) != 1:
        raise ValueError(f"weight loads of {len(loads)} kinds: {sorted(loads)}")
    segments, numbers, bits, name = loads.pop()
    found = re.search(rf"^{name} = #ttg\.blocked<{{(.*)}}>", ttgir, re.MULTILINE)
    if not found:
        raise ValueError(f"no layout {name}")
    layout = {key: [int(n) for n in values.split(", ")] for key, values in re.findall(r"(\w+) = \[(.*?)\]", found[1])}
    each, lanes, warps = layout["sizePerThread"], layout["threadsPerWarp"], layout["warpsPerCTA"]
    tile = int(segments), int(numbers)
    times = prod(-(-size // prod(part)) for size, *part in zip(tile, each, lanes, warps, strict=True))
    size = int(bits) // 8
    places = [
        (lane * each[0] + i, other * each[1] + j)
        for lane, other in product(*map(range, lanes)) for i, j in product(*map(range, each))
    ]  # fmt: skip
    elements = {segment * 128 + at // 128 * 1024 + at % 128 for segment, at in places}
    sectors = {element * size // 32 for element in elements}
    return WeightLoad(
        min(16, each[1] * size),
        prod(each) * times * size,
        len(elements) * size / (32 * len(sectors)),
        lanes[1] * each[1] >= min(int(numbers), prod(lanes) * each[1]),
    )


# ---- AMD ----

# Beyond what divides and takes roots as IEEE wants it, nothing may approximate.
AMD_FORBIDDEN = {
    "an approximation": r"v_(?:exp|log|sin|cos|rsq)_(?:legacy_)?f(?:16|32)\S*",
    "an atomic on floats": r"(?:global|flat|buffer|ds)_\S*(?:add|min|max)_(?:rtn_)?\S*f(?:16|32|64)\S*",
}
DIVISION, ROOT = 5, 2  # multiply-adds in LLVM's expansion of an IEEE division (v_div_fmas apart) and square root
WIDE_DIVISION = "0x5f7ffffc"  # a literal of the division of 64-bit integers, which has v_rcp_f32 and two v_fma, too
NARROW_DIVISION = "0x4f7ffffe"  # the same of 32-bit integers, whose v_rcp_f32 may be v_rcp_iflag_f32


def amd_instructions(text: str) -> list[str]:
    lines = (re.sub(r";.*", "", line) for line in text.splitlines())
    return re.findall(r"^\s+([vsgfbd]\w*_\w+)\b", "\n".join(lines), re.MULTILINE)


def amd_forbidden(text: str) -> list[str]:
    ops = amd_instructions(text)
    found = Counter(
        f"{what}: {op}" for op in ops for what, pattern in AMD_FORBIDDEN.items() if re.fullmatch(pattern, op)
    )
    said = [f"{text} ({count} times)" for text, count in found.items()]
    reciprocals = sum(op.startswith(("v_rcp_f32", "v_rcp_iflag_f32")) for op in ops)
    divisions = sum(op.startswith("v_div_fixup_f32") for op in ops)
    if reciprocals != divisions + text.count(WIDE_DIVISION) + text.count(NARROW_DIVISION):
        said.append(f"an approximation: {reciprocals} v_rcp_f32 for {divisions} IEEE divisions")
    if not re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text):
        said.append("denormals flushed to zero")
    return said


def amd_stores_on_their_way(text: str) -> list[str]:
    """Counts of programs (atomic_add) that tell others of stores which may not be there yet. The wave that counts makes
    them visible and waits for its own stores alone; so each wave must have waited for its own before the barrier."""
    problems, on_their_way, at_barrier = [], False, False
    for line in text.splitlines():
        op = re.match(r"\s+(\w+)(.*)", re.sub(r";.*", "", line))
        if op is None:
            continue
        if re.fullmatch(r"(?:global|buffer|flat)_store_\w+", op[1]):
            on_their_way = True
        elif op[1] == "s_waitcnt" and "vmcnt(0)" in op[2]:
            on_their_way = False
        elif op[1] == "s_barrier":
            at_barrier = on_their_way
        elif re.match(r"(?:global|buffer|flat)_atomic_add", op[1]) and at_barrier:
            problems.append("a program is counted while stores of its waves may be on their way")
    return problems


def amd_multiply_adds(text: str) -> int:
    """Floating-point multiply-adds (a packed one counts twice) beyond those of IEEE divisions and roots."""
    ops = amd_instructions(text)
    single = sum(bool(re.match(r"v_(?:fma|fmac|fmamk|fmaak|mac|mad|fma_mix)_(?:legacy_)?f(?:16|32)", op)) for op in ops)
    packed = sum(bool(re.match(r"v_(?:pk_fma|dot2\w*)_f\w*", op)) for op in ops)
    divisions = sum(op.startswith("v_div_fixup_f32") for op in ops)
    roots = sum(op.startswith("v_sqrt_f32") for op in ops)
    return single + 2 * packed - DIVISION * divisions - ROOT * roots - 2 * text.count(WIDE_DIVISION)


def amd_resources(text: str) -> dict[str, int]:
    """Registers, spills and scratch bytes a thread, waves a SIMD. Raises ValueError where the assembly names none."""
    patterns = {
        "reg": r"\.vgpr_count:\s+(\d+)", "stack": r"\.private_segment_fixed_size:\s+(\d+)",
        "local": r"\.vgpr_spill_count:\s+(\d+)", "sgpr_spills": r"\.sgpr_spill_count:\s+(\d+)",
        "waves": r"; Occupancy: (\d+)",
    }  # fmt: skip
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    if not all(found.values()):
        raise ValueError(f"the assembly does not say {[name for name, match in found.items() if not match]}")
    return {name: int(match[1]) for name, match in found.items() if match}
