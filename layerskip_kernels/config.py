"""What a model is and what a generation does: frozen, validated once, where they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from layerskip_kernels.errors import UnsupportedModel

__all__ = [
    "NUM_SPECULATIONS",
    "Acceptance",
    "GenerationConfig",
    "ModelConfig",
    "RopeScaling",
    "RopeScalingKind",
    "Strategy",
]

RopeScalingKind = Literal["none", "linear", "llama3"]
Strategy = Literal["autoregressive", "self_speculative"]
Acceptance = Literal["exact", "rejection"]

# What a request may ask for: far more than any needs, little enough that no request holds up the others.
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 100
MAX_SAMPLES = 1000

NUM_SPECULATIONS = 4  # where neither the config nor the model says

# Hugging Face calls "no scaling" the default.
ROPE_KIND_OF_HF_TYPE: dict[str, RopeScalingKind] = {"default": "none", "linear": "linear", "llama3": "llama3"}


def _check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    return value


def _check_positive_float(name: str, value: object) -> None:
    number = _check_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_between(name: str, value: object, low: float, high: float) -> None:
    if not low <= _check_number(name, value) <= high:
        raise ValueError(f"{name} must be in {low:g}..{high:g}, got {value}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def _check_token_ids(name: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{name} must be a tuple of token ids, got {value!r} ({type(value).__name__})")
    for token_id in value:
        _check_int(f"each of {name}", token_id, 0)


def _check_stop_strings(value: object) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"stop must be a tuple of strings, got {value!r} ({type(value).__name__})")
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
        _check_int("each token id of logit_bias", token_id, 0)
        _check_between(f"logit_bias of token {token_id}", bias, -1e6, 1e6)
    return dict(value)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the first training.

    ``none``: not at all. ``linear``: divided by ``factor``. ``llama3``: divided by ``factor`` where the
    wavelength is above ``original_max_positions / low_freq_factor``, kept where it is below
    ``original_max_positions / high_freq_factor``, interpolated between; the other kinds ignore the last three
    fields.
    """

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _check_choice("rope scaling kind", self.kind, get_args(RopeScalingKind))
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_positive_float(f"rope scaling {name}", getattr(self, name))
        _check_int("rope scaling original_max_positions", self.original_max_positions, 1)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling high_freq_factor must be above low_freq_factor, got {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and constants of a model of the Llama family.

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
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for size in fields(self):
            if size.type is int:
                _check_int(size.name, getattr(self, size.name), 1)
        _check_positive_float("rms_norm_eps", self.rms_norm_eps)
        _check_positive_float("rope_theta", self.rope_theta)
        if not isinstance(self.rope_scaling, RopeScaling):
            raise TypeError(f"rope_scaling must be a RopeScaling, got {self.rope_scaling!r}")
        _check_bool("tie_word_embeddings", self.tie_word_embeddings)
        _check_bool("attention_bias", self.attention_bias)
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0)
        _check_token_ids("eos_token_ids", self.eos_token_ids)
        self._check_heads()

    def _check_heads(self) -> None:
        if self.head_dim % 2:
            raise UnsupportedModel("head_dim", self.head_dim, "an even number: RoPE rotates pairs")
        if self.num_heads % self.num_kv_heads:
            supported = f"a multiple of num_kv_heads ({self.num_kv_heads})"
            raise UnsupportedModel("num_heads", self.num_heads, supported)

    @property
    def softmax_scale(self) -> float:
        """What the attention scores are multiplied by: 1 / sqrt(head_dim)."""
        return 1.0 / math.sqrt(self.head_dim)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the contents of a Hugging Face ``config.json`` of the Llama family (Llama 1, 2, 3, 3.1, 3.2).

        A field that Transformers lets a file omit gets the value that Transformers gives it. Raises
        ValueError naming a field that is missing, and UnsupportedModel naming one that asks for another model
        than Llama.
        """
        _refuse_other_than_llama(config)
        rope_theta, rope_scaling = _read_rope(config)
        hidden_size = _required_int(config, "hidden_size")
        num_heads = _required_int(config, "num_attention_heads")
        return cls(
            vocab_size=_required_int(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required_int(config, "intermediate_size"),
            num_layers=_required_int(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_given(config, "num_key_value_heads", num_heads),
            head_dim=_read_head_dim(config, hidden_size, num_heads),
            max_positions=_given(config, "max_position_embeddings", 2048),
            rms_norm_eps=_given(config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            bos_token_id=config.get("bos_token_id", 1),
            eos_token_ids=_read_eos(config.get("eos_token_id", 2)),
        )


def _refuse_other_than_llama(config: dict[str, Any]) -> None:
    if not isinstance(config, dict):
        raise TypeError(f"config must be the dict of a config.json, got {type(config).__name__}")
    if config.get("model_type") != "llama":
        raise UnsupportedModel("model_type", config.get("model_type"), "'llama'")
    if _given(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel("hidden_act", config["hidden_act"], "'silu'")
    if config.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias", config["mlp_bias"], "False")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "quantization_config", config["quantization_config"], "no quantisation except inside a GGUF file"
        )


def _given(config: dict[str, Any], field: str, default: Any) -> Any:
    """The field, or the default when it is absent or null."""
    value = config.get(field)
    return default if value is None else value


def _required_int(config: dict[str, Any], field: str) -> int:
    value = config.get(field)
    if value is None:
        raise ValueError(f"the model's config has no {field!r}; a Llama config.json must give it")
    _check_int(field, value, 1)
    return value


def _read_head_dim(config: dict[str, Any], hidden_size: int, num_heads: int) -> int:
    head_dim = config.get("head_dim")
    if head_dim is not None:
        return head_dim
    if hidden_size % num_heads:
        raise UnsupportedModel(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads}), or give head_dim"
        )
    return hidden_size // num_heads


def _read_eos(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling]:
    """rope_theta and the scaling: both in ``rope_parameters``, or theta beside an older ``rope_scaling``."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = _given(config, field, {})
    if not isinstance(rope, dict):
        raise UnsupportedModel(field, rope, "a dict with 'rope_type', or null")
    partial = _given(rope, "partial_rotary_factor", _given(config, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel("partial_rotary_factor", partial, "1.0")
    theta = _given(rope, "rope_theta", _given(config, "rope_theta", 10000.0))
    return theta, _read_rope_scaling(field, rope, _given(config, "max_position_embeddings", 2048))


def _read_rope_scaling(field: str, rope: dict[str, Any], max_positions: int) -> RopeScaling:
    hf_type = _given(rope, "rope_type", _given(rope, "type", "default"))
    kind = ROPE_KIND_OF_HF_TYPE.get(hf_type) if isinstance(hf_type, str) else None
    if kind is None:
        raise UnsupportedModel(f"{field}['rope_type']", hf_type, ", ".join(map(repr, ROPE_KIND_OF_HF_TYPE)))
    if kind == "none":
        return RopeScaling()
    factor = _rope_number(field, rope, "factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    return RopeScaling(
        "llama3",
        factor,
        _rope_number(field, rope, "low_freq_factor"),
        _rope_number(field, rope, "high_freq_factor"),
        _given(rope, "original_max_position_embeddings", max_positions),
    )


def _rope_number(field: str, rope: dict[str, Any], name: str) -> float:
    if rope.get(name) is None:
        raise ValueError(f"the model's config has no {field}[{name!r}]; this rope_type needs it")
    return rope[name]


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How tokens are generated.

    Decoding. ``exit_layer``: how many layers draft; ``num_speculations``: tokens drafted before each verification
    (None: the model's defaults, see `Model.draft_settings`); ``return_logits``: keep the logits of every generated
    token; ``return_kv``: keep K and V; ``logprobs``: keep the log-probability of each token and of the N likeliest
    (0: of the token alone).

    Ending. ``eos_token_ids`` (None: the model's own, ``()``: none) and ``stop_token_ids`` end a text and belong to
    it; a ``stop`` string, wherever token borders are, ends it and does not. None of them before ``min_new_tokens``.

    Choosing. What happens to logits, in this order, which is that of Transformers:

    - ``logit_bias`` {token id: number} is added;
    - ``repetition_penalty`` divides positive and multiplies negative logits of all tokens in prompt and text
      (as in Transformers; 1: no effect);
    - ``frequency_penalty`` times how often a token was generated, then ``presence_penalty`` if it was, are taken
      away; the prompt does not count (as OpenAI defines them; 0: no effect);
    - what would end the text before ``min_new_tokens`` is left out;
    - ``temperature`` divides (0: the greatest logit is taken, and what follows has no effect);
    - ``top_k`` keeps so many of the greatest (0: all), ``top_p`` the fewest of them that hold this much of their
      probability (1: all), ``min_p`` those with at least this part of the greatest's (0: all). Among equal logits,
      the lowest ids are kept.

    Then one token is drawn, with noise that depends on ``seed`` (None: a new one each time), the token's position
    and its id alone. ``num_samples``: how many texts for each prompt; the first is what one alone would be.
    ``acceptance``: when drafts are verified, "exact" gives bit for bit the text of plain sampling with this seed
    (draft and verification share the noise), "rejection" only its distribution, accepting more (Leviathan et al.
    2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    Raises TypeError or ValueError naming the argument.
    """

    strategy: Strategy = "self_speculative"
    exit_layer: int | None = None
    num_speculations: int | None = None
    max_new_tokens: int = 64
    eos_token_ids: tuple[int, ...] | None = None
    return_logits: bool = False
    return_kv: bool = False
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
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

    def __post_init__(self) -> None:
        _check_choice("strategy", self.strategy, get_args(Strategy))
        if self.exit_layer is not None:
            _check_int("exit_layer", self.exit_layer, 1)
        if self.num_speculations is not None:
            _check_int("num_speculations", self.num_speculations, 1)
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        if self.eos_token_ids is not None:
            _check_token_ids("eos_token_ids", self.eos_token_ids)
        _check_bool("return_logits", self.return_logits)
        _check_bool("return_kv", self.return_kv)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_ending()
        self._check_choosing()

    def _check_ending(self) -> None:
        _check_int("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}"
            )
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        _check_stop_strings(self.stop)

    def _check_choosing(self) -> None:
        _check_between("temperature", self.temperature, 0.0, 1e6)
        if 0 < self.temperature < 1e-4:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.0001, got {self.temperature}")
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_between("top_p", self.top_p, 0.0, 1.0)
        _check_between("min_p", self.min_p, 0.0, 1.0)
        _check_between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_between(name, getattr(self, name), -100.0, 100.0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))  # a copy of our own
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_choice("acceptance", self.acceptance, get_args(Acceptance))
        _check_int("num_samples", self.num_samples, 1, MAX_SAMPLES)

    def resolve_exit_layer(self, num_layers: int, default: int | None = None) -> int:
        """The exit layer of a model of ``num_layers`` layers; raises ValueError outside 1..num_layers - 1.

        ``default``: what it is where the config does not say (None: a third of the layers).
        """
        default = max(1, num_layers // 3) if default is None else default
        exit_layer = default if self.exit_layer is None else self.exit_layer
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
