"""draft_step: four drafts of each of 1, 6 or 12 sequences with the first third of the layers, one pass for each."""

from conftest import repeat
from layerskip_kernels import draft_step
from layerskip_kernels.evaluation.step_bytes import draft_bytes
from shapes import filled_cache
from steps_checked import cached_model, check_draft, exit_layer

NUM_DRAFTS = 4


def bench_draft_step(benchmark, record, shape, rows, context):
    model = cached_model(shape)
    check_draft(model, rows)
    cache, sequences = filled_cache(model, context, rows, room=NUM_DRAFTS + 1)
    num_bytes = draft_bytes(model, exit_layer(model), NUM_DRAFTS, context + 1, num_sequences=rows)
    record("draft_step", num_bytes, shape=shape, rows=rows, context=context)

    def setup():
        cache.rollback(sequences)
        return (model, cache, sequences, exit_layer(model), NUM_DRAFTS), {}

    repeat(benchmark, draft_step, setup)
