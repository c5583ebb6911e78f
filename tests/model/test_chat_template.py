"""Chat templates: the text that Transformers gives, errors that say what is wrong, a sandbox that holds, bounds."""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from layerskip_kernels.model.bounded_jinja import WorkError
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
# What published templates do: recursive macros, namespaces, reversed and filtered loops, dates, tools as JSON.
TOOLS = """
{%- macro show(spec, depth=0) -%}
    {%- if spec is mapping -%}
        {%- for name, value in spec|dictsort %}{{ '  ' * depth ~ name }}: {{ show(value, depth + 1) }}\n{% endfor -%}
    {%- elif spec is iterable and spec is not string -%}
        {{ spec|map('string')|join(', ') }}
    {%- else -%}{{ '%s|%5.1f' % (spec|string|upper, 3.14159) }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(tools=true, last=messages|length - 1, text='', seen=[]) -%}
{{ '{}-{:>4}'.format(bos_token, 'x') }}{{ strftime_now('%Y')|length }}
{%- for tool in tools %}{{ tool|tojson(indent=4) }}{{ tool | tojson }}{{ show(tool) }}{% endfor %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if ns.tools and message.role == 'user' and message.content is string %}
        {%- set ns.tools = false %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages if message.role in ['user', 'assistant'] %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') if message.content else none %}
    {%- set ns.text = ns.text ~ loop.index ~ content[:3] %}{% set ns.seen = ns.seen + [message.role] %}
    {%- if message.role == 'assistant' -%}
        {%- generation %}{% set inner = content|trim %}{{ inner|replace('"', "'")|indent(2) }}{% endgeneration -%}
        {{ inner is defined }}
    {%- else -%}
        {%- set wrapped %}<{{ message.role }}>{{ content }}{% endset -%}{{ wrapped }}
    {%- endif -%}
    {%- if loop.previtem is defined %}{{ loop.previtem.role }}{% endif %}{{ loop.cycle('a', 'b') }}
    {%- if loop.index > 7 %}{% break %}{% endif %}
{%- endfor -%}
{%- for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor -%}
{%- call(word) shout() %}{{ word|title }}!{% endcall -%}
{{ ns.text }}{{ ns.seen|unique|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length + 2 ** 3 // 3 }}"""
TOOLS = "{% macro shout() %}{{ caller('ho')}}{% endmacro %}" + TOOLS
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {"enum": [1, 2.5, None]}, "b": "\u6f22"}}}
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


def test_what_published_templates_do_is_as_in_transformers():
    given = {"tools": [TOOL, TOOL], "bos_token": "<s>"}
    theirs, _ = render_jinja_template([CONVERSATION], chat_template=TOOLS, add_generation_prompt=True, **given)
    assert ChatTemplate(TOOLS).render(CONVERSATION, **given) == theirs[0]
    assert "'markup'" in theirs[0] and "Ho!" in theirs[0] and '    "type": "function"' in theirs[0]


def test_a_long_conversation_is_within_the_bound():
    conversation = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 200} for i in range(300)]
    template = TOOLS.replace("{% break %}", "")
    given = {"tools": [TOOL] * 20, "bos_token": "<s>"}
    theirs, _ = render_jinja_template([conversation], chat_template=template, add_generation_prompt=True, **given)
    assert ChatTemplate(template).render(conversation, **given) == theirs[0]


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
        "{{ 'a' + 1 }}",
        "{{ namespace(__class__=1) }}",
        "{{ lipsum(3) }}",
        "{" * 200_000,
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        " " * 300_000,
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


