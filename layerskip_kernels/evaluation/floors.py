"""What decoding, drafting, verifying and prompts cannot be faster than on a GPU, on paper (`roofline`).

A step takes at least the time its bytes need at the memory's bandwidth, and at least the time its operations need at
the peak of the fp32 units. (Not the tensor cores': rule 1 of docs/arithmetic.md orders the sums of a dot product, and
they add in an order of their own. Quantised weights are multiplied there, in int8: the sums of rule 8 are exact.)
Phases of a step that wait for each other are added up. Counted are weights, K and V read and the multiplications and
additions of dot products and attention; not counted are writes, norms, exp, unpacking, scales, launches and latency. So
these are floors: nothing here was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerskip_kernels.evaluation.datasheets import Gpu
from layerskip_kernels.model.tensor_names import layer_products, layer_shapes
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.ops.reference import BLOCK_TYPES

__all__ = [
    "Floor",
    "decode",
    "draft",
    "head_bytes",
    "layer_bytes",
    "matrix_bytes",
    "memory_bound_rows",
    "prompt",
    "speedup",
    "verify",
]

CHUNK = 256  # rows of a prompt that `generate` sends through the layers at once
BY_SEGMENT = {"int8": 1, "int15": 2}  # types of our own: bytes, and planes, of a weight


@dataclass(frozen=True)
class Floor:
    """A step's bytes read, fp32 and int8 operations, and the seconds that it takes at least; steps add up."""

    bytes: int
    operations: int
    seconds: float
    integer_operations: int = 0

    @classmethod
    def of(cls, gpu: Gpu, num_bytes: int, operations: int, integer_operations: int = 0) -> Floor:
        """One phase: memory and both kinds of arithmetic overlap, so that the slowest one counts."""
        by_operations = operations / (gpu.fp32 * 1e12), integer_operations / (gpu.int8 * 1e12)
        seconds = max(num_bytes / (gpu.bandwidth * 1e9), *by_operations)
        return cls(num_bytes, operations, seconds, integer_operations)

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.bytes + other.bytes,
            self.operations + other.operations,
            self.seconds + other.seconds,
            self.integer_operations + other.integer_operations,
        )


