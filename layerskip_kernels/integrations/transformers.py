"""Transformers' ``model.generate`` on these kernels, with the weights that the model already holds.

    from layerskip_kernels.integrations.transformers import custom_generate

    model.generate(**inputs, max_new_tokens=64, custom_generate=custom_generate)
    model.generate(**inputs, custom_generate=custom_generate, exit_layer=4, num_speculations=6)

A streamer is given as ``custom_generate=partial(custom_generate, streamer=streamer)``: Transformers (5.23) does not
hand its own ``streamer`` argument on to a callable.

What is asked for is done or refused: greedy decoding and sampling with Transformers' processors that have a counterpart
here, batches padded on the left, num_return_sequences, end-of-text tokens, streamers and stopping criteria. Everything
else (beams, other processors, dictionaries with scores) raises NotImplementedError with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from layerskip_kernels.config import Acceptance, GenerationConfig, Strategy
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.request import Output
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.model import Model
from layerskip_kernels.model.tensor_names import fused_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["custom_generate", "model_of"]

_models: WeakKeyDictionary[PreTrainedModel, tuple[tuple[tuple[int, int], ...], Model]] = WeakKeyDictionary()

# What model.generate prepares for a decoder and this package does not need.
_NOT_NEEDED = {
    "attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "return_dict",
    "tokenizer", "use_cache",
}  # fmt: skip
# Fields of generation_config that change the output and have no counterpart here, with the values that ask for nothing.
_REFUSED = {
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "penalty_alpha": (None, 0.0),
    "return_dict_in_generate": (None, False),
}


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    generation_config: Any,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    streamer: Any = None,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    strategy: Strategy = "self_speculative",
    acceptance: Acceptance = "exact",
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """What ``model.generate(custom_generate=...)`` calls: input_ids int64 [B, T] -> int64 [B, T + new tokens].

    ``exit_layer``, ``num_speculations``, ``strategy``, ``acceptance``: as in GenerationConfig. Rows that end early
    are filled with the padding token. Sampling draws its seed from torch's generator, so ``torch.manual_seed`` selects
    the text. Raises NotImplementedError naming what cannot be honoured, UnsupportedModel for another kind of model.
    """
    _refuse_the_rest(generation_config, synced_gpus, model_kwargs)
    end = _until(stopping_criteria)
    settings = _sampling(logits_processor, generation_config)
    width = input_ids.size(1)
    if end.max_length <= width:
        return input_ids
    config = GenerationConfig(
        strategy=strategy,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        acceptance=acceptance,
        max_new_tokens=end.max_length - width,
        eos_token_ids=end.eos_token_ids,
        **settings,
    )
    if streamer is not None:
        if input_ids.size(0) > 1:
            raise ValueError("a streamer takes one sequence; generate without one, or one prompt at a time")
        streamer.put(input_ids.cpu())
    prompts = _without_padding(input_ids, model_kwargs.get("attention_mask"))
    rows = _Rows(input_ids, end.others, streamer)
    rows.decode(model_of(model), prompts, config)
    return rows.padded(_padding(generation_config))


def model_of(model: PreTrainedModel) -> Model:
    """A Transformers model's weights in this package's layout, kept as long as the model lives and is not changed.

    Raises UnsupportedModel for a model of another kind, with the field of its config.
    """
    state = {name: tensor.detach().to("cpu") for name, tensor in model.state_dict().items()}
    versions = tuple((tensor.data_ptr(), tensor._version) for tensor in model.parameters())
    if model in _models and _models[model][0] == versions:
        return _models[model][1]
    config = read_hf_config(model.config.to_dict(), "the model's config")
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name in list(state):
        if rows := fused_parts(name, config):
            state |= zip(rows, state.pop(name).split(list(rows.values())), strict=True)
    checkpoint = Checkpoint(config, state, None, type(model).__name__, model.dtype)
    ours = Model.from_checkpoint(checkpoint)
    _models[model] = versions, ours
    return ours


@dataclass
class _Rows:
    """The batch on its way: what each row has gained, and who wants to hear of it."""

    input_ids: Tensor
    criteria: list[Callable[..., Any]]
    streamer: Any
    gained: list[list[int]] = field(default_factory=list)

    def decode(self, model: Model, prompts: list[list[int]], config: GenerationConfig) -> None:
        self.gained = [[] for _ in prompts]
        limit = max(map(len, prompts)) + config.max_new_tokens
        cache = PagedKVCache.with_room_for(model, [limit] * len(prompts))
        engine = Engine(model, cache, max_batch=len(prompts))
        # Each row draws its own text, also where num_return_sequences repeats a prompt.
        configs = [replace(config, seed=None if config.seed is None else config.seed + i) for i in range(len(prompts))]
        requests = map(engine.add_request, prompts, configs)
        row_of = {request: row for row, request in enumerate(requests)}
        while engine.num_unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                if self._take(row_of[output.request_id], output):
                    engine.cancel(output.request_id)
        if self.streamer is not None:
            self.streamer.end()

    def _take(self, row: int, output: Output) -> bool:
        """Hand a row's tokens on, one by one as Transformers does. Returns whether a criterion ends it."""
        if output.finish_reason == "cancelled":
            return False
        for token in output.tokens:
            self.gained[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self._ends(row):
                return True
        return False

    def _ends(self, row: int) -> bool:
        if not self.criteria:
            return False
        ids = torch.cat([self.input_ids[row].cpu(), torch.tensor(self.gained[row])])[None]
        return any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in self.criteria)

    def padded(self, padding: int) -> Tensor:
        """input_ids with what each row gained, int64 [B, longest]."""
        longest = max(map(len, self.gained))
        rows = [[*tokens, *[padding] * (longest - len(tokens))] for tokens in self.gained]
        return torch.cat([self.input_ids, torch.tensor(rows, dtype=torch.int64).to(self.input_ids.device)], dim=1)


