"""What a model is: its sizes, constants and the switches that set its family apart. Frozen, checked when made."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from layerskip_kernels.checks import (
    check_between,
    check_bool,
    check_choice,
    check_int,
    check_positive_float,
    check_token_ids,
)
from layerskip_kernels.errors import UnsupportedModel, shown

__all__ = ["LayerRope", "ModelConfig", "NormPlacement", "RopeScaling", "RopeScalingKind"]

RopeScalingKind = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
NormPlacement = Literal["before", "after", "both"]
QkNorm = Literal["none", "head", "whole"]
Activation = Literal["silu", "gelu_tanh"]
LayerRope = Literal["main", "local", "none"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are changed for contexts longer than those of the first training (model/rope.py).

    - ``none``: not at all;
    - ``linear``: all are divided by ``factor``;
    - ``dynamic``: not at all up to the model's ``max_positions``, which is as far as this package goes with it;
    - ``llama3``: divided by ``factor`` where the wavelength is above ``original_max_positions / low_freq_factor``, kept
      where it is below ``original_max_positions / high_freq_factor``, interpolated between;
    - ``yarn`` (arXiv 2309.00071): as ``llama3``, but interpolated over the frequencies that turn ``beta_slow`` to
      ``beta_fast`` times within ``original_max_positions`` (``truncate``: rounded outwards to whole frequencies), with
      cosines and sines multiplied by ``attention_factor``;
    - ``longrope`` (arXiv 2402.13753): each divided by its own of ``short_factors``, with the same ``attention_factor``.
      Beyond ``original_max_positions`` other factors would count for all positions; this package ends there.

    Each kind ignores the fields that it does not name.
    """

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for factor in self.short_factors:
            check_positive_float("each of rope scaling short_factors", factor)
        check_choice("rope scaling kind", self.kind, get_args(RopeScalingKind))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            check_positive_float(f"rope scaling {name}", getattr(self, name))
        check_int("rope scaling original_max_positions", self.original_max_positions, 1)
        check_bool("rope scaling truncate", self.truncate)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling high_freq_factor must be above low_freq_factor, got {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and constants of a model, and the switches that set its family apart (model/families.py).

    A switch that is not given is a Llama's:

    - ``qkv_bias``, ``out_bias``, ``mlp_bias``: whether q, k and v, the output projection, gate, up and down have one;
    - ``qk_norm``: whether q and k are normed before RoPE, each head by itself or the whole projection;
    - ``norm_placement``: norms before attention and MLP, after them (x + norm(f(x))), or both;
    - ``norm_offset``: what is added to a norm's weight before it counts (Gemma's 1);
    - ``activation``: of the gate;
    - ``rotary_dim``: how many numbers of a head RoPE turns, the first ones (None: all);
    - ``layer_ropes``: for each layer, ``rope_theta`` and ``rope_scaling`` ("main"), ``local_rope_theta`` without
      scaling ("local"), or no RoPE ("none"); empty: "main" in all;
    - ``layer_windows``: for each layer, how many positions a row sees, itself the last of them (0: all); empty: all;
    - ``embedding_multiplier``, ``residual_multiplier``, ``logits_multiplier``: of embeddings, of what attention and MLP
      add, of logits; ``attention_scale``: of attention scores (None: 1 / sqrt(head_dim));
    - ``score_cap``, ``logits_cap``: c * tanh(x / c) of scores and logits (0: none).

    Raises TypeError or ValueError for a field of the wrong type or range, and UnsupportedModel for a shape
    that the kernels do not run: an odd ``head_dim``, or query heads that are no multiple of the KV heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    norm_placement: NormPlacement = "before"
    norm_offset: float = 0.0
    activation: Activation = "silu"
    rotary_dim: int | None = None
    layer_ropes: tuple[LayerRope, ...] = ()
    local_rope_theta: float = 10000.0
    layer_windows: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    attention_scale: float | None = None
    score_cap: float = 0.0
    logits_cap: float = 0.0

    def __post_init__(self) -> None:
        for size in fields(self):
            if size.type is int:
                check_int(size.name, getattr(self, size.name), 1)
            elif size.type is bool:
                check_bool(size.name, getattr(self, size.name))
        for name in ("rms_norm_eps", "rope_theta", "local_rope_theta"):
            check_positive_float(name, getattr(self, name))
        if not isinstance(self.rope_scaling, RopeScaling):
            raise TypeError(f"rope_scaling must be a RopeScaling, got {shown(self.rope_scaling)}")
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 with yarn, got {self.rope_theta}")
        if self.bos_token_id is not None:
            check_int("bos_token_id", self.bos_token_id, 0)
        check_token_ids("eos_token_ids", self.eos_token_ids, self.vocab_size - 1)
        self._check_heads()
        self._check_switches()

    def _check_heads(self) -> None:
        if self.head_dim % 2:
            raise UnsupportedModel("head_dim", self.head_dim, "an even number: RoPE rotates pairs")
        if self.num_heads % self.num_kv_heads:
            supported = f"a multiple of num_kv_heads ({self.num_kv_heads})"
            raise UnsupportedModel("num_heads", self.num_heads, supported)

    def _check_switches(self) -> None:
        check_choice("qk_norm", self.qk_norm, get_args(QkNorm))
        check_choice("norm_placement", self.norm_placement, get_args(NormPlacement))
        check_choice("activation", self.activation, get_args(Activation))
        for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            check_positive_float(name, getattr(self, name))
        if self.attention_scale is not None:
            check_positive_float("attention_scale", self.attention_scale)
        for name in ("norm_offset", "score_cap", "logits_cap"):
            check_between(name, getattr(self, name), 0.0, 1e6)
        if self.rotary_dim is not None:
            check_int("rotary_dim", self.rotary_dim, 2, self.head_dim)
            if self.rotary_dim % 2:
                raise UnsupportedModel("rotary_dim", self.rotary_dim, "an even number: RoPE rotates pairs")
        frequencies, factors = (self.rotary_dim or self.head_dim) // 2, len(self.rope_scaling.short_factors)
        if self.rope_scaling.kind == "longrope" and factors != frequencies:
            raise ValueError(f"short_factors must be {frequencies} numbers, one for each frequency, got {factors}")
        for name in ("layer_ropes", "layer_windows"):
            if (count := len(getattr(self, name))) not in (0, self.num_layers):
                raise ValueError(f"{name} must have one entry for each of {self.num_layers} layers, got {count}")
        for rope in self.layer_ropes:
            check_choice("each of layer_ropes", rope, get_args(LayerRope))
        for window in self.layer_windows:
            check_int("each of layer_windows", window, 0)

    @property
    def softmax_scale(self) -> float:
        """What the attention scores are multiplied by: 1 / sqrt(head_dim), unless the model says otherwise."""
        return 1.0 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale
