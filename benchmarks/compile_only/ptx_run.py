"""Runs a compiled Triton kernel's PTX on the CPU: all threads of a program in step, one NumPy call an instruction.

Enough of PTX for the kernels that multiply tiles of numbers (triton_ops/prompt_dot.py) or of quantised weights
(integer_tiles.py), and that round rows for these; anything else raises NotImplementedError, as does a branch that
threads take apart. Sums are rounded as the instructions say: a multiply-add whose product is not exact in fp32, which
NumPy could not round once, raises ValueError. Loads from shared memory are counted, and the cycles that its banks take
for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}
INTEGERS = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
            "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
            "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}  # fmt: skip
COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
           "ne": np.not_equal}  # fmt: skip
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
BANKS, BANK = 32, 4  # of shared memory, and a bank's bytes


@dataclass(frozen=True)
class Line:
    guard: str
    op: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass
class Counts:
    """Over all programs: instructions of warps, and for loads from shared memory the cycles of its banks."""

    ops: Counter[str] = field(default_factory=Counter)
    shared_loads: int = 0
    bank_cycles: int = 0


def parse(ptx: str) -> tuple[list[Line], dict[str, int], list[str]]:
    """Instructions, where labels stand, and the kernel's parameters in order."""
    parameters = re.findall(r"\.param \.\w+ (?:\.ptr \S+ \.align \d+ )?(\w+)", ptx.split("{", 1)[0])
    text = re.sub(r"//.*", "", ptx.split("{", 1)[1])
    lines: list[Line] = []
    labels: dict[str, int] = {}
    for raw in re.split(r";|(?<=:)\s*\n|\n(?=\s*\.(?:loc|pragma|file))", text):
        line = " ".join(raw.split())
        line = re.sub(r"\.loc \d+ \d+ \d+(?:, function_name \S+, inlined_at \S+ \S+ \S+)?", "", line).strip()
        while match := re.match(r"(\$?[\w$]+):\s*", line):
            labels[match[1]] = len(lines)
            line = line[match.end() :]
        match = re.match(r"(?:@(!?%p\d+) )?([a-z][\w.:]*)\s*(.*)", line)
        if match and not line.startswith("."):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", match[3])
            lines.append(Line(match[1] or "", tuple(match[2].replace("::", ".").split(".")), tuple(operands)))
    return lines, labels, parameters


