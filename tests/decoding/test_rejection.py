"""acceptance="rejection": the distribution of plain sampling, with one draft and with several."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import Draft, GenerationConfig, draft_step, generate, make_sampler, prefill, verify_step
from support.models import cache_for, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def second_token_counts(model, acceptance, seeds, sample_of):
    """How often each token follows a prompt and its fixed first token, drafted and verified."""
    cache = cache_for(model, 64)
    sequence = cache.add_sequence([1, 2, 3])
    cache.commit(prefill(model, cache, [sequence]))
    counts = torch.zeros(2, model.config.vocab_size, dtype=torch.float64)
    before, accepted = list(sequence.tokens), 0
    for seed in seeds:
        config = GenerationConfig(temperature=1.0, seed=seed, acceptance=acceptance)
        sampler = [make_sampler(model, config, 3)]
        verdict = verify_step(model, cache, draft_step(model, cache, [sequence], 1, 1, sampler), sampler)
        counts[0, sample_of(verdict)] += 1
        accepted += int(verdict.num_accepted[0])
        cache.rollback([sequence])
        sequence.tokens[:] = before
    plain = verify_step(model, cache, Draft.none([sequence])).logits[0]
    return counts[0], plain.double().softmax(0), accepted / len(seeds)


def statistic(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_rejection_has_the_distribution_of_plain_sampling():
    """Chi-square through both steps, on 11 tokens (10 degrees of freedom: 29.6 has probability 0.001)."""
    model = tiny_model(vocab_size=11)
    counts, probabilities, accepted = second_token_counts(
        model, "rejection", range(1500), lambda verdict: verdict.new_tokens(0)[0]
    )
    exact_counts, _, exact_accepted = second_token_counts(
        model, "exact", range(1500), lambda verdict: verdict.new_tokens(0)[0]
    )
    assert statistic(counts, probabilities) < 29.6
    assert statistic(exact_counts, probabilities) < 29.6
    assert accepted > exact_accepted > 0, "the rejection rule accepts more"


def test_a_broken_rejection_rule_is_caught():
    """If rejected drafts stood, the test above would fail."""
    model = tiny_model(vocab_size=11)
    counts, probabilities, _ = second_token_counts(
        model, "rejection", range(1500), lambda verdict: verdict.draft.of(0)[0]
    )
    assert statistic(counts, probabilities) > 3 * 29.6


def two_token_counts(model, seeds, exit_layer=1, count=3, changed=lambda draft: draft):
    """How often each pair of tokens follows a prompt, drafted ``count`` at a time by the rejection rule."""
    size = model.config.vocab_size
    cache = cache_for(model, 16 * 52)
    prompt = cache.add_sequence([1, 2, 3])
    cache.commit(prefill(model, cache, [prompt]))
    cache.truncate(prompt, 2)  # its last token, the third, is known and passes through with the drafts
    counts, kept = torch.zeros(size, size, dtype=torch.float64), 0
    for batch in torch.arange(seeds).split(50):
        forks = [cache.fork(prompt) for _ in batch]
        configs = [GenerationConfig(temperature=1.0, seed=int(seed), acceptance="rejection") for seed in batch]
        samplers = [make_sampler(model, config, 3) for config in configs]
        draft = changed(draft_step(model, cache, forks, exit_layer, count, samplers))
        verdict = verify_step(model, cache, draft, samplers)
        kept += int((verdict.num_accepted >= 2).sum())
        cache.commit(verdict)
        short = [b for b, fork in enumerate(forks) if len(fork.tokens) < 5]
        again = [forks[b] for b in short]
        cache.commit(verify_step(model, cache, Draft.none(again), [samplers[b] for b in short]))
        for fork in forks:
            counts[fork.tokens[3], fork.tokens[4]] += 1
            cache.free(fork)
    return counts.flatten(), kept


def two_token_probabilities(model):
    """The exact distribution of pairs, by plain decoding."""
    first = generate(model, [[1, 2, 3]], GenerationConfig("autoregressive", max_new_tokens=1, return_logits=True))
    rows = []
    for token in range(model.config.vocab_size):
        config = GenerationConfig("autoregressive", max_new_tokens=1, return_logits=True)
        rows.append(generate(model, [[1, 2, 3, token]], config)[0].logits[0].double().softmax(0))
    return (first[0].logits[0].double().softmax(0)[:, None] * torch.stack(rows)).flatten()


def test_several_drafts_have_the_distribution_of_plain_sampling():
    """Chi-square of pairs of 5 tokens, three drafts at a time (24 degrees of freedom: 51.2 has probability 0.001)."""
    model = tiny_model(vocab_size=5)
    counts, kept = two_token_counts(model, 3000)
    assert statistic(counts, two_token_probabilities(model)) < 51.2
    assert kept > 300, "both drafts must have been accepted often"


@pytest.mark.parametrize("change", [
    lambda scores: scores.flip(0), lambda scores: scores.roll(1, 0), torch.zeros_like,
], ids=["in reverse", "shifted", "uniform"])  # fmt: skip
def test_scores_of_other_drafts_are_caught(change):
    """If drafts were judged by the scores of others, the test above would fail."""
    model = tiny_model(vocab_size=5)
    counts, _ = two_token_counts(
        model, 3000, changed=lambda draft: replace(draft, scores={b: change(s) for b, s in draft.scores.items()})
    )
    assert statistic(counts, two_token_probabilities(model)) > 2 * 51.2


def test_the_rejection_rule_needs_no_scores():
    """Drafts that came from elsewhere count as certain; a draft of an impossible token is never kept."""
    model = tiny_model()
    config = GenerationConfig(temperature=1.0, top_k=5, seed=0, acceptance="rejection")
    cache = cache_for(model, 64)
    sequence = cache.add_sequence([1, 2, 3])
    samplers = [make_sampler(model, config, 3)]
    cache.commit(prefill(model, cache, [sequence], samplers))
    scores = verify_step(model, cache, Draft.none([sequence])).logits[0]
    cache.rollback([sequence])
    unlikely = int(scores.argmin())
    verdict = verify_step(model, cache, Draft.of_tokens([sequence], [[unlikely]]), samplers)
    assert verdict.num_accepted.tolist() == [0]
    assert int(verdict.next_tokens[0]) in scores.topk(5).indices