@dataclass
class _End:
    """When a text ends: its greatest length, its end-of-text tokens, and criteria to ask after each token."""

    max_length: int
    eos_token_ids: tuple[int, ...] = ()
    others: list[Callable[..., Any]] = field(default_factory=list)


def _until(criteria: Sequence[Any]) -> _End:
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    end = _End(max_length=0)
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            end.max_length = min(end.max_length or criterion.max_length, criterion.max_length)
        elif isinstance(criterion, EosTokenCriteria):
            end.eos_token_ids += tuple(criterion.eos_token_id.tolist())
        else:
            end.others.append(criterion)
    return end


def _sampling(processors: Sequence[Any], generation_config: Any) -> dict[str, Any]:
    """The settings of GenerationConfig that Transformers' processors stand for."""
    from transformers.generation import logits_process as hf

    settings: dict[str, Any] = {}
    for processor in processors:
        match processor:
            case hf.TemperatureLogitsWarper():
                settings["temperature"] = float(processor.temperature)
            case hf.TopKLogitsWarper():
                settings["top_k"] = int(processor.top_k)
            case hf.TopPLogitsWarper():
                settings["top_p"] = float(processor.top_p)
            case hf.MinPLogitsWarper():
                settings["min_p"] = float(processor.min_p)
            case hf.RepetitionPenaltyLogitsProcessor():
                settings["repetition_penalty"] = float(processor.penalty)
            case hf.MinNewTokensLengthLogitsProcessor():
                settings["min_new_tokens"] = int(processor.min_new_tokens)
            case _:
                raise NotImplementedError(f"logits processor {type(processor).__name__} has no counterpart here")
    if generation_config.do_sample:
        settings.setdefault("temperature", 1.0)
        settings["seed"] = int(torch.randint(2**62, ()))
    return settings


def _refuse_the_rest(generation_config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    for name, harmless in _REFUSED.items():
        if (value := getattr(generation_config, name, None)) not in harmless:
            raise NotImplementedError(f"{name}={value!r} has no counterpart here; leave it out")
    if synced_gpus:
        raise NotImplementedError("synced_gpus=True has no counterpart here")
    if unknown := sorted(name for name, value in model_kwargs.items() if name not in _NOT_NEEDED and value is not None):
        raise NotImplementedError(f"{', '.join(unknown)}: not known to layerskip_kernels' custom_generate")


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Each row's own tokens. Raises ValueError for padding that is not on the left."""
    if attention_mask is None:
        return input_ids.tolist()
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask.any(dim=1).all()):
        raise ValueError("attention_mask must be 0 for padding on the left and 1 for each row's tokens")
    return [row[kept].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def _padding(generation_config: Any) -> int:
    padding = generation_config.pad_token_id
    if padding is None:
        eos = generation_config.eos_token_id
        padding = eos[0] if isinstance(eos, list) else eos
    return int(padding) if padding is not None else 0
