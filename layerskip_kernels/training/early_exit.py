"""The early-exit loss: how much each layer's exit counts, at which step of the training.

LayerSkip (arXiv 2404.16710), section 4.2: J = sum_l e~(t, l) CE(g(x_{l+1}), Y), where g is the final norm with the LM
head, shared by all layers, and e~(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i). Layers count from 0; the exit of layer l
reads what layer l puts out, so a model that runs ``exit_layer`` layers exits at l = exit_layer - 1.
"""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Curriculum", "EarlyExitLoss", "layer_weight"]

Curriculum = Literal["none", "rotational", "gradual"]


@dataclass(frozen=True, slots=True)
class EarlyExitLoss:
    """Which exits are trained, when, and how much each counts.

    ``scale``: e_scale of e(l). ``curriculum``: all exits always (``none``), every ``rotation``-th, moved on each step
    (``rotational``), or from the last layer down, one more every T / (2 L) steps (``gradual``). ``weights``: instead of
    e(l), exit_layer -> weight for the exits named, the last layer included (others have none). ``distillation``: the
    share of an exit's target that is the last layer's prediction; the rest is the text. ``draft_steps``: after each
    step of the whole model, so many that run only as far as the last exit below it and learn from the text alone: a
    step of 4 of 30 layers costs a fraction of a whole one, and the layers that draft have the most to learn.
    ``draft_vocab``: a file of the tokens that drafts will be chosen from (`layerskip draft-vocab`): the exits below the
    last learn to choose among these alone. ``anchor``, with LoRA: how much their states are held to those the layers
    put out without adapters (relative squared distance per label). An exit does not care how large its state is, but
    the layers after it add to that state, and know those of before.
    """

    scale: float = 1.0
    curriculum: Curriculum = "none"
    rotation: int = 1
    weights: dict[int, float] | None = None
    distillation: float = 0.0
    draft_steps: int = 0
    draft_vocab: str | None = None
    anchor: float = 0.0

    def __post_init__(self) -> None:
        if self.scale < 0.0:
            raise ValueError(f"early_exit.scale must be at least 0, got {self.scale}")
        if self.curriculum not in get_args(Curriculum):
            raise ValueError(f"early_exit.curriculum must be one of {get_args(Curriculum)}, got {self.curriculum!r}")
        if self.rotation < 1:
            raise ValueError(f"early_exit.rotation must be at least 1, got {self.rotation}")
        if not 0.0 <= self.distillation <= 1.0:
            raise ValueError(f"early_exit.distillation must be in [0, 1], got {self.distillation}")
        if self.anchor < 0.0:
            raise ValueError(f"early_exit.anchor must be at least 0, got {self.anchor}")
        exits = sum(weight > 0.0 for weight in (self.weights or {}).values())
        if self.draft_vocab is not None and exits < 2:
            raise ValueError("early_exit.draft_vocab needs early_exit.weights that name an exit below the whole model")
        if self.draft_steps < 0 or (self.draft_steps and (exits < 2 or self.curriculum != "none")):
            raise ValueError(
                f"early_exit.draft_steps must be at least 0 and needs early_exit.weights that name an exit below the "
                f"whole model, and no curriculum, got {self.draft_steps}"
            )
        for exit_layer, weight in (self.weights or {}).items():
            if exit_layer < 1 or weight < 0.0:
                raise ValueError(
                    f"early_exit.weights must be exit_layer >= 1 to weight >= 0, got {exit_layer}: {weight}"
                )

    def normalised(self, num_layers: int, step: int, num_steps: int) -> dict[int, float]:
        """e~(t, l) of the layers that count at this step, by layer; they sum to 1.

        The last layer always counts, but for ``draft_steps``.
        """
        last = step % (self.draft_steps + 1) == 0
        chosen = {
            layer: self._weight(layer, num_layers)
            for layer in range(num_layers)
            if (last if layer == num_layers - 1 else self._enabled(layer, num_layers, step, num_steps))
        }
        total = sum(chosen.values())
        return {layer: weight / total for layer, weight in chosen.items() if weight > 0.0}

    def _weight(self, layer: int, num_layers: int) -> float:
        if self.weights is None:
            return layer_weight(layer, num_layers, self.scale)
        if not {num_layers} <= self.weights.keys() <= set(range(1, num_layers + 1)) or not self.weights[num_layers]:
            raise ValueError(
                f"early_exit.weights must name exits in 1..{num_layers}, the whole model ({num_layers}) among them, "
                f"got {sorted(self.weights)}"
            )
        return self.weights.get(layer + 1, 0.0)

    def _enabled(self, layer: int, num_layers: int, step: int, num_steps: int) -> bool:
        """C(t, l)."""
        if self.curriculum == "rotational":
            return layer % self.rotation == step % self.rotation
        if self.curriculum == "gradual":
            return layer >= num_layers - 1 - step * 2 * num_layers // max(num_steps, 1)
        return True


def layer_weight(layer: int, num_layers: int, scale: float) -> float:
    """e(l): scale * (0 + 1 + ... + l), and L - 1 + scale * (0 + ... + L - 2) for the last layer (equation 5)."""
    if layer < num_layers - 1:
        return scale * (layer * (layer + 1) // 2)
    return num_layers - 1 + scale * ((num_layers - 2) * (num_layers - 1) // 2)
