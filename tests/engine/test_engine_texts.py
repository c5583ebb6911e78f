"""Texts: special tokens that stop or show, outputs that add up, and prompts that are refused before work is done."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, generate
from layerskip_kernels.engine.request import encode
from support.models import cache_for, random_tokens, tiny_model
from support.tokenizers import Letters, byte_fallback, byte_level, ids_of

pytestmark = pytest.mark.usefixtures("one_thread")

END = 256  # of byte_level, "<|end|>"
[A] = ids_of(byte_level(), b"a")
ALWAYS = 1000.0


def byte_model():
    return replace(tiny_model(vocab_size=257), tokenizer=byte_level())


def says(*tokens: int, **settings) -> GenerationConfig:
    """Says the first token once, then the second, and so on: each is forbidden by its penalty once it was said."""
    bias = {token: ALWAYS - 50 * i for i, token in enumerate(tokens)}
    return GenerationConfig(
        max_new_tokens=len(tokens), eos_token_ids=(), logit_bias=bias, presence_penalty=100.0, frequency_penalty=100.0,
        **settings,
    )  # fmt: skip


def drafting_and_plain(config: GenerationConfig) -> list[GenerationConfig]:
    return [replace(config, exit_layer=1, num_speculations=3), config.plain()]


# ---- special tokens ----


def test_a_special_token_stops_as_a_string():
    config = GenerationConfig(max_new_tokens=9, eos_token_ids=(), logit_bias={END: ALWAYS}, stop="<|end|>")
    for asked in drafting_and_plain(config):
        [generation] = generate(byte_model(), ["hi"], asked)
        assert (generation.token_ids, generation.finish_reason, generation.text) == ([END], "stop", "")


def test_special_tokens_show_on_request_and_stop_as_text():
    for asked in drafting_and_plain(replace(says(END, A), skip_special_tokens=False)):
        [shown] = generate(byte_model(), ["hi"], asked)
        assert (shown.token_ids, shown.text) == ([END, A], "<|end|>a")
        [hidden] = generate(byte_model(), ["hi"], replace(asked, skip_special_tokens=True))
        assert (hidden.token_ids, hidden.text) == ([END, A], "a")
        [stopped] = generate(byte_model(), ["hi"], replace(asked, stop="end|>a"))
        assert (stopped.finish_reason, stopped.text) == ("stop", "<|")


def test_a_special_token_does_not_stop_before_its_time():
    config = GenerationConfig(
        max_new_tokens=6, min_new_tokens=4, eos_token_ids=(), logit_bias={END: ALWAYS}, stop=("<|end|>", "zz")
    )
    [generation] = generate(byte_model(), ["hi"], config)
    assert len(generation.token_ids) == 5 and generation.token_ids[-1] == END
    assert END not in generation.token_ids[:4]


def test_a_stop_string_around_a_special_token_could_never_be_found():
    with pytest.raises(ValueError, match=r"contains the special token '<\|end\|>'.*skip_special_tokens=False"):
        generate(byte_model(), ["hi"], GenerationConfig(stop="<|end|>\n"))
    assert generate(byte_model(), ["hi"], GenerationConfig(stop="<|end|>\n", skip_special_tokens=False))


# ---- outputs add up ----


@pytest.mark.parametrize("stop", [(), ("\u00e9a", "zq")], ids=["no stop", "stop"])
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_outputs_add_up_to_the_text(make, stop):
    """Random tokens, so that characters are broken; the text does not depend on whether a stop string was asked for."""
    tokenizer = make()
    model = replace(tiny_model(vocab_size=264 if make is byte_fallback else 257), tokenizer=tokenizer)
    bytes_said = [3 + b if make is byte_fallback else ids_of(tokenizer, [b])[0] for b in (0xC3, 0xA9, 0xE2, 0x82, 97)]
    engine = Engine(model, cache_for(model, 900), drafts="fixed")
    config = GenerationConfig(
        exit_layer=1, num_speculations=3, max_new_tokens=40, temperature=1.0, stop=stop,
        logit_bias=dict.fromkeys(bytes_said, 5.0), eos_token_ids=(),
    )  # fmt: skip
    ids = [engine.add_request([1, 2], replace(config, seed=seed)) for seed in range(12)]
    texts = dict.fromkeys(ids, "")
    while engine.num_unfinished:
        for output in engine.step():
            texts[output.request_id] += output.text
            if output.generation is not None:
                generation = output.generation
                assert generation.text == texts[output.request_id]
                if generation.finish_reason == "length":
                    assert generation.text == tokenizer.decode(generation.token_ids)
                else:
                    assert tokenizer.decode(generation.token_ids).startswith(generation.text)
                assert not any(s in texts[output.request_id] for s in stop)


def test_a_stop_string_of_bytes_that_end_the_text():
    """Its last character is complete only when nothing follows."""
    tokenizer = byte_fallback()
    model = replace(tiny_model(vocab_size=264), tokenizer=tokenizer)
    config = replace(says(260, 3 + 0xC3, 3 + 0xA9), stop="\u00e9")
    [generation] = generate(model, [[1]], config)
    assert generation.token_ids == [260, 3 + 0xC3, 3 + 0xA9]
    assert (generation.text, generation.finish_reason) == ("a", "stop")


def test_text_as_it_comes():
    pieces = []
    model = replace(tiny_model(), tokenizer=Letters())
    [generation] = generate(
        model, [[1, 2]], GenerationConfig(max_new_tokens=9), on_text=lambda i, text: pieces.append((i, text))
    )
    assert [i for i, _ in pieces] == [0] * len(pieces)
    assert "".join(text for _, text in pieces) == generation.text


# ---- prompts ----


def test_one_text_is_one_prompt():
    model, config = replace(tiny_model(), tokenizer=Letters()), GenerationConfig(max_new_tokens=3)
    [one], [same] = generate(model, "hello", config), generate(model, ["hello"], config)
    assert one.token_ids == same.token_ids and one.prompt_length == 5


@pytest.mark.parametrize(("prompts", "message"), [
    ([1, 5, 9], r"prompts\[0\] is a single token id \(1\).*\[\[1, 2, 3\]\]"),
    (np.array([1, 5]), r"prompts\[0\] is a single token id"),
    ([[1, 2], 7], r"prompts\[1\] is a single token id \(7\)"),
    (torch.tensor([1, 2]), "a text, a list of token ids or messages"),
    ([[[1, 2]]], r"a text, a list of token ids or messages, got \[\[1, 2\]\]"),
    ([["a", "b"]], "a text, a list of token ids or messages"),
    ([[1.5]], "a text, a list of token ids or messages"),
    ([None], "a text, a list of token ids or messages, got None"),
    (7, "prompts must be a text or a list of prompts, got int"),
    (None, "prompts must be a text or a list of prompts"),
], ids=repr)  # fmt: skip
def test_wrongly_nested_prompts_are_refused(prompts, message):
    with pytest.raises(TypeError, match=message) as caught:
        generate(replace(tiny_model(), tokenizer=Letters()), prompts, GenerationConfig(max_new_tokens=3))
    assert len(str(caught.value)) < 300


def test_one_text_as_a_stop_string():
    assert GenerationConfig(stop="end") == GenerationConfig(stop=("end",))
    assert GenerationConfig(stop="end").stop_strings == ("end",)


class Counting(Letters):
    longest_token = 10

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


def test_a_prompt_that_cannot_fit_is_not_tokenised():
    tokenizer = Counting()
    model = replace(tiny_model(max_positions=64), tokenizer=tokenizer)
    engine = Engine(model, cache_for(model, 64))
    for add in (engine.add_request, lambda text: generate(model, [text])):
        with pytest.raises(ValueError, match=r"641 characters, which are at least 65 tokens.*64 positions") as caught:
            add("x" * 641)
        assert len(str(caught.value)) < 300
    assert tokenizer.calls == 0
    with pytest.raises(ValueError, match="the model has 64 positions"):
        engine.add_request("x" * 640)  # it might have fitted
    assert tokenizer.calls == 1


def test_a_conversation_that_cannot_fit_is_not_tokenised(tiny_code, monkeypatch):
    """Nor are hundreds of megabytes of one, which took minutes and gigabytes."""
    positions, longest = tiny_code.config.max_positions, tiny_code.tokenizer.longest_token
    monkeypatch.setattr(type(tiny_code.tokenizer), "encode", None)  # not callable
    with pytest.raises(ValueError, match=rf"characters, which are at least {positions + 1} tokens .* the model has"):
        Engine(tiny_code).add_request([{"role": "user", "content": "x" * (positions * longest)}])


def test_a_prompt_is_tokenised_once_for_all_its_samples():
    tokenizer = Counting()
    model = replace(tiny_model(), tokenizer=tokenizer)
    generate(model, "abc", GenerationConfig(max_new_tokens=2, num_samples=5, temperature=1.0))
    assert tokenizer.calls == 1


def test_a_prompt_is_not_tokenised_under_the_lock():
    """Requests that run go on meanwhile."""
    stepped = []

    class Slow(Letters):
        def encode(self, text):
            stepped.append(engine._lock._is_owned())
            return super().encode(text)

    model = replace(tiny_model(), tokenizer=Slow())
    engine = Engine(model, cache_for(model, 64))
    engine.add_request("abc", GenerationConfig(max_new_tokens=2))
    assert stepped == [False]


def test_a_long_text_of_short_tokens_is_tokenised():
    model = replace(tiny_model(max_positions=64), tokenizer=byte_level())
    assert encode(model, "ab") == ids_of(byte_level(), b"ab")


# ---- the engine's own arguments ----


@pytest.mark.parametrize(("settings", "error", "message"), [
    (dict(max_batch=2.5), TypeError, "max_batch must be an int, got 2.5"),
    (dict(max_batch=True), TypeError, "max_batch must be an int, got True"),
    (dict(max_batch=-1), ValueError, "max_batch must be at least 1"),
    (dict(chunk_size="9"), TypeError, "chunk_size must be an int, got '9'"),
    (dict(memory=float("nan")), TypeError, "memory must be an int, got nan"),
    (dict(memory=1e9), TypeError, "memory must be an int"),
    (dict(memory=2**62), ValueError, "memory must be at most 140737488355328"),
    (dict(memory=10), ValueError, "memory must be at least .* bytes, one page"),
    (dict(memory=2**47), ValueError, "memory=140737488355328: a cache of that many bytes cannot be made here"),
    (dict(drafts=3), ValueError, "drafts must be one of 'measured', 'fixed', 'auto', got 3"),
], ids=str)  # fmt: skip
def test_bad_arguments_are_named_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        Engine(tiny_model(), **settings)


@pytest.mark.parametrize(("salt", "error"), [(5, TypeError), (["a"], TypeError), ("\ud800", ValueError)])
def test_a_bad_salt_is_refused_at_once(salt, error):
    model = tiny_model()
    engine = Engine(model, cache_for(model, 64))
    with pytest.raises(error):
        engine.add_request(random_tokens(3), salt=salt)
    assert engine.num_unfinished == 0


def test_how_far_prompts_are_is_told_before_the_first_token():
    model, told = tiny_model(max_positions=800), []
    prompts = [random_tokens(600), random_tokens(5), random_tokens(100, seed=1)]
    generate(
        model, prompts, GenerationConfig(max_new_tokens=4), on_prompt=lambda *progress: told.append(progress),
        on_tokens=lambda i, tokens: told.append(i),
    )  # fmt: skip
    progress = [entry for entry in told if isinstance(entry, tuple)]
    assert progress == sorted(progress) and len(progress) >= 3 and progress[-1] == (705, 705)
    assert told.index((705, 705)) < told.index(2), "the last prompt's first token"


def test_prompts_are_waited_for_where_they_do_not_run_yet():
    engine = Engine(model := tiny_model(), cache_for(model, 200), max_batch=1)
    for length in (30, 40):
        engine.add_request(random_tokens(length), GenerationConfig(max_new_tokens=3))
    assert engine.num_prompt_tokens == 70
    engine.step()
    assert engine.num_prompt_tokens == 40
    engine.run()
    assert engine.num_prompt_tokens == 0
