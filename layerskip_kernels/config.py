"""What a generation does: frozen, checked when made. What a model is: model_config.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from layerskip_kernels.checks import check_between, check_bool, check_choice, check_int, check_token_ids
from layerskip_kernels.errors import shown

__all__ = ["BACKENDS", "NUM_SPECULATIONS", "Acceptance", "GenerationConfig", "Strategy"]

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
        raise TypeError(f"stop must be a text or several, got {shown(value)} ({type(value).__name__})")
    if len(value) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(value)}")
    for text in value:
        if not isinstance(text, str):
            raise TypeError(f"each of stop must be a str, got {shown(text)} ({type(text).__name__})")
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"each of stop must have 1..{MAX_STOP_LENGTH} characters, got {len(text)}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"each of stop must be Unicode text, got {shown(text)}, which holds a lone surrogate")


def _checked_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {shown(value)} ({type(value).__name__})")
    for token_id, bias in value.items():
        check_int("each token id of logit_bias", token_id, 0)
        check_between(f"logit_bias of token {token_id}", bias, -1e6, 1e6)
    return dict(value)


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
    - ``top_k`` keeps this many of the greatest (0: all), ``top_p`` the fewest of them that hold this much of their
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
    eos_token_ids: Sequence[int] | None = None
    return_logits: bool = False
    return_kv: bool = False
    min_new_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    stop: str | Sequence[str] = ()
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
        for name in ("eos_token_ids", "stop_token_ids", "stop"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
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
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

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
