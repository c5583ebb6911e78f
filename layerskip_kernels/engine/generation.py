"""Some prompts run to completion: the engine in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.steps import PREFILL_ROWS
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.interrupts import DeferredInterrupt
from layerskip_kernels.engine.request import Generation, Output, Prompt, encode, is_conversation
from layerskip_kernels.model.model import Model

__all__ = ["Generation", "generate"]


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    cache: PagedKVCache | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_draft: Callable[[int, list[int], int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generation]:
    """Continue each prompt (text, token ids, or messages with role and content); one text is one prompt, and so is
    one conversation.

    Speculation changes the speed, never a bit. (The exceptions are ``acceptance="rejection"``, which keeps only the
    distribution, and ``strategy="early_exit"``, which does not verify.) How much is drafted: see GenerationConfig.

    Returns num_samples generations for each prompt, those of one prompt side by side. ``on_tokens(i, tokens)`` and
    ``on_text(i, text)`` are called with what generation ``i`` gained, as it comes, and before them
    ``on_draft(i, drafts, num_accepted)`` where tokens were drafted. ``on_prompt(done, total)`` is called after each
    step that prompts took part in: how many of their tokens have been computed, of all. ``cancelled()`` is asked
    between cycles; once it is true, what there is so far is returned. ``cache``: where to put the sequences (default:
    a new one of just the right size); it is left without them, whatever happens.

    Raises ValueError for bad prompts and settings, TypeError for what is no prompt,
    CacheFull when a given cache is too small for one of them, RuntimeError when the logits leave nothing to choose.
    """
    config = config or GenerationConfig()
    token_ids = _encode_all(model, prompts)
    if cache is None:  # nobody needs K and V of adapters of other exits
        model = model.with_exit_adapters(model.draft_exits(config))
    limits = [min(len(ids) + config.max_new_tokens, model.config.max_positions + 1) for ids in token_ids]
    if cache is None:
        cache = PagedKVCache.with_room_for(model, [limit for limit in limits for _ in range(config.num_samples)])
    batch = max(1, len(token_ids) * config.num_samples)
    engine = Engine(model, cache, max_batch=batch, chunk_size=PREFILL_ROWS, drafts="auto")
    index: dict[int, int] = {}  # of each request, in the list of generations
    generations: dict[int, Generation] = {}

    def show(output: Output) -> None:
        i = index[output.request_id]
        if on_draft is not None and output.drafts:
            on_draft(i, list(output.drafts), output.num_accepted)
        if on_tokens is not None and output.tokens:
            on_tokens(i, list(output.tokens))
        if on_text is not None and output.text:
            on_text(i, output.text)
        if output.error is not None:
            raise output.error
        if output.generation is not None:
            generations[i] = output.generation

    with DeferredInterrupt() as interrupt:
        try:
            interrupt.held = False
            for ids in token_ids:
                for request_id in engine.add_samples(ids, config):
                    index[request_id] = len(index)
            total = left = engine.num_prompt_tokens
            while engine.num_unfinished and not (cancelled is not None and cancelled()):
                outputs = engine.step()
                if on_prompt is not None and left:
                    left = engine.num_prompt_tokens
                    on_prompt(total - left, total)
                for output in outputs:
                    show(output)
        finally:
            interrupt.held = True
            engine.close()
    for output in engine.step():
        show(output)
    return [generations[i] for i in range(len(index))]


def _encode_all(model: Model, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    """The token ids of each prompt. Raises TypeError where ``prompts`` is not a text or a list of prompts."""
    if isinstance(prompts, str) or is_conversation(prompts):
        prompts = [prompts]
    try:
        if isinstance(prompts, Mapping):
            raise TypeError("a list is needed")
        found: list[Any] = list(prompts)
    except TypeError as error:
        raise TypeError(f"prompts must be a text or a list of prompts, got {type(prompts).__name__}") from error
    numbers = [i for i, prompt in enumerate(found) if hasattr(prompt, "__index__") and not hasattr(prompt, "__len__")]
    if numbers:
        i = numbers[0]
        raise TypeError(
            f"prompts must be a list of prompts, but prompts[{i}] is a single token id ({found[i]!r:.40}); "
            "put the token ids of one prompt into a list of their own: [[1, 2, 3]]"
        )
    return [encode(model, prompt) for prompt in found]
