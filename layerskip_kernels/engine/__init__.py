"""Many requests through one model and one cache: schedule, draft, verify, commit, emit; ``generate`` on top of it."""

from layerskip_kernels.engine.engine import DraftPolicy, Engine
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.engine.request import Generation, Output

__all__ = ["DraftPolicy", "Engine", "Generation", "Output", "generate"]
