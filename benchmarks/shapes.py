"""The shapes that are measured, and models and caches of random numbers in them."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import CachedSequence, Model, ModelConfig, PagedKVCache, RopeScaling
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.tensor_names import tensor_shapes

DTYPE = torch.bfloat16
SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_positions=2048, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_1B = ModelConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, max_positions=2048, rms_norm_eps=1e-5, rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), tie_word_embeddings=True,
)  # fmt: skip
SHAPES = {"SmolLM2-135M": SMOLLM2, "Llama-3.2-1B": LLAMA_1B}


def random_weight(*shape: int) -> Tensor:
    """bf16 normal numbers, scaled so that a product with them keeps its size; ones for the weights of a norm.

    Drawn once and repeated: a billion of them would take half a minute. No two rows are equal, the number of the
    drawn ones being prime.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    drawn, size = _drawn(), math.prod(shape)
    repeated = drawn.repeat(-(-size // len(drawn)))[:size]
    return repeated.mul_(shape[-1] ** -0.5).view(shape)


@cache
def _drawn() -> Tensor:
    return torch.randn(4_000_037, generator=torch.Generator().manual_seed(0)).to(DTYPE)


class RandomTensors(dict[str, Tensor]):
    """Tensors that are made when they are taken, so that a model is never in memory twice."""

    def __init__(self, config: ModelConfig) -> None:
        element = torch.empty(1, dtype=DTYPE)
        super().__init__({name: element.expand(shape) for name, shape in tensor_shapes(config).items()})

    def pop(self, name: str, *default: Any) -> Tensor:
        return random_weight(*super().pop(name, *default).shape)


def random_model(name: str, num_layers: int | None = None, backend: str = "cpu") -> Model:
    """A model of random bf16 weights, the same each time, in one of SHAPES: 0.3 GB and 2.5 GB."""
    config = replace(SHAPES[name], num_layers=num_layers or SHAPES[name].num_layers)
    checkpoint = Checkpoint(config, RandomTensors(config), None, name, DTYPE)
    return Model.from_checkpoint(checkpoint, backend)


def narrow_model(num_layers: int) -> Model:
    """A model of so many layers with next to no arithmetic in them: its time is that of everything around it."""
    config = replace(
        SMOLLM2, num_layers=num_layers, vocab_size=16, hidden_size=16, intermediate_size=16, num_heads=1,
        num_kv_heads=1, head_dim=2,
    )  # fmt: skip
    return Model.from_checkpoint(Checkpoint(config, RandomTensors(config), None, "narrow", DTYPE))


def filled_cache(
    model: Model, context: int, num_sequences: int, room: int
) -> tuple[PagedKVCache, list[CachedSequence]]:
    """Sequences of ``context`` committed positions of random K and V (a prefill would take long), and a token more."""
    torch.manual_seed(0)
    kv = PagedKVCache.with_room_for(model, [context + room] * num_sequences)
    for tensor in (kv.k, kv.v):
        tensor.normal_()
    tokens = torch.randint(model.config.vocab_size, (num_sequences, context + 1)).tolist()
    sequences = [kv.add_sequence(row) for row in tokens]
    ids, lengths = [s.id for s in sequences], [context] * num_sequences
    kv.pool.append(ids, lengths)
    kv.pool.raise_rows(ids, lengths, model.config.num_layers)
    kv.pool.commit(ids, lengths)
    return kv, sequences


def logits(rows: int, vocab_size: int) -> Tensor:
    """fp32 [rows, V]: the first rows of always the same ones."""
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.stack([3 * torch.randn(vocab_size, generator=generator) for _ in range(rows)])


def places(rows: int) -> dict[str, Tensor]:
    """Which random numbers each row draws."""
    return {"positions": torch.arange(rows), "seeds": torch.full((rows,), 7), "samples": torch.zeros(rows).long()}
