"""Both steps and generation on the Triton backend: the CPU backend's tokens, logits and bytes of the cache.

On a GPU the second step of a kind is captured in a CUDA graph and later ones replay it, so several cycles go through
all three ways; interpreted on the CPU, a smaller model has fewer.
"""

from functools import partial

import pytest
import torch
import triton

from layerskip_kernels import Draft, GenerationConfig, Model, draft_step, generate, prefill, verify_step
from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.operands import PendingRows
from layerskip_kernels.ops import BACKENDS, Backend
from layerskip_kernels.ops.triton import default_device
from support.generations import drafts_accepted
from support.models import GPU, agreeing_model, cache_for, checkpoint, config, random_tokens, tiny_model

SMALL = {} if GPU else dict(hidden_size=20, intermediate_size=21, num_heads=2, num_kv_heads=1, head_dim=6, num_layers=2)
CYCLES = 5 if GPU else 2
PROMPT = 20 if GPU else 5


def model(dtype, backend, **changes):
    return tiny_model(dtype, backend, **{**SMALL, **changes})


def same(results):
    first, second = results
    assert len(first) == len(second)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("page_size", "changes"),
    [(1, {}), (16, {"qkv_bias": True, "out_bias": True}), (64, {"tie_word_embeddings": True})],
    ids=["pages of 1", "pages of 16, bias", "pages of 64, tied"],
)
def test_cycles_equal_the_cpu_backend(dtype, page_size, changes):
    results = []
    for backend in ("triton", "cpu"):
        llama = model(dtype, backend, **changes)
        cache = cache_for(llama, PROMPT + 8 * CYCLES, page_size)
        sequence = cache.add_sequence(random_tokens(PROMPT))
        cache.commit(prefill(llama, cache, [sequence]))
        found = []
        for _ in range(CYCLES):
            verdict = verify_step(llama, cache, draft_step(llama, cache, [sequence], 1, 3))
            cache.commit(verdict)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        results.append([*found, *cache.export(sequence)])
    assert same(results)
    assert all(tensor.isfinite().all() for tensor in results[0])


def test_a_ragged_batch_with_a_draft_vocabulary(dtype):
    """Unlike lengths and drafts, one sequence without any, another a chunk of its prompt."""
    results = []
    for backend in ("triton", "cpu"):
        llama = model(dtype, backend).with_draft_vocab(range(5, 60))
        cache = cache_for(llama, 700, page_size=7)
        lengths = (3, 12, 270) if GPU else (3, 5, 7)
        old = [cache.add_sequence(random_tokens(n, seed=n)) for n in lengths]
        cache.commit(prefill(llama, cache, old))
        new = cache.add_sequence(random_tokens(6, seed=1))
        found = []
        for _ in range(CYCLES):
            draft = draft_step(llama, cache, old, 1, [2, 0, 1])
            waiting = max(0, len(new.tokens) - cache.length(new) - 2)
            joined = Draft.joined([*old, new], [draft], [0, 0, 0, waiting])
            verdict = verify_step(llama, cache, joined)
            cache.commit(verdict)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        results.append(found)
    assert same(results)


QUANTISED = {  # the second layer is mixed otherwise; a matrix in the model's dtype stays among them
    "embed_tokens": "q4_0", "lm_head": "q6_k", "q_proj": "q4_k", "k_proj": "q5_0", "v_proj": "q6_k", "o_proj": "q8_0",
    "gate_proj": "q4_1", "up_proj": "q5_k", "1.self_attn.v_proj": "q4_k", "1.mlp.down_proj": "int8",
    "1.mlp.up_proj": "q4_1",
}  # fmt: skip


def quantised_model(backend, **changes):
    """Every type, mixed within layers as GGUF files mix them."""
    found = checkpoint(config(**{**SMALL, **changes}), torch.bfloat16)
    for name, tensor in found.tensors.items():
        for part, weight_type in QUANTISED.items():
            if tensor.dim() == 2 and name.removesuffix(".weight").endswith(part):
                found.tensors[name] = quantise(tensor, weight_type)
    return Model.from_checkpoint(found, backend)


def ragged_cycles(llama):
    """Drafts of a vocabulary of their own, sequences of unlike lengths: all that comes of them."""
    cache = cache_for(llama, 64, page_size=7)
    sequences = [cache.add_sequence(random_tokens(n, 40, seed=n)) for n in (2, 5)]
    cache.commit(prefill(llama, cache, sequences))
    found = []
    for _ in range(CYCLES - 1):
        verdict = verify_step(llama, cache, draft_step(llama, cache, sequences, 1, [2, 1]))
        cache.commit(verdict)
        found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
    return [*found, *cache.export(sequences[0])]


def test_quantised_weights_equal_the_cpu_backend():
    models = (quantised_model(backend, vocab_size=40) for backend in ("triton", "cpu"))
    results = [ragged_cycles(llama.with_draft_vocab(range(5, 35))) for llama in models]
    assert same(results)
    assert all(tensor.isfinite().all() for tensor in results[0])


