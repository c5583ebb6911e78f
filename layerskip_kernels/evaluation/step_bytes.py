"""What the steps read, in bytes, and what speed-up they allow, on paper."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import LayerWeights

__all__ = ["ceiling", "draft_bytes", "head_bytes", "layer_bytes", "verify_bytes"]


def layer_bytes(model: Model, layers: int = 1, positions: int = 0) -> int:
    """What a pass through the first layers reads: their weights as they are packed, and K and V of ``positions``.

    Once for all rows of the pass. Layers of a quantised model may differ in size.
    """
    return _bytes(model, model.weights.layers[:layers], positions)


def _bytes(model: Model, layers: Sequence[LayerWeights], positions: int) -> int:
    c = model.config
    kv = model.dtype.itemsize * 2 * positions * c.num_kv_heads * c.head_dim
    return sum(layer.nbytes + kv for layer in layers)


def head_bytes(model: Model, exit_layer: int | None = None) -> int:
    """What the final norm and the LM head read; drafts at an exit may have a head of their own (Model.exit_at)."""
    weights, head, _ = model.exit_at(exit_layer or model.config.num_layers)
    return weights.final_norm.nbytes + (weights.lm_head if head is None else head.weight).nbytes


def draft_bytes(model: Model, exit_layer: int, num_drafts: int, length: int, num_sequences: int = 1) -> int:
    """Weights and KV read by draft_step after ``length`` known tokens: for each draft a pass, through exit adapters as
    well, and a head."""
    adapted = (layer for adapter in model.exit_at(exit_layer).adapters for layer in adapter.weights.layers[1:])
    layers = (*model.weights.layers[:exit_layer], *adapted)
    passes = sum(_bytes(model, layers, num_sequences * (length + i)) for i in range(num_drafts))
    return passes + num_drafts * head_bytes(model, exit_layer)


def verify_bytes(model: Model, num_drafts: int, length: int) -> int:
    """Weights and KV read by verify_step: every layer and the head once, whatever the exit layer was."""
    return layer_bytes(model, model.config.num_layers, length + num_drafts) + head_bytes(model)


def ceiling(num_layers: int, exit_layer: int, num_drafts: int, acceptance: float, head: float = 0.0) -> float:
    """The speed-up over plain decoding if time were layers passed: S = L (1 + a d) / (d E + L).

    ``acceptance`` a: accepted over drafted tokens; ``head``: what the LM head costs, in layers. It is paid with
    every draft and once in a verification: S = (L + h) (1 + a d) / (d (E + h) + L + h). A batched verification
    counts as one pass.
    """
    plain = num_layers + head
    return plain * (1 + acceptance * num_drafts) / (num_drafts * (exit_layer + head) + plain)
