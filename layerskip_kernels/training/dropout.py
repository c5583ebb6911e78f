"""Layer dropout: which samples skip which layers, at which step of the training.

LayerSkip (arXiv 2404.16710), section 4.1: x_{l+1,t} = x_{l,t} + M(p_{l,t}) f_l(x_{l,t}), where M is 0 with
probability p_{l,t} = S(t) D(l) p_max, per sample; nothing is rescaled. Layers and steps count from 0.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["LayerDropout", "Schedule", "dropped_samples", "layer_scale", "time_scale"]

Schedule = Literal["constant", "exponential", "decreasing"]


@dataclass(frozen=True, slots=True)
class LayerDropout:
    """How much is dropped, and when.

    ``p_max``: the probability at the last layer, before S(t). ``schedule``, S(t): ``constant`` (fine-tuning and
    continual pre-training), ``exponential`` (from scratch: rises from 0 to 1), ``decreasing`` (falls from 1 to 0, as
    later work found better, with ``inverse_density``). ``inverse_density``: a layer that runs contributes
    f_l(x) / (1 - p_{l,t}), so that the expectation of x does not depend on p. ``seed``: of the draws. ``group``: rows
    after which the draws repeat (None: the rows of one process's micro-batch), so that every rank drops equally many.
    """

    p_max: float = 0.1
    schedule: Schedule = "constant"
    inverse_density: bool = False
    seed: int = 0
    group: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.p_max < 1.0:
            raise ValueError(f"layer_dropout.p_max must be in [0, 1), got {self.p_max}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"layer_dropout.schedule must be one of {get_args(Schedule)}, got {self.schedule!r}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"layer_dropout.group must be at least 1, or None, got {self.group}")

    def probabilities(self, num_layers: int, step: int, num_steps: int) -> list[float]:
        """p_{l,t} of every layer at step ``step`` of ``num_steps``."""
        scale = time_scale(self.schedule, step, num_steps)
        return [scale * layer_scale(layer, num_layers) * self.p_max for layer in range(num_layers)]


def layer_scale(layer: int, num_layers: int) -> float:
    """D(l) = exp(l ln2 / (L - 1)) - 1: 0 at the first layer, 1 at the last (equation 2)."""
    return math.exp(layer * math.log(2.0) / (num_layers - 1)) - 1.0 if num_layers > 1 else 0.0


def time_scale(schedule: Schedule, step: int, num_steps: int) -> float:
    """S(t): 1, or exp(t ln2 / (T - 1)) - 1 (equation 3), or 1 minus that."""
    if schedule == "constant":
        return 1.0
    progress = min(max(step / (num_steps - 1), 0.0), 1.0) if num_steps > 1 else 1.0
    rising = math.exp(progress * math.log(2.0)) - 1.0
    return rising if schedule == "exponential" else 1.0 - rising


def dropped_samples(dropout: LayerDropout, probabilities: list[float], step: int, rows: int) -> Tensor:
    """bool [layers, rows], on the CPU: the samples of a micro-batch that skip each layer.

    A function of the seed, the step and the row alone: ranks need not talk to draw the same, and a training that is
    resumed draws what it would have drawn. Micro-batches of one step share their draws.
    """
    group = dropout.group or rows
    generator = torch.Generator().manual_seed(_seed(dropout.seed, step))
    draws = torch.rand(len(probabilities), group, generator=generator, dtype=torch.float64)
    dropped = draws < torch.tensor(probabilities, dtype=torch.float64).unsqueeze(1)
    return dropped.repeat(1, -(-rows // group))[:, :rows]


def _seed(seed: int, step: int) -> int:
    # Hashed, because PyTorch's CPU generator reads 32 bits of its seed: a shifted sum would lose one of the two.
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest(), "big")
