"""What is taken out of the outputs that wait to be handed out; the engine makes the change in one assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from layerskip_kernels.engine.request import Generation, Output

__all__ = ["Choice", "everything", "generations", "oldest_of", "shortened"]

T = TypeVar("T")
LONG = 256  # outputs; a shorter outbox is not worth shortening
Choice = tuple[T, list[Output], list[Output]]  # what to return, the outputs taken for it, and those that stay


def everything(waiting: list[Output]) -> Choice[list[Output]]:
    return waiting, waiting, []


def oldest_of(request_id: int, waiting: list[Output]) -> Choice[list[Output]]:
    """The oldest output of a request, as a list of at most one."""
    taken = [output for output in waiting if output.request_id == request_id][:1]
    return taken, taken, [output for output in waiting if not taken or output is not taken[0]]


def generations(waiting: list[Output]) -> Choice[dict[int, Generation]]:
    """The generations of the requests that ended; all outputs are taken for them."""
    found = {output.request_id: output.generation for output in waiting if output.generation is not None}
    return found, waiting, []


def shortened(waiting: list[Output]) -> Choice[None]:
    """Nothing; a long outbox keeps one output for each request, with all its tokens and text."""
    if len(waiting) < LONG:
        return None, [], waiting
    by_request: dict[int, list[Output]] = {}
    for output in waiting:
        by_request.setdefault(output.request_id, []).append(output)
    return None, [], [_joined(outputs) for outputs in by_request.values()]


def _joined(outputs: Sequence[Output]) -> Output:
    """One output for several of a request; it does not say what was drafted."""
    tokens = [token for output in outputs for token in output.tokens]
    logprobs = [logprob for output in outputs for logprob in output.logprobs]
    text = "".join(output.text for output in outputs)
    return replace(outputs[-1], tokens=tokens, drafts=(), num_accepted=0, logprobs=logprobs, text=text)
