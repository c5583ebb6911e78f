"""verify_step: one sequence with 0, 5 or 11 drafts, so 1, 6 or 12 rows; 1 row is plain decoding."""

from conftest import repeat
from layerskip_kernels import Draft, draft_step, verify_step
from layerskip_kernels.evaluation.step_bytes import verify_bytes
from shapes import filled_cache
from steps_checked import cached_model, check_verify, exit_layer


def bench_verify_step(benchmark, record, shape, rows, context):
    model = cached_model(shape)
    check_verify(model, rows)
    cache, sequences = filled_cache(model, context, 1, room=rows)
    record("verify_step", verify_bytes(model, rows - 1, context + 1), shape=shape, rows=rows, context=context)

    def setup():
        cache.rollback(sequences)
        drafting = rows > 1
        draft = draft_step(model, cache, sequences, exit_layer(model), rows - 1) if drafting else Draft.none(sequences)
        return (model, cache, draft), {}

    repeat(benchmark, verify_step, setup)
