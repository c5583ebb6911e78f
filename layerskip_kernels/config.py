"""What a model is and what a generation does: frozen, validated once, where they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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

__all__ = [
    "BACKENDS",
    "NUM_SPECULATIONS",
    "Acceptance",
    "GenerationConfig",
    "ModelConfig",
    "RopeScaling",
    "RopeScalingKind",
    "Strategy",
]

RopeScalingKind = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
NormPlacement = Literal["before", "after", "both"]
QkNorm = Literal["none", "head", "whole"]
Activation = Literal["silu", "gelu_tanh"]
LayerRope = Literal["main", "local", "none"]
Strategy = Literal["autoregressive", "self_speculative", "early_exit"]
Acceptance = Literal["exact", "rejection"]

BACKENDS = ("cpu", "reference", "triton")
AUTO: Literal["auto"] = "auto"

# What a request may ask for: far more than any needs, little enough that no request holds up the others.
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 100
MAX_SAMPLES = 1000

NUM_SPECULATIONS = 4  # where neither the config nor the model says
MOST_SPECULATIONS = 16  # where they are chosen on the way


def _check_stop_strings(value: object) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"stop must be a text or a tuple of texts, got {value!r} ({type(value).__name__})")
    if len(value) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(value)}")
    for text in value:
        if not isinstance(text, str):
            raise TypeError(f"each of stop must be a str, got {text!r} ({type(text).__name__})")
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"each of stop must have 1..{MAX_STOP_LENGTH} characters, got {len(text)}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"each of stop must be Unicode text, got {text!r}, which holds a lone surrogate")


def _checked_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {value!r} ({type(value).__name__})")
    for token_id, bias in value.items():
        check_int("each token id of logit_bias", token_id, 0)
        check_between(f"logit_bias of token {token_id}", bias, -1e6, 1e6)
    return dict(value)


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


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How tokens are generated.

    Decoding. ``strategy``:

    - "self_speculative": the first ``exit_layer`` layers draft up to ``num_speculations`` tokens, all layers verify
      them: the tokens, logits, K and V of plain decoding, bit for bit;
    - "autoregressive": plain decoding, all layers for each token;
    - "early_exit": the first ``exit_layer`` layers alone, never verified. Lossy: this is the text of a smaller model,
      usually a much worse one, and what LayerSkip's `--exit_layer` shows without speculation.

    Either can be "auto": chosen on the way, by the seconds that steps take and by how many drafts were accepted, for
    each exit and each confidence of its drafts. Drafting then stops where one draft more would not pay, and drafts
    nothing where none does, so that speculation costs at most a few per cent where it does not help. An
    ``exit_layer`` of "auto" is one of some between an eighth and half of the layers, with a number of drafts at most.

    Where one is None, the model's measured defaults are used (`layerskip.json`, `Model.draft_settings`). `generate`
    drafts a fixed number of tokens if the model has such defaults or the config gives one of the two; if neither says
    how to draft, both are "auto". ``Engine(drafts=...)`` decides the same for all its requests.

    ``return_logits``: keep the logits of every generated token; ``return_kv``: keep K and V; ``logprobs``: keep the
    log-probability of each token and of the N likeliest (0: of the token alone).

    Ending. ``eos_token_ids`` (None: the model's own, ``()``: none) and ``stop_token_ids`` end a text and belong to
    it. A ``stop`` string (one text, or several), wherever token borders are, ends it and does not belong to it; one
    that is a special token is found as a token. None of them before ``min_new_tokens``. ``skip_special_tokens``:
    False shows special tokens in the text.

    Choosing. What happens to logits, in this order, which is that of Transformers:

    - ``logit_bias`` {token id: number} is added;
    - ``repetition_penalty`` divides positive and multiplies negative logits of all tokens in prompt and text
      (as in Transformers; 1: no effect);
    - ``frequency_penalty`` times how often a token was generated, then ``presence_penalty`` if it was, are taken
      away; the prompt does not count (as OpenAI defines them; 0: no effect);
    - what would end the text before ``min_new_tokens`` is left out;
    - ``temperature`` divides (0: the greatest logit is taken);
    - ``top_k`` keeps so many of the greatest (0: all), ``top_p`` the fewest of them that hold this much of their
      probability (1: all), ``min_p`` those with at least this part of the greatest's (0: all). Among equal logits,
      the lowest ids are kept.

    Then one token is drawn, with noise that depends on ``seed`` (None: a new one each time), the token's position
    and its id alone. ``num_samples``: how many texts for each prompt; the first is what one alone would be.
    ``acceptance``: when drafts are verified, "exact" gives bit for bit the text of plain sampling with this seed
    (draft and verification share the noise), "rejection" only its distribution, accepting more (Leviathan et al.
    2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    Settings that would have no effect are refused: ``exit_layer``, ``num_speculations`` and "rejection" where nothing
    is drafted, and ``top_k``, ``top_p`` and ``min_p`` at temperature 0. (At temperature 0 there is no noise, so
    ``seed`` is not needed and both rules of acceptance are the same; these may be given.)

    Raises TypeError or ValueError naming the argument.
    """

    strategy: Strategy = "self_speculative"
    exit_layer: int | Literal["auto"] | None = None
    num_speculations: int | Literal["auto"] | None = None
    max_new_tokens: int = 64
    eos_token_ids: tuple[int, ...] | None = None
    return_logits: bool = False
    return_kv: bool = False
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: str | tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    acceptance: Acceptance = "exact"
    logprobs: int | None = None
    num_samples: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, get_args(Strategy))
        for name in ("exit_layer", "num_speculations"):
            if getattr(self, name) not in (None, AUTO):
                check_int(name, getattr(self, name), 1)
        check_int("max_new_tokens", self.max_new_tokens, 1)
        if self.eos_token_ids is not None:
            check_token_ids("eos_token_ids", self.eos_token_ids)
        check_bool("return_logits", self.return_logits)
        check_bool("return_kv", self.return_kv)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        check_bool("skip_special_tokens", self.skip_special_tokens)
        self._check_ending()
        self._check_choosing()
        self._check_effects()

    @property
    def asks_for_auto(self) -> bool:
        """Whether the exit layer or the number of drafts is to be chosen on the way."""
        return AUTO in (self.exit_layer, self.num_speculations)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def plain(self) -> "GenerationConfig":
        """The same request by plain decoding: what speculative decoding is compared with."""
        return replace(self, strategy="autoregressive", exit_layer=None, num_speculations=None, acceptance="exact")

    def _check_effects(self) -> None:
        """Refuse settings that would be without effect."""
        if self.strategy == "autoregressive" and self.exit_layer is not None:
            raise ValueError(
                "exit_layer has no effect with strategy='autoregressive', which runs all layers; use "
                "strategy='early_exit' to stop at that layer, or 'self_speculative' to draft with it"
            )
        if self.strategy == "early_exit" and self.exit_layer in (None, AUTO):
            raise ValueError("strategy='early_exit' needs exit_layer, a number: how many layers choose the tokens")
        if self.strategy != "self_speculative":
            for name, unused in (("num_speculations", None), ("acceptance", "exact")):
                if getattr(self, name) != unused:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with strategy={self.strategy!r}, which drafts "
                        "nothing; leave it out, or use strategy='self_speculative'"
                    )
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect at temperature 0, which takes the greatest logit; "
                    f"give a temperature above 0, or leave {name} out"
                )

    def _check_ending(self) -> None:
        check_int("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )
        check_token_ids("stop_token_ids", self.stop_token_ids)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _check_stop_strings(self.stop)

    def _check_choosing(self) -> None:
        check_between("temperature", self.temperature, 0.0, 1e6)
        if 0 < self.temperature < 1e-4:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.0001, got {self.temperature}")
        check_int("top_k", self.top_k, 0, 2**31 - 1)
        check_between("top_p", self.top_p, 0.0, 1.0)
        check_between("min_p", self.min_p, 0.0, 1.0)
        check_between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_between(name, getattr(self, name), -100.0, 100.0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))  # a copy of our own
        if self.seed is not None:
            check_int("seed", self.seed, 0, 2**63 - 1)
        check_choice("acceptance", self.acceptance, get_args(Acceptance))
        check_int("num_samples", self.num_samples, 1, MAX_SAMPLES)

    def resolve_exit_layer(self, num_layers: int, default: int | None = None) -> int:
        """The exit layer of a model of ``num_layers`` layers; raises ValueError outside 1..num_layers - 1.

        ``default``: what it is, or at first, where the config names none (None: a third of the layers).
        """
        default = max(1, num_layers // 3) if default is None else default
        exit_layer = self.exit_layer if isinstance(self.exit_layer, int) else default
        if num_layers < 2:
            raise ValueError(
                f"exit_layer needs a model of at least 2 layers, got one of {num_layers}; use strategy='autoregressive'"
            )
        if exit_layer >= num_layers:
            raise ValueError(
                f"exit_layer must be in 1..{num_layers - 1} for this model of {num_layers} layers, got "
                f"{exit_layer}; leave it None for {default}, or use strategy='autoregressive'"
            )
        return exit_layer