def _repeated(step: str, start: str = "'ab'", times: int = 60) -> str:
    """A template that makes something of what it made before, over and over."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"


A_MILLION = "{% set s = 'a' * 1000000 %}"
ENDLESS = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop's condition": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops in functions": "{{ range(99999)|map('center', 99999)|list|length }}",
    "macros": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() ~ caller() }}{% endmacro %}" + "{% call f() %}" * 40 + "{% endcall %}" * 40,
    "blocks": "{% block a %}{% for i in range(9) %}{{ self.a() }}{% endfor %}{% endblock %}",
    "a recursive loop": "{% for x in [[1, 2]] recursive %}{{ loop([x, x]) }}{{ loop([x, x]) }}{% endfor %}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "a number times a list": "{{ 10**10 * [1] }}",
    "a power": "{{ 10**(10**10) }}",
    "squares": _repeated("{% set ns.x = ns.x * ns.x %}", "10"),
    "sums of text": _repeated("{% set ns.x = ns.x + ns.x %}"),
    "joined text": _repeated("{% set ns.x = ns.x ~ ns.x %}"),
    "text in a block": _repeated("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "lists of a list": _repeated("{% set ns.x = [ns.x, ns.x] %}"),
    "dictionaries": _repeated("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "namespaces": _repeated("{% set m = namespace() %}{% set m.a, m.b = ns.x, ns.x %}{% set ns.x = m %}"),
    "a namespace in itself": _repeated("{% set ns.x = ns %}"),
    "replaced text": _repeated("{% set ns.x = ns.x.replace('a', 'aaaa') %}"),
    "replaced text, by a filter": _repeated("{% set ns.x = ns.x|replace('a', 'aaaa') %}"),
    "text that is kept": A_MILLION + _repeated("{% set ns.x = ns.x + [s ~ i] %}", "[]", 99999),
    "a method's width": "{{ 'a'.ljust(10**10) }}",
    "a filter's width": "{{ 'a'|center(10**10) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% with a width of its own": "{{ '%*d' % (10**9, 1) }}",
    "% with one text many times": "{{ ('%(a)s' * 5000) % {'a': 'x' * 100000} }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format with a width of its own": "{{ '{:>{}}'.format(1, 99999) * 99 }}",
    "the filter format": "{{ '%1000000000d'|format(1) }}",
    "joined by much": A_MILLION + "{{ range(99999)|join(s) }}",
    "a long indentation": "{{ ('\n' * 100000)|indent(100000) }}",
    "JSON": "{{ [[1]]|tojson(indent=10**9) }}",
    "deep JSON": _repeated("{% set ns.x = [ns.x] %}", "1", 900) + "{{ (ns.x * 1000)|tojson(indent=1000) }}",
    "a date": "{{ strftime_now('%1000000000Y') }}",
    "a codec that takes the square of a text": "{{ ('\u00e9.' * 1000).encode('idna') }}",
    "the same, back": "{{ ('a' * 1000).encode().decode(encoding='punycode') }}",
    "digits": "{{ 1.5|round(10**9) }}",
    "pieces": A_MILLION + "{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "comparisons": A_MILLION + "{% set t = s ~ 'b' %}{% for i in range(99999) %}{{ 1 if s == t }}{% endfor %}",
    "searches": A_MILLION + "{% for i in range(99999) %}{{ 1 if 'b' in s }}{% endfor %}",
    "tests": A_MILLION + "{% for i in range(99999) %}{{ s is eq(s ~ 1) }}{% endfor %}",
    "lists added up": "{{ [[1]]|sum(start=[]) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_is_refused_in_bounded_time_and_memory(template):
    seconds, peak = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^tokenizer_config\.json cannot render this conversation: ") as error:
        ChatTemplate(template, source="tokenizer_config.json").render(CONVERSATION)
    assert time.thread_time() - seconds < 30  # three at most, on a machine of its own
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10, "kilobytes"
    if isinstance(error.value.__cause__, WorkError):
        assert str(error.value).endswith("give a text instead of messages, or another chat_template")


def test_work_is_counted_and_not_timed():
    """The same template passes or not wherever it runs: a loop up to the bound passes, one beyond it never."""
    passed = [
        _passes("{% for i in range(" + str(n) + ") %}{% for j in range(9000) %}{% endfor %}{% endfor %}")
        for n in (5, 5000)
    ]
    assert passed == [True, False]


def _passes(template: str) -> bool:
    try:
        ChatTemplate(template).render(CONVERSATION)
    except ValueError:
        return False
    return True
