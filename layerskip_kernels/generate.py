"""All of some prompts at once: the engine, run to the end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine import Engine
from layerskip_kernels.kv_cache import PagedKVCache
from layerskip_kernels.model import Model
from layerskip_kernels.request import Generation, Output, encode
from layerskip_kernels.steps import PREFILL_ROWS

__all__ = ["Generation", "generate"]


def generate(
    model: Model,
    prompts: ListLike[ListLike[int] | str],
    config: GenerationConfig | None = None,
    *,
    cache: PagedKVCache | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_draft: Callable[[int, list[int], int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generation]:
    """Continue each prompt (text or token ids); the strategy changes the speed, never a bit.

    (The one exception is ``acceptance="rejection"``, which keeps only the distribution.) Returns num_samples
    generations for each prompt, those of one prompt side by side. ``on_tokens(i, tokens)`` is called with the
    tokens generation ``i`` gained, as they come, and before it ``on_draft(i, drafts, num_accepted)`` where some
    were drafted. ``cancelled()`` is asked between cycles; once it is true, what there is so far is returned.
    ``cache``: where to put the sequences (default: a new one of just the right size); it is left without them.
    Raises ValueError for bad prompts and settings, CacheFull when a given cache is too small for one of them,
    RuntimeError when the logits leave nothing to choose.
    """
    config = config or GenerationConfig()
    token_ids = [encode(model, prompt) for prompt in prompts]
    limits = [min(len(ids) + config.max_new_tokens, model.config.max_positions + 1) for ids in token_ids]
    cache = cache or PagedKVCache.with_room_for(model, [limit for limit in limits for _ in range(config.num_samples)])
    batch = max(1, len(prompts) * config.num_samples)
    engine = Engine(model, cache, max_batch=batch, chunk_size=PREFILL_ROWS, drafts="fixed")
    index: dict[int, int] = {}  # of each request, in the list of generations
    generations: dict[int, Generation] = {}

    def show(output: Output) -> None:
        i = index[output.request_id]
        if on_draft is not None and output.drafts:
            on_draft(i, list(output.drafts), output.num_accepted)
        if on_tokens is not None and output.tokens:
            on_tokens(i, list(output.tokens))
        if output.error is not None:
            raise output.error
        if output.generation is not None:
            generations[i] = output.generation

    try:
        for ids in token_ids:
            for request_id in engine.add_samples(ids, config):
                index[request_id] = len(index)
        while engine.num_unfinished:
            if cancelled is not None and cancelled():
                break
            for output in engine.step():
                show(output)
    finally:
        for request_id in index:
            engine.cancel(request_id)
    for output in engine.step():
        show(output)
    return [generations[i] for i in range(len(index))]