def matrix_bytes(shape: Sequence[int], dtype: torch.dtype, weights: str | None = None) -> int:
    """What a matrix [N, K] of ``weights`` (quantise.WEIGHT_TYPES; None: ``dtype``) is made of; a tensor of one
    dimension is never quantised."""
    if weights is None or len(shape) == 1:
        return dtype.itemsize * math.prod(shape)
    rows, k = shape
    if weights in BY_SEGMENT:  # a scale of four bytes for each of eight segments
        return rows * (BY_SEGMENT[weights] * k + 8 * 4)
    kind = BLOCK_TYPES[weights]
    return rows * -(-k // kind.size) * kind.nbytes


def integer_products(weights: str) -> int:
    """Products of int8 for each weight: of the planes that activations and weights are split into."""
    return 2 * BY_SEGMENT[weights] if weights in BY_SEGMENT else BLOCK_TYPES[weights].planes


def layer_bytes(config: ModelConfig, dtype: torch.dtype, positions: int = 0, weights: str | None = None) -> int:
    """What a pass through one layer reads: its weights, and K and V of ``positions`` positions, once for all rows."""
    stored = sum(matrix_bytes(shape, dtype, weights) for shape in layer_shapes(config).values())
    return stored + dtype.itemsize * 2 * positions * config.num_kv_heads * config.head_dim


def head_bytes(config: ModelConfig, dtype: torch.dtype, weights: str | None = None) -> int:
    """What the final norm and the LM head read."""
    head = matrix_bytes((config.vocab_size, config.hidden_size), dtype, weights)
    return head + dtype.itemsize * config.hidden_size


def _operations(products: int, dtype: torch.dtype, weights: str | None) -> tuple[int, int]:
    """Operations in fp32 and in int8 of so many weights that are multiplied: a product and a sum of each.

    A fused multiply-add counts as two, as data sheets count it. In fp32 the contract rounds the product before the
    sum, which takes two instructions, each of which could have been a multiply-add: four.
    """
    if weights is not None:
        return 0, 2 * integer_products(weights) * products
    return (4 if dtype is torch.float32 else 2) * products, 0


def _layers(
    config: ModelConfig, gpu: Gpu, layers: int, rows: int, positions: int, dtype: torch.dtype,
    weights: str | None = None, seen: int | None = None,
) -> Floor:  # fmt: skip
    """Some layers, of ``positions`` positions; ``seen``: by all rows together (None: each row sees all of them).

    Attention has two products and sums for each position and head, in the model's dtype.
    """
    fp32, int8 = _operations(rows * layer_products(config), dtype, weights)
    seen = rows * positions if seen is None else seen
    attention, _ = _operations(2 * seen * config.num_heads * config.head_dim, dtype, None)
    num_bytes = layers * layer_bytes(config, dtype, positions, weights)
    return Floor.of(gpu, num_bytes, layers * (fp32 + attention), layers * int8)


def _head(config: ModelConfig, gpu: Gpu, rows: int, dtype: torch.dtype, weights: str | None) -> Floor:
    operations = _operations(rows * config.vocab_size * config.hidden_size, dtype, weights)
    return Floor.of(gpu, head_bytes(config, dtype, weights), *operations)


def decode(
    config: ModelConfig, gpu: Gpu, context: int, dtype: torch.dtype = torch.bfloat16, weights: str | None = None
) -> Floor:
    """One token of plain decoding after ``context`` positions: verification of an empty draft."""
    return verify(config, gpu, config.num_layers, 0, context, dtype, weights)


def draft(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, context: int, dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
) -> Floor:  # fmt: skip
    """``draft_step``: for each draft one row through ``exit_layer`` layers and the head."""
    floor = Floor(0, 0, 0.0)
    for i in range(drafts):
        floor += _layers(config, gpu, exit_layer, 1, context + i + 1, dtype, weights)
        floor += _head(config, gpu, 1, dtype, weights)
    return floor


def verify(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, context: int, dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
) -> Floor:  # fmt: skip
    """``verify_step``: the last draft through the first layers, then all ``drafts + 1`` rows through the others."""
    positions = context + drafts + 1
    early = _layers(config, gpu, exit_layer, 1, positions, dtype, weights)
    late = _layers(config, gpu, config.num_layers - exit_layer, drafts + 1, positions, dtype, weights)
    return early + late + _head(config, gpu, drafts + 1, dtype, weights)


def prompt(
    config: ModelConfig, gpu: Gpu, tokens: int, dtype: torch.dtype = torch.bfloat16, weights: str | None = None
) -> Floor:
    """``prefill`` of a prompt: CHUNK rows at a time through all layers, each of which sees those up to itself, and the
    head for the last of them."""
    floor = _head(config, gpu, 1, dtype, weights)
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        seen = (stop * (stop + 1) - start * (start + 1)) // 2
        floor += _layers(config, gpu, config.num_layers, stop - start, stop, dtype, weights, seen)
    return floor


def speedup(
    config: ModelConfig, gpu: Gpu, exit_layer: int, drafts: int, acceptance: float, context: int,
    dtype: torch.dtype = torch.bfloat16, weights: str | None = None,
) -> float:  # fmt: skip
    """Floor of plain decoding over the floor per token of a cycle, which gives 1 + acceptance * drafts tokens.

    ``acceptance``: accepted over drafted tokens, as LayerSkip reports it.
    """
    cycle = draft(config, gpu, exit_layer, drafts, context, dtype, weights)
    cycle += verify(config, gpu, exit_layer, drafts, context, dtype, weights)
    return decode(config, gpu, context, dtype, weights).seconds * (1 + acceptance * drafts) / cycle.seconds


def memory_bound_rows(
    config: ModelConfig, gpu: Gpu, context: int, dtype: torch.dtype, weights: str | None = None
) -> int:
    """The most rows that go through all layers in the time one row needs to read them."""
    one = _layers(config, gpu, 1, 1, context, dtype, weights)
    seconds = max(one.operations / (gpu.fp32 * 1e12), one.integer_operations / (gpu.int8 * 1e12))
    return math.floor(one.bytes / (gpu.bandwidth * 1e9) / seconds)
