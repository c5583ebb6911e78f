"""A clock that only the two steps move: by a second for each layer that one call passes."""

from typing import Any

import pytest

from layerskip_kernels.engine import forward
from layerskip_kernels.ops import memory
from layerskip_kernels.ops.cpu import CpuOps


class LayerClock:
    """Stands in for the engine's clock; ``seconds`` is what it shows. ``slow`` is what a layer takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.slow = 0.0, 1.0
        monkeypatch.setattr(memory, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(CpuOps, "runs_cycles", False)
        monkeypatch.setattr(forward, "draft_step", self._counted(forward.draft_step, self._drafting))
        monkeypatch.setattr(forward, "verify_step", self._counted(forward.verify_step, self._verifying))

    def _counted(self, step: Any, layers: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            self.seconds += self.slow * layers(result, *arguments, **options)
            return result

        return run

    @staticmethod
    def _drafting(draft: Any, model: Any, cache: Any, sequences: Any, exit_layer: int, *_: Any, **__: Any) -> int:
        return exit_layer * max(draft.counts)

    @staticmethod
    def _verifying(verdict: Any, model: Any, *_: Any, **__: Any) -> int:
        return model.config.num_layers