class Program:
    """One program of a grid. ``memory`` uint8 is what addresses point into; ``arguments``: by parameter's name."""

    def __init__(
        self, ptx: str, threads: int, shared: int, memory: NDArray[np.uint8], arguments: dict[str, int | float],
        counts: Counts,
    ) -> None:  # fmt: skip
        self.lines, self.labels, _ = parse(ptx)
        self.threads, self.memory, self.arguments, self.counts = threads, memory, arguments, counts
        self.shared = np.full(max(16, shared), 0xFF, np.uint8)  # NaN, until it is written
        self.at_once = joined_loads(self.lines, set(self.labels.values()))
        targets = [line.operands[0] for line in self.lines if line.operands and line.op[0] != "st"]
        self.written = {name for target in targets for name in names(target)}

    def run(self, place: tuple[int, ...], grid: tuple[int, ...]) -> None:
        everyone = np.ones(self.threads, bool)
        self.registers: dict[str, Values] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint32),
            **{f"%ctaid.{axis}": np.full(self.threads, i, np.uint32) for axis, i in zip("xyz", place, strict=True)},
            **{f"%nctaid.{axis}": np.full(self.threads, i, np.uint32) for axis, i in zip("xyz", grid, strict=True)},
            "global_smem": np.zeros(self.threads, np.uint64),
            **{name: np.full(self.threads, i, np.uint64) for i, name in enumerate(self.arguments)},
        }
        at = 0
        while True:
            line = self.lines[at]
            at += 1
            active = everyone
            if line.guard:
                active = self.registers[line.guard.lstrip("!")]
                active = ~active if line.guard.startswith("!") else active
            name = line.op[0]
            self.counts.ops[".".join(line.op[:3]) if name == "fma" else name] += self.threads // 32
            if name == "ret":
                return
            if name == "bra":
                if active.any() != active.all():
                    raise NotImplementedError("threads that take a branch apart")
                if active.all():
                    at = self.labels[line.operands[0]]
            elif name not in ("bar", "barrier", "fence"):
                self.size = self.at_once.get(at - 1, 0)
                self.step(line, active)

    # ---- operands ----

    def read(self, text: str, dtype: Any) -> Values:
        """A register, or a constant, as numbers of a type of the same width (or a wider register's lower part)."""
        if text in self.registers:
            value = self.registers[text]
            if value.dtype == bool or value.dtype.itemsize == np.dtype(dtype).itemsize:
                return value if value.dtype == bool else value.view(dtype)
            return value.astype(np.dtype(f"u{np.dtype(dtype).itemsize}")).view(dtype)
        if text.startswith("0f"):
            return np.full(self.threads, int(text[2:], 16), np.uint32).view(dtype)
        if text.startswith("%r") and text not in self.written:  # half of a pair that nobody uses; NaN, if one did
            return np.full(self.threads * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype)
        size = 8 * np.dtype(dtype).itemsize
        return np.full(self.threads, int(text, 0) % (1 << size), np.dtype(f"u{size // 8}")).view(dtype)

    def write(self, name: str, value: Values, active: Values) -> None:
        if value.dtype != bool:
            value = value.view(np.dtype(f"u{value.dtype.itemsize}"))
            width = {"%rd": 8, "%rs": 2}.get(name[:3], 4)
            value = value if value.dtype.itemsize == width else value.astype(np.dtype(f"u{width}"))
        if not active.all() and name in self.registers:
            value = np.where(active, value, self.registers[name])
        self.registers[name] = value

    def address(self, text: str) -> Values:
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        return self.read(base, np.uint64 if base.startswith("%rd") else np.uint32).astype(np.int64) + int(offset or 0)

    # ---- instructions ----

    def step(self, line: Line, active: Values) -> None:
        op, args = line.op, line.operands
        with np.errstate(all="ignore"):
            if op[0] in ("ld", "st"):
                self.move(op, args, active)
            elif op[0] in ("ldmatrix", "stmatrix"):
                self.matrices(op, args)
            elif op[0] == "mov":
                self.mov(op, args, active)
            elif op[0] == "mma":
                self.integer_mma(op, args, active)
            elif op[0] == "createpolicy":
                pass  # how long caches keep what is loaded
            else:
                self.write(args[0], self.value(op, args[1:]), active)

    def mov(self, op: tuple[str, ...], args: tuple[str, ...], active: Values) -> None:
        if args[0].startswith("{"):
            parts = names(args[0])
            wide = self.read(args[1], INTEGERS[op[1]])
            split = wide.view(np.dtype(f"u{wide.dtype.itemsize // len(parts)}")).reshape(self.threads, -1)
            for i, name in enumerate(parts):
                if name != "_":
                    self.write(name, np.ascontiguousarray(split[:, i]), active)
        elif args[1].startswith("{"):
            parts = names(args[1])
            dtype = np.dtype(f"u{np.dtype(INTEGERS[op[1]]).itemsize // len(parts)}")
            joined = np.stack([self.read(name, dtype) for name in parts], axis=1)
            self.write(args[0], joined.reshape(-1).view(INTEGERS[op[1]]), active)
        elif op[1] == "pred":
            value = self.registers.get(args[1], np.full(self.threads, args[1] not in ("0", "false")))
            self.write(args[0], value.astype(bool), active)
        else:
            self.write(args[0], self.read(args[1], np.uint32 if op[1] == "f32" else INTEGERS[op[1]]).copy(), active)

    def value(self, op: tuple[str, ...], args: tuple[str, ...]) -> Values:
        name, kind = op[0], op[-1]
        if kind in ("f32", "f32x2") and name in FLOATS:
            if set(op) & {"ftz", "approx", "rz", "sat"}:
                raise NotImplementedError(".".join(op))
            # Of a pair in 64 bits, each is computed by itself.
            wide = np.uint64 if kind == "f32x2" else np.uint32
            numbers = [self.read(arg, wide).view(np.float32) for arg in args]
            return FLOATS[name](*numbers).view(wide)
        if name == "div" and op[1:] == ("rn", "f32"):
            return np.divide(*(self.read(arg, np.float32) for arg in args))
        if name == "cvt":
            return self.cvt(op, args[0])
        if name == "shfl":
            return self.shuffle(op, args)
        if name == "redux" and op[2] in ("min", "max"):
            of_warps = self.read(args[0], INTEGERS[kind]).reshape(-1, 32)
            return np.repeat(of_warps.min(1) if op[2] == "min" else of_warps.max(1), 32)
        if name == "prmt":
            return self.permute(args)
        if name == "selp":
            dtype = np.uint32 if kind == "f32" else INTEGERS[kind]
            return np.where(self.registers[args[2]], self.read(args[0], dtype), self.read(args[1], dtype))
        if name == "setp":
            dtype = np.float32 if kind == "f32" else INTEGERS[kind]
            return COMPARE[op[1]](self.read(args[0], dtype), self.read(args[1], dtype))
        if kind == "pred":
            values = [self.registers[arg] if arg in self.registers else np.full(self.threads, arg != "0")
                      for arg in args]  # fmt: skip
            return ~values[0] if name == "not" else LOGIC[name](*values)
        if kind in ("s16x2", "u16x2"):  # of a pair in 32 bits, each is computed by itself
            pair = [self.read(arg, np.uint32).view(INTEGERS[kind.removesuffix("x2")]) for arg in args]
            return self.integer(name, op, pair, args).view(np.uint32)
        dtype = INTEGERS[kind]
        if name in LOGIC:
            return LOGIC[name](*(self.read(arg, dtype) for arg in args))
        if name in ("shl", "shr"):
            return self.shift(name, self.read(args[0], dtype), self.read(args[1], np.uint32))
        return self.integer(name, op, [self.read(arg, dtype) for arg in args[:2]], args)

    def integer(self, name: str, op: tuple[str, ...], pair: list[Values], args: tuple[str, ...]) -> Values:
        dtype = pair[0].dtype.type
        wide = {np.int32: np.int64, np.uint32: np.uint64}.get(dtype)
        if name in ("mul", "mad"):
            if op[1] == "wide":
                product: Values = pair[0].astype(wide) * pair[1].astype(wide)
            elif op[1] == "lo":
                product = pair[0] * pair[1]
            else:
                raise NotImplementedError(".".join(op))
            return product if name == "mul" else product + self.read(args[2], product.dtype)
        if name == "bfe":  # a field of bits, its highest one repeated where it is signed
            first, length, size = int(args[1], 0), int(args[2], 0), 8 * pair[0].dtype.itemsize
            return (pair[0] << dtype(size - length - first)) >> dtype(size - length)
        if name in ("div", "rem"):
            quotient = np.trunc(pair[0] / pair[1].astype(np.float64)).astype(dtype)
            return quotient if name == "div" else pair[0] - quotient * pair[1]
        functions: dict[str, Any] = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
        if name in functions:
            return functions[name](*pair)
        if name == "not":
            return ~pair[0]
        raise NotImplementedError(".".join(op))

    def shuffle(self, op: tuple[str, ...], args: tuple[str, ...]) -> Values:
        """What the lane has that the second operand names, or whose number differs in its bits."""
        if op[1] != "sync" or op[2] not in ("bfly", "idx") or args[2] != "31":
            raise NotImplementedError(".".join(op))
        lanes, named = np.arange(self.threads), self.read(args[1], np.uint32).astype(np.int64) % 32
        return self.read(args[0], np.uint32)[lanes ^ named if op[2] == "bfly" else lanes // 32 * 32 + named]

    def permute(self, args: tuple[str, ...]) -> Values:
        """Four of the eight bytes of two words."""
        selector = int(args[2].rstrip("U"), 0)
        places = [selector >> 4 * i & 15 for i in range(4)]
        if max(places) > 7:
            raise NotImplementedError(f"prmt {args[2]}")
        of_both = np.stack([self.read(arg, np.uint32) for arg in args[:2]], axis=1).view(np.uint8)
        return np.ascontiguousarray(of_both[:, places]).view(np.uint32)[:, 0]

    def integer_mma(self, op: tuple[str, ...], args: tuple[str, ...], active: Values) -> None:
        """[16, 32] times [32, 8] of each warp: lane 4 g + t has k = 4 t .. 4 t + 3 and 16 further of rows g and g + 8,
        the same of column g, and columns 2 t and 2 t + 1 of the sums of its rows."""
        if op[3:] != ("m16n8k32", "row", "col", "satfinite", "s32", "s8", "s8", "s32") or not active.all():
            raise NotImplementedError(".".join(op))
        a, b = (
            [self.read(name, np.uint32).view(np.int8).reshape(-1, 8, 16) for name in names(arg)] for arg in args[1:3]
        )
        c = [self.read(name, np.int32).reshape(-1, 8, 4) for name in names(args[3])]
        rows = np.concatenate([np.concatenate(a[:2], axis=1), np.concatenate(a[2:], axis=1)], axis=2).astype(np.int64)
        products = rows @ np.concatenate(b, axis=2).astype(np.int64).transpose(0, 2, 1)
        for i, name in enumerate(names(args[0])):
            half = products[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2] + c[i]
            if abs(half).max() >= 1 << 31:
                raise OverflowError("a sum of products beyond 32 bits")
            self.write(name, half.reshape(-1).astype(np.int32), active)

    @staticmethod
    def shift(name: str, value: Values, by: Values) -> Values:
        bits = 8 * value.dtype.itemsize
        by = np.minimum(by, bits - 1 if name == "shr" else by).astype(value.dtype)
        return value << by if name == "shl" else value >> by

    def cvt(self, op: tuple[str, ...], arg: str) -> Values:
        target, source = op[-2:]
        if op[1:] == ("rn", "bf16", "f32"):
            bits = self.read(arg, np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(bits.view(np.float32)), 0x7FFF, nearest).astype(np.uint16)
        if op[1:-2] not in ((), ("rn",)):
            raise NotImplementedError(".".join(op))
        if (target, source) == ("f32", "bf16"):
            return (self.read(arg, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        if (target, source) == ("f32", "f16"):
            return self.read(arg, np.float16).astype(np.float32)
        if target == "f32":
            return self.read(arg, INTEGERS[source]).astype(np.float32)
        return self.read(arg, INTEGERS[source]).astype(INTEGERS[target])

    # ---- memory ----

    def move(self, op: tuple[str, ...], args: tuple[str, ...], active: Values) -> None:
        space, kind = op[1], op[-1]
        width = WIDTHS[kind[1:]]
        if space == "param":
            self.write(args[0], self.parameter(args[1].strip("[]"), args[0], kind), active)
            return
        loads = op[0] == "ld"
        registers = names(args[0] if loads else args[1])
        if space not in ("global", "shared") or any(o.startswith("v") and o != f"v{len(registers)}" for o in op[2:]):
            raise NotImplementedError(".".join(op))
        memory, size = (
            (self.memory, width * len(registers)) if space == "global" else (self.shared, width * len(registers))
        )
        address = self.address(args[1] if loads else args[0])
        inside = active & (address >= 0) & (address + size <= len(memory)) & (address % size == 0)
        if (inside != active).any():
            raise IndexError(f"{'.'.join(op)}: an address outside its memory, or not a multiple of {size}")
        places = np.where(inside, address, 0)[:, None] + np.arange(size)
        dtype = np.dtype(f"u{width}")
        if loads:
            if space == "shared" and self.size:
                self.count_banks(address, self.size)
            values = memory[places].view(dtype)
            for i, name in enumerate(registers):
                self.write(name, np.ascontiguousarray(values[:, i]), active)
        else:
            values = np.stack([self.read(name, dtype) for name in registers], axis=1)
            memory[places[inside]] = np.ascontiguousarray(values).view(np.uint8)[inside]

    def matrices(self, op: tuple[str, ...], args: tuple[str, ...]) -> None:
        """8 x 8 numbers of 16 bits: lane 8 i + j says where row j of matrix i is; 4 g + t has two numbers of row g."""
        loads = op[0] == "ldmatrix"
        registers, address = names(args[0 if loads else 1]), self.address(args[1 if loads else 0])
        if op[1:4] != ("sync", "aligned", "m8n8") or "trans" in op:
            raise NotImplementedError(".".join(op))
        lane = np.arange(self.threads)
        for i, name in enumerate(registers):
            at = address[lane // 32 * 32 + 8 * i + lane % 32 // 4] + lane % 4 * 4
            places = at[:, None] + np.arange(4)
            if loads:
                self.write(name, np.ascontiguousarray(self.shared[places].view(np.uint32)[:, 0]), lane >= 0)
            else:
                self.shared[places] = self.read(name, np.uint32)[:, None].view(np.uint8)

    def parameter(self, name: str, register: str, kind: str) -> Values:
        if name.startswith("%"):  # one of several, as each thread chose
            places = self.registers[name]
            chosen = {place: list(self.arguments)[place] for place in np.unique(places)}
            return np.choose(np.searchsorted(list(chosen), places),
                             [self.parameter(given, register, kind) for given in chosen.values()])  # fmt: skip
        value = self.arguments[name]
        if isinstance(value, float):
            return np.full(self.threads, value, np.float32)
        dtype = np.int64 if register.startswith("%rd") and kind in ("s32", "b64", "u64") else np.int32
        return np.full(self.threads, value, dtype)

    def count_banks(self, address: Values, size: int) -> None:
        """A warp's load takes a cycle for each different word of the busiest bank; 16 bytes go a quarter at a time."""
        at_once = min(32, BANKS * BANK // size)
        for first in range(0, self.threads, at_once):
            words = np.unique(address[first : first + at_once, None] // BANK + np.arange(size // BANK))
            self.counts.bank_cycles += int(np.bincount(words % BANKS).max())
        self.counts.shared_loads += self.threads // 32


def joined_loads(lines: list[Line], labels: set[int]) -> dict[int, int]:
    """The loads from shared memory by line, with the bytes that each takes at once. ptxas makes one of four loads of
    four bytes in a row beside each other: the first stands for all."""
    found: dict[int, int] = {}
    rows: dict[tuple[int, str, int], dict[int, int]] = {}
    block = 0
    for i, line in enumerate(lines):
        block += i in labels or line.op[0] == "bra"
        if line.op[:2] == ("ld", "shared"):
            count = len(names(line.operands[0]))
            found[i] = WIDTHS[line.op[-1][1:]] * count
            base, _, offset = line.operands[1].strip("[] ").replace(" ", "").partition("+")
            if found[i] == 4:
                rows.setdefault((block, base, int(offset or 0) // 16), {})[int(offset or 0) % 16] = i
    for row in rows.values():
        if sorted(row) == [0, 4, 8, 12]:
            found.update({i: 0 for i in row.values()})
            found[row[0]] = 16
    return found


def names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def multiply_add(a: Values, b: Values, c: Values) -> Values:
    """fp32, rounded once: of products that fp32 holds."""
    product = a.astype(np.float64) * b.astype(np.float64)
    rounded: Values = product.astype(np.float32)
    if not np.array_equal(rounded, product, equal_nan=True):
        raise ValueError("a multiply-add of numbers whose product fp32 does not hold")
    return rounded + c


FLOATS: dict[str, Callable[..., Values]] = {
    "fma": multiply_add, "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
    "max": np.fmax, "min": np.fmin,
}  # fmt: skip


def run(
    ptx: str, threads: int, shared: int, arguments: list[Any], grid: tuple[int, ...], counts: Counts | None = None
) -> Counts:
    """Every program of a grid, one after the other. ``arguments`` in the kernel's order: numbers, and NumPy arrays,
    which the kernel reads and writes."""
    counts = counts or Counts()
    arrays = {a.ctypes.data: a for a in arguments if isinstance(a, np.ndarray)}
    sizes = [-(-a.nbytes // 256) * 256 for a in arrays.values()]
    begins = dict(zip(arrays, (sum(sizes[:i]) for i in range(len(sizes))), strict=True))
    memory = np.zeros(sum(sizes), np.uint8)
    for key, array in arrays.items():
        memory[begins[key] : begins[key] + array.nbytes] = array.reshape(-1).view(np.uint8)
    given = [begins[a.ctypes.data] if isinstance(a, np.ndarray) else a for a in arguments]
    _, _, parameters = parse(ptx)
    # Triton adds two pointers, to memory that these kernels do not use.
    named = dict(zip(parameters, [*given, *[0] * (len(parameters) - len(given))], strict=True))
    program = Program(ptx, threads, shared, memory, named, counts)
    grid = (*grid, 1, 1)[:3]
    for z, y, x in product(*map(range, reversed(grid))):
        program.run((x, y, z), grid)
    for key, array in arrays.items():
        array.reshape(-1).view(np.uint8)[:] = memory[begins[key] : begins[key] + array.nbytes]
    return counts
