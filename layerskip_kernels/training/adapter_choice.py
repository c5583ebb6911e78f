"""What an exit adapter would gain: the speed-up that measured costs and measured acceptance predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from layerskip_kernels.config import MOST_SPECULATIONS
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.steps import draft_step, prefill, verify_step
from layerskip_kernels.decoding.types import Draft
from layerskip_kernels.evaluation.timing import Candidate, interleave
from layerskip_kernels.model.model import Model

__all__ = ["StepCosts", "measure_costs"]

DRAFTS, SMALL_VOCAB, ROUNDS = 4, 1024, 9
ROWS = (1, 2, 3, 4, 5, 7, 9, 13, MOST_SPECULATIONS + 1)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one sequence's steps on this machine.

    ``verify``: of a verification by its rows, of which 1 is plain decoding; ``layer``: of a draft's layer; ``word``: of
    each word that its head chooses among; ``call``: of a draft besides.
    """

    verify: dict[int, float]
    layer: float
    word: float
    call: float

    def speed_up(
        self, acceptance: float, num_layers: float, vocab_size: int, num_kv_layers: int = 0
    ) -> tuple[float, int]:
        """Over plain decoding, and the number of drafts that gives it: drafts of ``num_layers`` layers, an adapter's
        included, each of which is accepted with this probability if those before it are. ``num_kv_layers``: of the
        adapter, which verification runs once more, for the last draft."""
        draft, adapter = self.call + num_layers * self.layer + vocab_size * self.word, num_kv_layers * self.layer
        gains = {}
        for count in (rows - 1 for rows in self.verify if rows > 1):
            tokens = sum(acceptance**i for i in range(count + 1))
            gains[count] = tokens * self.verify[1] / (count * draft + adapter + self.verify[count + 1])
        best = max(gains, key=gains.__getitem__)
        return gains[best], best


def measure_costs(model: Model, tokens: Sequence[int], rounds: int = ROUNDS) -> StepCosts:
    """Time the steps after a text, in turns."""
    model = model.with_exit_adapters([])
    vocab = list(range(min(SMALL_VOCAB, model.config.vocab_size)))
    drafting, whole = model.with_draft_vocab(vocab), model.with_draft_vocab(None)
    deep = min(max(2, model.config.num_layers // 2), model.config.num_layers - 1)
    cache = PagedKVCache.with_room_for(model, [len(tokens) + MOST_SPECULATIONS + 2])
    sequence = cache.add_sequence(tokens)
    cache.commit(prefill(model, cache, [sequence]))

    def undo() -> None:
        cache.rollback([sequence])

    def draft(which: Model, exit_layer: int) -> None:
        draft_step(which, cache, [sequence], exit_layer, DRAFTS)

    def verify(rows: int) -> None:
        verify_step(model, cache, Draft.of_tokens([sequence], [[0] * (rows - 1)]))

    runs: dict[str, Callable[[], None]] = {f"verify {rows}": partial(verify, rows) for rows in ROWS}
    drafts = {"shallow": (drafting, 1), "deep": (drafting, deep), "wide": (whole, 1)}
    runs |= {name: partial(draft, *which) for name, which in drafts.items()}
    timings = interleave({name: Candidate(run, restore=undo) for name, run in runs.items()}, rounds)
    shallow, deeper, wide = (timings[name].median / DRAFTS for name in drafts)
    plain = timings["verify 1"].median / model.config.num_layers  # where there is no second exit to tell a layer by
    layer = max(0.0, (deeper - shallow) / (deep - 1)) if deep > 1 else plain
    more_words = model.config.vocab_size - len(vocab)
    word = max(0.0, (wide - shallow) / more_words) if more_words else 0.0
    call = max(0.0, shallow - layer - len(vocab) * word)
    return StepCosts({rows: timings[f"verify {rows}"].median for rows in ROWS}, layer, word, call)
