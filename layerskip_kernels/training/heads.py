"""Attention heads that copy, moved down to the layers that draft.

A model says again what stood in its prompt with two heads, one after the other: a *previous-token* head notes at each
position which token came before; an *induction* head then looks for the position whose note is the current token, and
says what stands there (arXiv 2209.11895). In a pretrained model they can live deep (layers 16 and 17 of the 30 of
SmolLM2-135M), out of reach of an early exit, and layers that lack them take very long to grow some. Yet the residual
stream means much the same in all layers: the same heads, put into layers 2 and 3, find each other at once.

    python -m layerskip_kernels.training.heads SmolLM2-135M-Instruct

tells how much every head attends to either place, in random tokens that are said twice.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.sources import locate

__all__ = ["Transplant", "copying_heads", "transplant_heads"]

Place = tuple[int, int]  # a layer and a head of it


@dataclass(frozen=True, slots=True)
class Transplant:
    """A head that is put over another. ``head``, ``to``: layer and query head, counted from 0. The K and V head that it
    reads goes with it, so the other query heads of the place's group read that one, too."""

    head: Place
    to: Place

    def __post_init__(self) -> None:
        for name in ("head", "to"):
            place = tuple(getattr(self, name))
            if len(place) != 2:
                raise ValueError(f"lora.transplants: {name} must be [layer, head], got {list(place)}")
            object.__setattr__(self, name, place)


@torch.no_grad()
def transplant_heads(model: Any, transplants: list[Transplant]) -> None:
    """Let the adapters of ``model``, a ``PeftModel`` around a Llama, start with heads of its own deeper layers.

    Each head takes head_dim of the rank of an adapter that it changes, and what is left starts as PEFT has it. Raises
    ValueError for a head that does not exist, for two of them in one place and for too small a rank, and
    UnsupportedModel for another family, whose heads read otherwise normed states.
    """
    if not transplants:
        return
    if model.config.model_type != "llama":
        raise UnsupportedModel("model_type", model.config.model_type, "'llama', for lora.transplants")
    llama = model.base_model.model
    layers, head_dim = llama.model.layers, llama.config.head_dim
    taken: dict[tuple[int, str], int] = {}  # ranks of each adapter
    for (target, name, place), (source, head) in _moves(transplants, llama.config).items():
        theirs, adapted = (getattr(layers[layer].self_attn, name) for layer in (source, target))
        if name == "o_proj":
            part = theirs.base_layer.weight.unflatten(1, (-1, head_dim))[:, head]
        else:  # and what their norm multiplies its output by, and that of the target does not
            ratio = layers[source].input_layernorm.weight / layers[target].input_layernorm.weight
            part = theirs.base_layer.weight.unflatten(0, (-1, head_dim))[head] * ratio
        rank = taken.setdefault((target, name), 0)
        _start(adapted, part, place * head_dim, rank)
        taken[target, name] += head_dim


def _moves(transplants: list[Transplant], config: Any) -> dict[tuple[int, str, int], Place]:
    """Layer, projection and head to be replaced -> layer and head it is replaced by; query heads share K and V."""
    group = config.num_attention_heads // config.num_key_value_heads
    moves: dict[tuple[int, str, int], Place] = {}
    for transplant in transplants:
        for layer, head in (transplant.head, transplant.to):
            if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
                raise ValueError(
                    f"lora.transplants must name a layer below {config.num_hidden_layers} and a head below "
                    f"{config.num_attention_heads}, got {[layer, head]}"
                )
        (source, head), (target, place) = transplant.head, transplant.to
        for name, heads in (("q_proj", 1), ("k_proj", group), ("v_proj", group), ("o_proj", 1)):
            move = (source, head // heads)
            if moves.setdefault((target, name, place // heads), move) != move:
                raise ValueError(f"lora.transplants: two heads can't both be the {name} of {[target, place]}")
    return moves


def _start(adapted: Any, part: Tensor, first: int, rank: int) -> None:
    """Let W + scale B A have ``part`` as its rows, or columns, from ``first`` on; by the ranks from ``rank`` on."""
    weight, scale = adapted.base_layer.weight, adapted.scaling["default"]
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    rows = part.shape[1] == weight.shape[1]
    size = part.shape[0] if rows else part.shape[1]
    if rank + size > len(a):
        raise ValueError(f"lora.early_rank must be at least {rank + size} for these transplants, got {len(a)}")
    here, ranks = slice(first, first + size), slice(rank, rank + size)
    change = (part - (weight[here] if rows else weight[:, here])) / scale
    unit = change.square().mean().sqrt().sqrt()  # entries of A and of B begin at one size
    a[ranks], b[:, ranks] = 0.0, 0.0
    chooses = unit * torch.eye(size, dtype=a.dtype, device=a.device)
    if rows:
        a[ranks], b[here, ranks] = change / unit, chooses
    else:
        a[ranks, here], b[:, ranks] = chooses, change / unit


@torch.no_grad()
def copying_heads(model: LlamaForCausalLM, length: int = 32, batch: int = 8) -> Tensor:
    """fp32 [2, layers, heads]: each head's mean attention to the token before, and to the token after the one that
    equals the current, in ``length`` random tokens that are said twice. The model needs eager attention."""
    draws = torch.Generator().manual_seed(0)
    once = torch.randint(model.config.vocab_size, (batch, length), generator=draws)
    attention = torch.stack(model(torch.cat([once, once], 1), output_attentions=True, use_cache=False).attentions)
    second = torch.arange(length, 2 * length - 1)
    scores = [attention[..., second, second - 1], attention[..., second, second - length + 1]]
    return torch.stack(scores).mean((2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description="how much each attention head copies")
    parser.add_argument("model", help="what load_model takes")
    folder, _ = locate(parser.parse_args().model, torch.float32)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    )
    for name, scores in zip(("previous token", "induction"), copying_heads(model), strict=True):
        best = scores.flatten().argsort(descending=True)[:5].tolist()
        heads = scores.shape[1]
        print(f"{name}: " + ", ".join(f"[{i // heads}, {i % heads}] {scores.flatten()[i]:.2f}" for i in best))


if __name__ == "__main__":
    main()
