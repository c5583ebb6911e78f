"""What an exit adapter starts as: the model's next layers, and a head that reads their states as best a matrix can."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.model.exit_adapter import MLP, AdapterKind, num_adapter_layers
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.tensor_names import layer_shapes
from layerskip_kernels.training.adapter_layers import AdapterInTraining

__all__ = ["LENS_ROWS", "OwnWeights", "lens"]

Tensors = dict[str, Tensor]
LENS_ROWS = 200_000  # positions that a lens is fitted to
RIDGE = 1e-3  # of the mean square of a number


class OwnWeights:
    """Tensors of a model as numbers, fp32: its LM head [V, D], its final norm [D], and what adapters start as.

    ``layers``: which of the model's layers those may be; ``start``: the tensors of an adapter to start as instead.
    """

    def __init__(self, source: Any, layers: Iterable[int], start: Tensors | None = None) -> None:
        checkpoint = read_checkpoint(source, torch.float32, on_demand=True)
        self.config, tensors = checkpoint.config, checkpoint.tensors
        self._start = start
        self.head = tensors.pop("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
        self.norm = tensors.pop("model.norm.weight")
        names, existing = layer_shapes(self.config), {min(layer, self.config.num_layers - 1) for layer in layers}
        self._layers = {
            layer: {name: tensors.pop(f"model.layers.{layer}.{name}") for name in names} for layer in sorted(existing)
        }

    def first_adapter(self, exit_layer: int, kind: AdapterKind) -> Tensors:
        """The layers after the exit, or the last one where there are no more, under the model's final norm; of the
        kind MLP the next layer's MLP alone."""
        if self._start is not None:
            return self._start
        tensors = {"norm.weight": self.norm}
        names = layer_shapes(self.config, kind != MLP)
        for n in range(num_adapter_layers(kind)):
            copied = self._layers[min(exit_layer + n, self.config.num_layers - 1)]
            tensors |= {f"layers.{n}.{name}": copied[name] for name in names}
        return tensors


@torch.no_grad()
def lens(layers: AdapterInTraining, states: Iterable[Tensor], last: Iterable[Tensor], norm: Tensor) -> Tensor:
    """The matrix M [D, D] for which M y is nearest to the model's last state under its final norm ``norm``, where y is
    what the adapter puts out: ridge regression, so a tuned lens (arXiv 2303.08112) without steps.

    ``states``, ``last``: of texts, [T, D] at the exit and after the model's last layer; the first LENS_ROWS rows count.
    """
    width, rows = len(norm), 0
    gram, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for at_exit, at_end in zip(states, last, strict=True):
        put_out = layers(at_exit[None])[0].double()
        gram += put_out.T @ put_out
        cross += put_out.T @ layers.norm(at_end.float(), norm).double()
        rows += len(at_exit)
        if rows >= LENS_ROWS:
            break
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, cross).T.float()
