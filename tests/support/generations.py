"""What generations are compared with: the same request alone, by plain decoding."""

from dataclasses import replace

import torch

from layerskip_kernels import Draft, PagedKVCache, generate, make_sampler, verify_step
from support.models import random_tokens

KEEP = dict(return_logits=True, return_kv=True)


def same_bits(a, b) -> bool:
    return (
        a.token_ids == b.token_ids
        and a.finish_reason == b.finish_reason
        and torch.equal(a.logits, b.logits)
        and all(torch.equal(x, y) for x, y in zip(a.kv, b.kv, strict=True))
    )


def alone(model, prompt, config):
    """The request by plain decoding, without an engine: tokens, logits, K and V."""
    cache = PagedKVCache.with_room_for(model, [len(prompt) + config.max_new_tokens])
    sequence, logits = cache.add_sequence(prompt), []
    samplers = [make_sampler(model, config, len(prompt))]
    end_ids = {*model.config.eos_token_ids, *config.stop_token_ids}
    while len(sequence.tokens) < len(prompt) + config.max_new_tokens:
        verdict = verify_step(model, cache, Draft.none([sequence]), samplers)
        cache.commit(verdict)
        logits.append(verdict.logits)
        if sequence.tokens[-1] in end_ids:
            break
    return sequence.tokens[len(prompt) :], torch.cat(logits), *cache.export(sequence)


def same_as_alone(generation, expected) -> bool:
    tokens, *tensors = expected
    got = (generation.logits, *generation.kv)
    return generation.token_ids == tokens and all(torch.equal(a, b) for a, b in zip(got, tensors, strict=True))


def all_free(engine) -> bool:
    engine.cache.check_integrity()
    return engine.cache.num_free_pages == engine.cache.pool.num_pages and engine.cache.pool.num_sequences == 0


def drafts_accepted(generations) -> int:
    """How many drafts were accepted in all. Compared runs that draft assert that it is not 0: equal bits alone would
    not show that drafting stopped."""
    return sum(generation.accepted for generation in generations)


def sampled(model, config, prompts=None, **changes):
    """What a config with some changes generates after the prompts, or after nine tokens."""
    return generate(model, prompts or [random_tokens(9)], replace(config, **changes))
