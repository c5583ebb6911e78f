"""``layerskip chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from layerskip_kernels.cli.options import (
    add_command,
    add_exit_option,
    add_generation_options,
    add_model_options,
    add_sampling_options,
    generation_config,
    load,
)

if TYPE_CHECKING:
    from layerskip_kernels.config import GenerationConfig
    from layerskip_kernels.engine.engine import Engine

__all__ = ["Conversation", "add_chat_command"]

HELP = "/reset begins anew, /system TEXT sets the system message, /quit or Ctrl-D ends; Ctrl-C ends an answer"


def add_chat_command(commands: Any) -> None:
    parser = add_command(commands, "chat", _chat, "talk to a model that has a chat template")
    add_model_options(parser)
    add_exit_option(parser)
    add_generation_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(max_new_tokens=512)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own)")
    parser.add_argument("--show-drafts", action="store_true", help="accepted drafts in green, corrections in red")


class Conversation:
    """What has been said, and the engine that answers; earlier turns are found in its cache, not computed again."""

    def __init__(self, engine: Engine, config: GenerationConfig, system: str | None = None) -> None:
        tokenizer = engine.model.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(f"{engine.model.name} has no chat template; use `layerskip generate` for plain texts")
        self._engine = engine
        self._config = config
        self._tokenizer = tokenizer
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str, write: Callable[[str], object], show_drafts: bool = False) -> str:
        """Answer a message, writing the answer as it comes. KeyboardInterrupt ends the answer, which is kept so far.

        Raises ValueError where the template refuses the conversation or the model has no room for it; the message is
        then forgotten.
        """
        from layerskip_kernels.cli.screen import Screen

        self.turns.append({"role": "user", "content": text})
        try:
            request = self._engine.add_request(self.messages, self._config)
        except BaseException:
            self.turns.pop()
            raise
        said: list[str] = []

        def show(piece: str) -> None:
            said.append(piece)
            write(piece)

        screen = Screen(self._tokenizer, show, self._config.stop_strings, self._config.min_new_tokens, show_drafts)
        try:
            for output in self._engine.stream(request):
                if output.drafts:
                    screen.on_draft(0, list(output.drafts), output.num_accepted)
                screen.on_tokens(0, list(output.tokens))
        except KeyboardInterrupt:
            self._engine.cancel(request)
            self._engine.run()
        screen.finish()
        answer = _without_colours("".join(said))
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def _without_colours(text: str) -> str:
    from layerskip_kernels.cli.screen import GREEN, PLAIN, RED

    for colour in (GREEN, RED, PLAIN):
        text = text.replace(colour, "")
    return text


def _chat(args: argparse.Namespace) -> int:
    from layerskip_kernels.engine.engine import Engine

    model = load(args)
    conversation = Conversation(Engine(model, max_batch=1), generation_config(args), args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its history and editing

        print(f"{model.name}: {HELP}", file=sys.stderr)
    _talk(conversation, lambda: input("> " if interactive else ""), args.show_drafts)
    return 0


def _talk(conversation: Conversation, read: Callable[[], str], show_drafts: bool) -> None:
    """Read messages and answer them until the input ends."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        if text in ("/quit", "/exit"):
            return
        if text.startswith("/"):
            print(_command(conversation, text.split(maxsplit=1)), file=sys.stderr)
        elif text:
            try:
                conversation.say(text, _write, show_drafts)
            except ValueError as error:
                print(f"layerskip: {error}", file=sys.stderr)
            _write("\n")


def _command(conversation: Conversation, words: Sequence[str]) -> str:
    """Do what a line that begins with a slash asks; returns what to say of it."""
    if words[0] == "/reset":
        conversation.turns.clear()
        return "a new conversation"
    if words[0] == "/system":
        conversation.system = words[1] if len(words) > 1 else None
        conversation.turns.clear()
        return "a new conversation" + (" with this system message" if conversation.system else "")
    return HELP if words[0] == "/help" else f"{words[0]} is not a command; {HELP}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
