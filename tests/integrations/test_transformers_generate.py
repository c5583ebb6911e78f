"""model.generate(custom_generate=...): Transformers' own greedy tokens, its streamers and criteria, honest refusals."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.integrations.transformers import custom_generate, model_of
from support.families import transformers_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=75, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 101, (1, length), generator=torch.Generator().manual_seed(seed))


def test_greedy_tokens_are_those_of_transformers(llama):
    ids = prompt(9)
    expected = llama.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(
        llama.generate(ids, max_new_tokens=40, do_sample=False, custom_generate=custom_generate), expected
    )
    drafted = llama.generate(
        ids, max_new_tokens=40, do_sample=False, custom_generate=custom_generate, exit_layer=2, num_speculations=4
    )
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize("variant", ["phi3", "gemma3_text"])
def test_other_families_generate_as_well(variant, tmp_path):
    theirs, ids = transformers_model(variant, tmp_path), prompt(9)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    got = theirs.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, custom_generate=custom_generate, exit_layer=1
    )
    assert torch.equal(got, expected)


def test_a_batch_padded_on_the_left(llama):
    short, long = prompt(4, 1), prompt(9, 2)
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1), long])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    out = llama.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, custom_generate=custom_generate)
    for row, alone in ((0, short), (1, long)):
        expected = llama.generate(alone, max_new_tokens=12, do_sample=False, custom_generate=custom_generate)
        assert torch.equal(out[row, 9:], expected[0, alone.size(1) :])
    assert torch.equal(out[:, :9], ids)
    with pytest.raises(ValueError, match="padding on the left"):
        llama.generate(long, attention_mask=1 - mask[1:], max_new_tokens=2, custom_generate=custom_generate)


def test_rows_that_end_early_are_padded(llama):
    ids = torch.cat([prompt(6, 3), prompt(6, 4)])
    free = llama.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=custom_generate)
    eos = int(free[0, 9])
    out = llama.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=custom_generate, eos_token_id=eos)
    expected = llama.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=eos)
    assert torch.equal(out, expected)
    assert (out == 0).any() or out.size(1) < 26


def test_samples_follow_torch_manual_seed(llama):
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        settings = dict(do_sample=True, temperature=0.9, top_k=50, top_p=0.9, num_return_sequences=2)
        return llama.generate(prompt(5), max_new_tokens=12, custom_generate=custom_generate, **settings).tolist()

    first = sample(1)
    assert first == sample(1) != sample(2)
    assert len(first) == 2 and first[0] != first[1]


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


class Ends(StoppingCriteria):
    """Ends a text once it holds a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return (input_ids == self.token).any(dim=1)


def test_streamers_and_criteria_are_honoured(llama):
    ids, heard = prompt(7), Heard()
    free = llama.generate(ids, max_new_tokens=20, do_sample=False)
    token = int(free[0, 7 + 5])
    criteria = StoppingCriteriaList([Ends(token)])
    settings = dict(max_new_tokens=20, do_sample=False, stopping_criteria=criteria)
    expected = llama.generate(ids, **settings)
    out = llama.generate(ids, **settings, custom_generate=partial(custom_generate, streamer=heard), exit_layer=1)
    assert torch.equal(out, expected) and out.size(1) <= 13
    assert heard.ended and torch.equal(torch.cat([value.view(-1) for value in heard.values]), out[0])


def test_changed_weights_are_seen(llama):
    before = model_of(llama)
    assert model_of(llama) is before
    with torch.no_grad():
        llama.model.norm.weight.mul_(1.0)
    assert model_of(llama) is not before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(llama, settings, named):
    with pytest.raises(NotImplementedError, match=named):
        llama.generate(prompt(5), max_new_tokens=3, custom_generate=custom_generate, **settings)


def test_another_model_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=20))
    with pytest.raises(UnsupportedModel, match="gpt2"):
        other.generate(torch.tensor([[1, 2]]), max_new_tokens=2, custom_generate=custom_generate)
