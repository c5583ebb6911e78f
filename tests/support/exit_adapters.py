"""Exit adapters with random weights, and the model that such an adapter makes of a model's first layers."""

from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels import Model, PagedKVCache, prefill
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.exit_adapter import (
    HEAD,
    HEAD_IDS,
    AdapterKind,
    adapter_kind,
    adapter_shapes,
    num_adapter_layers,
)
from layerskip_kernels.ops import cache_ops
from support.models import cache_for, checkpoint, config

LATE = 0.3  # what agreeing_model has: later layers that add little


def random_adapter(
    model: Model, kind: AdapterKind = 1, seed: int = 5, lm_head: Tensor | None = None, every: int = 1
) -> dict[str, Tensor]:
    """Layers that change what an exit says a little: most drafts are still accepted, not all.

    ``lm_head``: the model's, of which a head of its own, with each ``every``-th token, is made; None: no head.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in adapter_shapes(model.config, kind).items():
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if name == "norm.weight":
            tensor = model.weights.final_norm.cpu().float() * (1 + 0.01 * tensor)
        elif name.endswith("norm.weight"):
            tensor = 1 - model.config.norm_offset + 0.2 * tensor
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= LATE / 2
        tensors[name] = tensor.to(model.dtype)
    if lm_head is not None:
        rows = lm_head[::every]
        noise = torch.randn(rows.shape, generator=generator) * 0.1 * rows.float().std()
        tensors |= {HEAD: (rows + noise).to(model.dtype), HEAD_IDS: torch.arange(0, len(lm_head), every)}
    return tensors


def own_checkpoint(dtype: torch.dtype, **changes: object) -> Checkpoint:
    """The checkpoint that agreeing_model is made of."""
    found = checkpoint(config(**changes), dtype)
    for name, tensor in found.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            tensor *= LATE
    return found


def cut_model(found: Checkpoint, exit_layer: int, adapter: dict[str, Tensor], backend: str = "cpu") -> Model:
    """The first layers of a checkpoint and an adapter as a model by itself: what it says, drafts are to be."""
    count = num_adapter_layers(adapter_kind(adapter))
    kept = {
        name: tensor
        for name, tensor in found.tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < exit_layer
    }
    for name, tensor in adapter.items():
        kind, _, rest = name.partition(".")
        if kind == "norm":
            kept["model.norm.weight"] = tensor
        elif kind == "head":
            kept |= {"lm_head.weight": tensor} if name == HEAD else {}
        else:
            layer, _, within = rest.partition(".")
            kept[f"model.layers.{exit_layer + int(layer)}.{within}"] = tensor
    cut = replace(found.config, num_layers=exit_layer + count)
    cut = replace(cut, tie_word_embeddings=False) if HEAD in adapter else cut
    return Model.from_checkpoint(replace(found, config=cut, tensors=kept), backend)


def lm_head(dtype: torch.dtype, **changes: object) -> Tensor:
    """That of own_checkpoint."""
    tensors = own_checkpoint(dtype, **changes).tensors
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def all_kv(cache: PagedKVCache, sequence) -> tuple[Tensor, Tensor]:
    """A sequence's committed k and v, those of adapters' layers included, on the CPU."""
    pages = torch.tensor(cache.pool.pages(sequence.id), dtype=torch.int32, device=cache.all_k.device)
    error = cache_ops.new_error(cache.all_k.device)
    k, v = cache_ops.gather_kv(pages, cache.length(sequence), cache.all_k, cache.all_v, error)
    cache_ops.check_error(error)
    return k.cpu(), v.cpu()


def greedy(model: Model, tokens: list[int], count: int) -> list[int]:
    cache = cache_for(model, len(tokens) + count)
    sequence = cache.add_sequence(tokens)
    for _ in range(count):
        cache.commit(prefill(model, cache, [sequence]))
    return sequence.tokens[len(tokens) :]


def prefilled_kv(model: Model, tokens: list[int]) -> tuple[Tensor, Tensor]:
    cache = cache_for(model, len(tokens))
    sequence = cache.add_sequence(tokens)
    cache.commit(prefill(model, cache, [sequence]))
    return all_kv(cache, sequence)
