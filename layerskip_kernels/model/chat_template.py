"""Chat templates: a conversation as the text that a chat model was trained on.

A template is a program in Jinja that comes with a model, from a stranger therefore: it runs in Jinja's sandbox, which
gives it no attributes with underscores, no mutable arguments and no way to the file system, and with a bound on its
work (bounded_jinja). The environment is that of Transformers, so a template that works there gives the same text here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerskip_kernels.model.files import read_text
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.model.tokenizer_files import token_text

__all__ = ["ChatTemplate", "check_messages", "read_chat_template"]

Message = Mapping[str, Any]
# Bytes that a template may read or write, as bounded_jinja counts them, and as many times the conversation's own size.
MOST_WORK, MOST_PASSES, MAX_GIVEN = 20_000_000, 1000, 1 << 30
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name, such as bos_token.

    ``source``: where it was read, for errors.
    """

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    source: str = "the chat template"

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation; with ``add_generation_prompt`` it ends where the assistant's answer begins.

        ``messages``: dictionaries with ``role`` and ``content`` (text). ``variables`` are handed to the template.
        Raises ValueError for messages that are none, and with the template's own words where it refuses them, as some
        do with a system message or two messages of one role in a row.
        """
        check_messages(messages)
        settings = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        given = {**self.special_tokens, **settings, **variables}
        try:
            return _render(self.text, given)
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"{self.source} cannot render this conversation: {str(error)[:300]}") from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError or TypeError, naming the message, for what is not a conversation."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise ValueError("the conversation holds no messages; give at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i} must be a dictionary with role and content, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            shown = str(message.get("role"))[:40]
            raise ValueError(f"message {i} must have a role of {', '.join(ROLES)}, got {shown!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} must have a content of text; parts other than text are not supported")


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template of a model's directory, of chat_template.jinja or tokenizer_config.json; None: it has none.

    Of several named ones, the one named "default". Raises ValueError naming a file that is damaged.
    """
    settings_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json_object(settings_file).values if settings_file.exists() else {}
    tokens = {name: token_text(value) for name, value in settings.items() if name.endswith("_token")}
    special_tokens = {name: text for name, text in tokens.items() if text is not None}
    if template_file.exists():
        return ChatTemplate(read_text(template_file), special_tokens, str(template_file))
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{settings_file} must have a chat_template of text, got {type(template).__name__}")
    return None if template is None else ChatTemplate(template, special_tokens, str(settings_file))


def _render(text: str, given: Mapping[str, Any]) -> str:
    from layerskip_kernels.model.bounded_jinja import MAX_TEMPLATE, BoundedEnvironment, size_of

    if len(text) > MAX_TEMPLATE:
        raise ValueError(f"the template has {len(text)} characters, more than {MAX_TEMPLATE}")
    work = MOST_WORK + MOST_PASSES * size_of(given, MAX_GIVEN)
    return BoundedEnvironment(work).from_string(text).render(**given)
