"""What may be asked: the fields of OpenAI's API, those that other servers' clients send, and ours.

A field that would change the answer and is not supported is refused by name; one that changes nothing is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from layerskip_kernels.config import MAX_LOGPROBS, MAX_SAMPLES, GenerationConfig

__all__ = ["ChatRequest", "CompletionRequest", "DetokenizeRequest", "SamplingRequest", "TokenizeRequest"]

Number = StrictFloat | StrictInt
Ids = list[StrictInt]
MAX_PROMPTS = 128  # of one completion request

# Accepted and without effect here: they concern the provider's side, not the answer.
HARMLESS = {
    "metadata", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "priority", "request_id",
    "parallel_tool_calls", "spaces_between_special_tokens",
}  # fmt: skip
# Refused unless they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none"), "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
    "audio": (None,), "prediction": (None,),
    "reasoning_effort": (None,), "verbosity": (None,), "web_search_options": (None,), "best_of": (None, 1),
    "suffix": (None, ""), "use_beam_search": (None, False), "length_penalty": (None, 1, 1.0), "guided_json": (None,),
    "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,), "structured_outputs": (None,),
    "logits_processors": (None, []), "skip_special_tokens": (None, True), "truncate_prompt_tokens": (None,),
}  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: StrictBool = False


class SamplingRequest(BaseModel):
    """What both kinds of completion share. Fields left out take the API's defaults: temperature 1, one sample."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_SAMPLES)] = 1
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: StrictBool = False
    ignore_eos: StrictBool = False
    min_tokens: StrictInt = 0
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: StrictBool = False
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    cache_salt: StrictStr | None = None
    # ours
    exit_layer: StrictInt | Literal["auto"] | None = None
    num_speculations: StrictInt | Literal["auto"] | None = None
    strategy: StrictStr | None = None
    acceptance: StrictStr | None = None

    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> SamplingRequest:
        for name, value in (self.model_extra or {}).items():
            if name in NOTHING:
                if value not in NOTHING[name]:
                    raise ValueError(f"{name} is not supported by this server")
            elif name not in HARMLESS:
                raise ValueError(f"{name} is not a field of this API")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens asked for; None: as many as the model has positions."""
        raise NotImplementedError

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Log-probabilities of this many likeliest tokens beside the chosen one; None: of none."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def generation_config(self, room: int) -> GenerationConfig:
        """``room``: positions that the model has left after the prompt. Raises as GenerationConfig does."""
        wanted = self.max_new_tokens
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p, "top_k": None if self.top_k == -1 else self.top_k, "min_p": self.min_p,
            "presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty, "seed": self.seed, "exit_layer": self.exit_layer,
            "num_speculations": self.num_speculations, "strategy": self.strategy, "acceptance": self.acceptance,
            "logprobs": self.top_logprobs_wanted, "logit_bias": self._bias(),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "eos_token_ids": () if self.ignore_eos else None,
        }  # fmt: skip
        if given["temperature"] == 0:  # clients send filters along, which then have no effect
            given |= dict.fromkeys(("top_p", "top_k", "min_p"))
        return GenerationConfig(
            max_new_tokens=max(1, room) if wanted is None else wanted,
            num_samples=self.n,
            stop=self.stops,
            min_new_tokens=self.min_tokens,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _bias(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        if wrong := next((key for key in self.logit_bias if not key.isdecimal()), None):
            raise ValueError(f"logit_bias must map token ids to numbers, got the key {wrong[:40]!r}")
        return {int(key): value for key, value in self.logit_bias.items()}


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: StrictStr | Ids | list[StrictStr] | list[Ids]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: StrictBool = False
    add_special_tokens: StrictBool = True

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and not self.prompt:
            raise ValueError("prompt must not be an empty list")
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(self.prompts)}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1; 0 is for echo alone")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        asks_for_prompt = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and asks_for_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text, or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: Ids
