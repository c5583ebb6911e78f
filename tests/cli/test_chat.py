"""``layerskip chat``: answers are those of ``generate``, history is kept, Ctrl-C ends an answer alone."""

import io
import sys

import pytest

import layerskip_kernels
from layerskip_kernels import Engine, GenerationConfig, Model, generate
from layerskip_kernels.cli.chat import Conversation
from layerskip_kernels.cli.main import main
from support.commands import error_of

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = GenerationConfig(max_new_tokens=16, exit_layer=4, num_speculations=3)


def expected(model: Model, messages: list[dict[str, str]]) -> str:
    ids = model.tokenizer.apply_chat_template(messages)
    return generate(model, [ids], CONFIG)[0].text


@pytest.fixture
def conversation(tiny_code: Model) -> Conversation:
    return Conversation(Engine(tiny_code, memory=8 << 20, max_batch=1, drafts="fixed"), CONFIG)


def test_each_turn_is_answered_with_all_turns_before_it(conversation, tiny_code):
    shown: list[str] = []
    first = conversation.say("sort a list of numbers with a loop", shown.append)
    second = conversation.say("and backwards", shown.append)
    messages = conversation.turns
    assert first == expected(tiny_code, messages[:1]) and second == expected(tiny_code, messages[:3])
    assert "".join(shown) == first + second
    assert conversation._engine.cache.stats().hit_tokens > 0


def test_colours_are_no_part_of_the_history(conversation, tiny_code):
    shown: list[str] = []
    answer = conversation.say("sort a list", shown.append, show_drafts=True)
    assert "\033[32m" in "".join(shown)
    assert answer == expected(tiny_code, conversation.turns[:1])


def test_ctrl_c_ends_the_answer_and_not_the_conversation(conversation, tiny_code):
    shown: list[str] = []

    def write(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    said = conversation.say("sort a list", write)
    whole = expected(tiny_code, conversation.turns[:1])
    assert said and whole.startswith(said) and len(said) < len(whole)
    assert conversation._engine.num_unfinished == 0
    assert conversation.say("go on", shown.append) == expected(tiny_code, conversation.turns[:3])


def test_generate_takes_messages(tiny_code):
    messages = [{"role": "user", "content": "sort a list"}]
    ids = tiny_code.tokenizer.apply_chat_template(messages)
    assert ids != tiny_code.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    [one], [same], [expected] = (generate(tiny_code, prompts, CONFIG) for prompts in (messages, [messages], [ids]))
    assert one.text and one.token_ids == same.token_ids == expected.token_ids
    with pytest.raises(ValueError, match="message 0 must have a role of"):
        generate(tiny_code, [[{"role": "poet", "content": "sing"}]], CONFIG)


def test_a_message_that_does_not_fit_is_forgotten(conversation):
    with pytest.raises(ValueError, match="positions"):
        conversation.say("word " * 3000, print)
    assert conversation.turns == []
    assert conversation.say("sort a list", lambda _: None)


def test_the_command(tiny_code, monkeypatch, capsys):
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: tiny_code)
    lines = "sort a list\n\n/help\n/system Be brief.\n/bogus\nsort a list\n/reset\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", "--max-new-tokens", "16", "--exit-layer", "4", "--num-speculations", "3"]) == 0
    out, err = capsys.readouterr()
    first = expected(tiny_code, [{"role": "user", "content": "sort a list"}])
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "sort a list"}]
    assert out == first + "\n" + expected(tiny_code, system) + "\n"
    assert "/bogus is not a command" in err and "a new conversation with this system message" in err


def test_a_model_without_a_template_is_refused(tiny, monkeypatch, capsys):
    assert "no chat template; use `layerskip generate`" in error_of(["chat"], capsys)
