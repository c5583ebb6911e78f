"""How often ragged batches need steps of a new kind, which the Triton backend launches kernel by kernel or captures.

The kinds alone are counted, on the CPU backend: what decides them is on the host.
"""

from collections import Counter

import pytest

from layerskip_kernels import Engine, GenerationConfig, PagedKVCache
from layerskip_kernels.ops.cpu import CpuOps
from layerskip_kernels.triton_ops.graphs import MAX_PASSES, table_width
from layerskip_kernels.triton_ops.row_maps import draft_steps, verify_rows
from support.models import SMALL, agreeing_model, random_tokens

PAGE = 4


class Kinds:
    """The kinds of steps that an engine asks for: how often each was met."""

    def __init__(self, monkeypatch):
        self.seen, self.passes, self.cycles = Counter(), set(), []
        draft, verify = CpuOps.draft_pass, CpuOps.verify_pass

        def draft_pass(ops, weights, sizes, cache, rows, head, exit_layer, max_drafts, *args):
            sequences, drafts, *steps = draft_steps(rows.num_drafts.tolist(), max_drafts)
            kind = "draft", exit_layer, sequences, drafts, table_width(rows.block_table.size(1), PAGE)
            self.passes.add(kind)
            self.met(*((kind, num_rows) for num_rows in steps))
            return draft(ops, weights, sizes, cache, rows, head, exit_layer, max_drafts, *args)

        def verify_pass(ops, weights, sizes, cache, rows, num_drafts, judged, *args):
            on_host = (rows.depths, rows.query_start_loc, num_drafts, judged)
            kind = verify_rows(*(tensor.tolist() for tensor in on_host))[0], table_width(rows.block_table.size(1), PAGE)
            self.passes.add(kind)
            self.met(kind)
            return verify(ops, weights, sizes, cache, rows, num_drafts, judged, *args)

        monkeypatch.setattr(CpuOps, "runs_cycles", False)
        monkeypatch.setattr(CpuOps, "draft_pass", draft_pass)
        monkeypatch.setattr(CpuOps, "verify_pass", verify_pass)

    def met(self, *kinds):
        for kind in kinds:
            self.seen[kind] += 1
            self.cycles[-1].append(self.seen[kind] > 2)  # run, captured, and replayed from then on


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_most_cycles_of_a_ragged_batch_replay(monkeypatch, batch):
    """Prompts of 2 to 40 tokens, 0 to 5 drafts, texts of 60 to 140 tokens that come and go."""
    kinds = Kinds(monkeypatch)
    model = agreeing_model(**dict(SMALL, num_layers=2))
    engine = Engine(model, PagedKVCache(model, 400, page_size=PAGE), drafts="fixed", max_batch=batch)
    for i in range(5 * batch):
        settings = dict(max_new_tokens=60 + i * 17 % 81)
        settings |= dict(exit_layer=1, num_speculations=i % 6) if i % 6 else dict(strategy="autoregressive")
        engine.add_request(random_tokens(2 + i * 11 % 39, seed=i + 1), GenerationConfig(**settings))
    while engine.num_unfinished:
        kinds.cycles.append([])
        engine.step()
    warm = kinds.cycles[len(kinds.cycles) // 3 :]
    replayed = sum(map(all, warm)) / len(warm)
    assert len(warm) > 100 and replayed >= 0.8, replayed
    assert len(kinds.passes) <= MAX_PASSES / 2
