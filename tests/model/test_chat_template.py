"""Chat templates: the text that Transformers gives, errors that say what is wrong, a sandbox that holds."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from layerskip_kernels.model.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- continue %}
    {%- endif %}
    [{{ message.role }}] {{ message.content | trim }}
    {% set note = {"text": message.content} %}{{ note | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CONVERSATION = [
    {"role": "user", "content": " Why is <b>\u6f22\u5b57</b> bold? "},
    {"role": "tool", "content": "skipped"},
    {"role": "assistant", "content": 'It\'s "markup".'},
    {"role": "user", "content": "Thanks\n"},
]


@pytest.mark.parametrize("template", [CHATML, BLOCKS], ids=["chatml", "blocks"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_is_that_of_transformers(template, add_generation_prompt):
    ours = ChatTemplate(template, {"bos_token": "<s>"}).render(CONVERSATION, add_generation_prompt)
    theirs, _ = render_jinja_template(
        [CONVERSATION], chat_template=template, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )
    assert ours == theirs[0]
    assert "\u6f22\u5b57" in ours and "Thanks" in ours


def test_variables_reach_the_template():
    template = ChatTemplate("{{ messages[0].content }}{% if enable_thinking %} think{% endif %}")
    assert template.render(CONVERSATION[:1], enable_thinking=True).endswith(" think")
    assert not template.render(CONVERSATION[:1]).endswith(" think")


def test_a_template_that_refuses_is_quoted():
    with pytest.raises(ValueError, match="model X cannot render this conversation: System role not supported"):
        ChatTemplate(REFUSES, source="model X").render([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error(template):
    with pytest.raises(ValueError, match="cannot render this conversation"):
        ChatTemplate(template).render(CONVERSATION)


@pytest.mark.parametrize(
    ("messages", "error", "said"),
    [
        ("hello", TypeError, "messages must be a list"),
        ([], ValueError, "no messages"),
        (["hello"], TypeError, "message 0 must be a dictionary"),
        ([{"role": "king", "content": "x"}], ValueError, "message 0 must have a role of system, user"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], ValueError, "message 1 must have a content of text"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "parts other than text are not supported"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, error, said):
    with pytest.raises(error, match=said):
        ChatTemplate(CHATML).render(messages)
