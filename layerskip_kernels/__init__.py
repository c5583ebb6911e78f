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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip_kernels.config import GenerationConfig
    from layerskip_kernels.decoding.kv_cache import CacheStats, PagedKVCache
    from layerskip_kernels.decoding.sampling import Sampler, TokenLogprobs, make_sampler
    from layerskip_kernels.decoding.steps import draft_step, prefill, verify_step
    from layerskip_kernels.decoding.stop_strings import StopStrings
    from layerskip_kernels.decoding.types import CachedSequence, Draft, Verdict
    from layerskip_kernels.decoding.types import CachedSequence as Sequence
    from layerskip_kernels.engine.engine import Engine
    from layerskip_kernels.engine.generation import generate
    from layerskip_kernels.engine.request import Generation, Output
    from layerskip_kernels.errors import CacheFull, SwapError, UnsupportedModel
    from layerskip_kernels.model.loading import load_model
    from layerskip_kernels.model.model import Model
    from layerskip_kernels.model_config import ModelConfig, RopeScaling

    __version__: str

__all__ = [
    "CacheFull",
    "CacheStats",
    "CachedSequence",
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

_MODULES = {
    "config": ("GenerationConfig",),
    "model_config": ("ModelConfig", "RopeScaling"),
    "decoding.kv_cache": ("CacheStats", "PagedKVCache"),
    "decoding.sampling": ("Sampler", "TokenLogprobs", "make_sampler"),
    "decoding.steps": ("draft_step", "prefill", "verify_step"),
    "decoding.stop_strings": ("StopStrings",),
    "decoding.types": ("CachedSequence", "Draft", "Verdict"),
    "engine.engine": ("Engine",),
    "engine.generation": ("generate",),
    "engine.request": ("Generation", "Output"),
    "errors": ("CacheFull", "SwapError", "UnsupportedModel"),
    "model.loading": ("load_model",),
    "model.model": ("Model",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_ALIASES = {"Sequence": "CachedSequence"}  # its name before 0.2


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that ``layerskip --help`` need not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom needed

        return version(__name__)
    original = _ALIASES.get(name, name)
    if original not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[original]}"), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
