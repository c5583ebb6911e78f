"""rejection_sample: drafts that are rejected, so that the residual is drawn from."""

from shapes import logits, places


def bench_rejection_sample(measure, config, rows):
    def inputs(rows):
        scores = logits(rows, config.vocab_size)
        unlikely = scores.argmin(dim=1)
        draft_scores = scores.scatter(1, unlikely[:, None], 30.0)
        return {"draft_scores": draft_scores, "scores": scores, "drafts": unlikely, **places(rows)}

    measure("rejection_sample", {}, inputs, rows, reads=("draft_scores", "scores"))