@pytest.mark.skipif(GPU, reason="kernels are launched, not interpreted")
@pytest.mark.parametrize("of", [quantised_model, partial(model, torch.bfloat16), partial(model, torch.float32)],
                         ids=["quantised", "bf16", "fp32"])  # fmt: skip
def test_kernels_that_begin_before_the_one_ahead_is_done(of):
    """With the bits of the CPU, for each waits before it reads what another wrote."""
    from support.dependent_launches import dependent_launches

    triton, cpu = (of(backend=backend, vocab_size=40) for backend in ("triton", "cpu"))
    expected = ragged_cycles(cpu)
    with dependent_launches() as begun:
        assert same([ragged_cycles(triton), expected])
    streaming = {"_qkv_rope_append_kernel", "_linear_residual_kernel", "_gate_up_act_kernel", "_head_kernel"}
    assert set(begun) == streaming | ({"_round_rows_kernel"} if of is quantised_model else set())


def test_drafts_leave_the_text_of_quantised_weights_as_it_is():
    config, prompts = GenerationConfig(max_new_tokens=4, strategy="autoregressive"), [random_tokens(2, 40)]
    plain = generate(quantised_model("cpu", vocab_size=40, tie_word_embeddings=True), prompts, config)
    drafting = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=4)
    drafted = generate(quantised_model("triton", vocab_size=40, tie_word_embeddings=True), prompts, drafting)
    assert drafted[0].token_ids == plain[0].token_ids
    assert drafted[0].drafted > 0


def test_greedy_generation_equals_the_cpu_backend():
    config = GenerationConfig(exit_layer=1, num_speculations=3, max_new_tokens=60 if GPU else 8)
    prompts = [random_tokens(PROMPT), random_tokens(3, seed=1)]
    triton, cpu = (generate(agreeing_model(backend=backend, **SMALL), prompts, config) for backend in ("triton", "cpu"))
    assert [g.token_ids for g in triton] == [g.token_ids for g in cpu]
    assert drafts_accepted(triton) == drafts_accepted(cpu) > 0


def test_sampled_generation_equals_the_cpu_backend():
    config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=4, temperature=0.9, top_p=0.9, seed=3)
    texts = [
        generate(model(torch.bfloat16, backend), [random_tokens(4)], config)[0].token_ids
        for backend in ("triton", "cpu")
    ]
    assert texts[0] == texts[1]


def test_drafts_outlive_the_next_step_of_their_kind():
    """Both sequences are drafted for before either is verified; the pass's memory is shared, its results are not."""
    texts = []
    for backend in ("triton", "cpu"):
        llama = model(torch.bfloat16, backend)
        cache = cache_for(llama, 32)
        sequences = [cache.add_sequence(random_tokens(3, seed=seed)) for seed in (1, 2)]
        cache.commit(prefill(llama, cache, sequences))
        drafts = [draft_step(llama, cache, [sequence], 1, 2) for sequence in sequences]
        verdicts = [verify_step(llama, cache, draft) for draft in drafts]
        texts.append([verdict.draft.tokens.tolist() for verdict in verdicts])
        for verdict in verdicts:
            cache.commit(verdict)
        texts[-1].append([sequence.tokens for sequence in sequences])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_a_page_outside_the_cache_raises_and_writes_nothing():
    llama = model(torch.bfloat16, "triton")
    cache = cache_for(llama, 32)
    before = [tensor.clone() for tensor in cache.tensors]
    rows = PendingRows(
        tokens=torch.tensor([1]),
        positions=torch.tensor([0]),
        depths=torch.tensor([0]).int(),
        query_start_loc=torch.tensor([0, 1]).int(),
        block_table=torch.tensor([[99]]).int(),
    )
    llama.ops.verify_pass(
        llama.weights, llama.sizes, cache.tensors, rows, num_drafts=torch.tensor([0]), judged=torch.tensor([True])
    )
    with pytest.raises(ValueError, match="block_table names a page outside the cache"):
        llama.ops.to_host(cache.k)
    llama.ops.to_host(cache.k)  # said once
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, cache.tensors, strict=True))


def test_damaged_weights_raise():
    llama = model(torch.bfloat16, "triton")
    llama.weights.final_norm.fill_(torch.nan)
    cache = cache_for(llama, 16)
    sequence = cache.add_sequence([1, 2])
    with pytest.raises(RuntimeError, match="a logit is NaN"):
        prefill(llama, cache, [sequence])
    assert cache.pool.length(sequence.id) == 0


def test_without_gpu_and_interpreter_the_backend_says_what_to_do(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs a GPU that torch can use .* or TRITON_INTERPRET=1"):
        default_device()


def test_every_backend_has_every_op():
    names = [name for name in vars(Backend) if not name.startswith("_")]
    assert {"draft_pass", "verify_pass", "gumbel_argmax", "to_host"} <= set(names)
    for backend in BACKENDS:
        ops = model(torch.bfloat16, backend).ops
        assert [name for name in names if not callable(getattr(ops, name, None))] == []
