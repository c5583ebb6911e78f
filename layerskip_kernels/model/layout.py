"""Tensors by their Hugging Face names -> what a backend takes: a layer's weights, and an exit adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels.model.exit_adapter import (
    HEAD,
    HEAD_IDS,
    ExitAdapter,
    adapter_kind,
    exit_sizes,
    num_adapter_layers,
)
from layerskip_kernels.model.tensor_names import NORMS
from layerskip_kernels.model.weight_hash import HashedTensors
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.operands import DraftHead, LayerWeights, ModelSizes, ModelWeights
from layerskip_kernels.ops import Backend

__all__ = ["laid_out_adapter", "layer_weights"]

Placer = Callable[[Tensor], Tensor]


def layer_weights(
    tensors: dict[str, Tensor] | HashedTensors, prefix: str, pack: Placer, place: Placer, config: ModelConfig
) -> LayerWeights:
    """The layer whose tensors' names begin with ``prefix``, each taken out of ``tensors``.

    ``pack`` lays linear weights out for a backend and ``place`` puts tensors where it keeps them.
    """

    def take(name: str) -> Tensor:
        return tensors.pop(prefix + name)

    def bias(wanted: bool, *names: str) -> Tensor | None:
        return place(torch.cat([take(f"{name}_proj.bias") for name in names])) if wanted else None

    attends = f"{prefix}self_attn.q_proj.weight" in tensors
    places = {at: name for at, name in NORMS[config.norm_placement].items() if attends or at.startswith("mlp")}
    norms = {at: place(take(f"{name}.weight")) for at, name in places.items()}
    if attends and config.qk_norm != "none":
        norms |= {name: place(take(f"self_attn.{name}.weight")) for name in ("q_norm", "k_norm")}
    qkv_bias = bias(attends and config.qkv_bias, *(f"self_attn.{p}" for p in "qkv"))
    out_bias = bias(attends and config.out_bias, "self_attn.o")
    empty = place(torch.empty(0))
    wq, wk, wv, wo = (pack(take(f"self_attn.{p}_proj.weight")) if attends else empty for p in "qkvo")
    gate_up_bias, down_bias = bias(config.mlp_bias, "mlp.gate", "mlp.up"), bias(config.mlp_bias, "mlp.down")
    w_gate, w_up, w_down = (pack(take(f"mlp.{p}_proj.weight")) for p in ("gate", "up", "down"))
    return LayerWeights(
        wq=wq, wk=wk, wv=wv, qkv_bias=qkv_bias, wo=wo, out_bias=out_bias, w_gate=w_gate, w_up=w_up, w_down=w_down,
        gate_up_bias=gate_up_bias, down_bias=down_bias, **{"attn_norm": None, "mlp_norm": None, **norms},
    )  # fmt: skip


def laid_out_adapter(
    exit_layer: int, tensors: dict[str, Tensor], config: ModelConfig, own: ModelWeights, sizes: ModelSizes, ops: Backend
) -> ExitAdapter:
    """An adapter of these tensors (`exit_adapter.adapter_shapes`, and HEAD_IDS with a head), for the model of these
    weights and sizes."""
    tensors, place = dict(tensors), ops.placer()

    def pack(weight: Tensor) -> Tensor:
        return place(ops.pack_weight(weight))

    layers = tuple(
        layer_weights(tensors, f"layers.{layer}.", pack, place, config)
        for layer in range(num_adapter_layers(adapter_kind(tensors)))
    )
    head = DraftHead(pack(tensors.pop(HEAD)), tensors.pop(HEAD_IDS)) if HEAD in tensors else None
    drafting = replace(own, final_norm=place(tensors.pop("norm.weight")))
    weights = replace(drafting, layers=layers[:1] + layers)
    return ExitAdapter(exit_layer, drafting, weights, exit_sizes(sizes, exit_layer, len(layers)), head, head)
