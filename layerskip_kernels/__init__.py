"""Early-exit self-speculative decoding with the same bits as plain decoding.

    model = load_model()
    cache = PagedKVCache.with_room_for(model, [512])
    sequence = cache.add_sequence(model.tokenizer.encode("def fibonacci(n):"))
    cache.commit(prefill(model, cache, [sequence]))
    while len(sequence.tokens) < 100:
        draft = draft_step(model, cache, [sequence], exit_layer=10, num_speculations=4)
        cache.commit(verify_step(model, cache, draft))

or, in one call, ``generate(model, ["def fibonacci(n):"])``.
"""

from layerskip_kernels.config import GenerationConfig, ModelConfig, RopeScaling
from layerskip_kernels.engine import Engine
from layerskip_kernels.errors import CacheFull, SwapError, UnsupportedModel
from layerskip_kernels.generate import Generation, generate
from layerskip_kernels.kv_cache import CacheStats, PagedKVCache, Sequence
from layerskip_kernels.loading import load_model
from layerskip_kernels.model import Model
from layerskip_kernels.request import Output
from layerskip_kernels.sampling import Sampler, StopStrings, TokenLogprobs, make_sampler
from layerskip_kernels.steps import Draft, Verdict, draft_step, prefill, verify_step

__all__ = [
    "CacheFull",
    "CacheStats",
    "Draft",
    "Engine",
    "Generation",
    "GenerationConfig",
    "Model",
    "ModelConfig",
    "Output",
    "PagedKVCache",
    "RopeScaling",
    "Sampler",
    "Sequence",
    "StopStrings",
    "SwapError",
    "TokenLogprobs",
    "UnsupportedModel",
    "Verdict",
    "draft_step",
    "generate",
    "load_model",
    "make_sampler",
    "prefill",
    "verify_step",
]
