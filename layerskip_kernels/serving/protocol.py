"""What may be asked: the fields of OpenAI's API, those that other servers' clients send, and ours.

A field that would change the answer and is not supported is refused by name; one that changes nothing is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from layerskip_kernels.config import MAX_LOGPROBS, MAX_SAMPLES, GenerationConfig

__all__ = [
    "AnyRequest",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "FieldError",
    "SamplingRequest",
    "TokenizeRequest",
]

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


class FieldError(ValueError):
    """A field whose value does not do, though its type does; the message begins with its name."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field[:100]
        super().__init__(f"{self.field} {problem}")


def _join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, all of text, with that text; others as they are, to be refused."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return message
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    return {**message, "content": "\n".join(known)} if len(known) == len(parts) else message


Messages = list[Annotated[dict[str, Any], AfterValidator(_join_parts)]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: StrictBool = False


class AnyRequest(BaseModel):
    """What every request may say: which model it means."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: StrictStr | None = None


class SamplingRequest(AnyRequest):
    """What both kinds of completion share. Fields left out take the API's defaults: temperature 1, one sample."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

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

    @field_validator("n", mode="before")
    @classmethod
    def _null_is_one(cls, value: Any) -> Any:
        return 1 if value is None else value

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> SamplingRequest:
        for name, value in (self.model_extra or {}).items():
            if name in NOTHING:
                if value not in NOTHING[name]:
                    raise FieldError(name, "is not supported by this server")
            elif name not in HARMLESS:
                raise FieldError(name, "is not a field of this API")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream to be true")
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

    @field_validator("echo", mode="before")
    @classmethod
    def _null_is_no(cls, value: Any) -> Any:
        return False if value is None else value

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and not self.prompt:
            raise FieldError("prompt", "must not be an empty list")
        if len(self.prompts) > MAX_PROMPTS:
            raise FieldError("prompt", f"must hold at most {MAX_PROMPTS} prompts, got {len(self.prompts)}")
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "must be at least 1; 0 is for echo alone")
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

    messages: Messages
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
            raise FieldError("top_logprobs", "needs logprobs to be true")
        asks_for_prompt = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and asks_for_prompt:
            raise FieldError("continue_final_message", "and add_generation_prompt exclude each other")
        if taken := {"self", "messages", "add_generation_prompt"} & (self.chat_template_kwargs or {}).keys():
            raise FieldError("chat_template_kwargs", f"must not hold {min(taken)}")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(AnyRequest):
    """POST /tokenize: a text, or a conversation."""

    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "or messages must be given, and not both")
        return self


class DetokenizeRequest(AnyRequest):
    """POST /detokenize."""

    tokens: Ids
