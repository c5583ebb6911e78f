"""Checks of arguments: TypeError or ValueError with the argument's name, what was expected and what came."""

import math
from collections.abc import Sequence

from layerskip_kernels.errors import shown

__all__ = [
    "MAX_INT",
    "check_between",
    "check_bool",
    "check_choice",
    "check_int",
    "check_number",
    "check_positive_float",
    "check_token_ids",
]

MAX_INT = 2**31 - 1  # of sizes, counts and token ids


def check_int(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> None:
    """An int in ``minimum``..``maximum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {shown(value)}")


def check_number(name: str, value: object) -> float:
    """An int or a float; returns it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)} ({type(value).__name__})")
    return value


def check_positive_float(name: str, value: object) -> None:
    """A positive, finite number."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}")


def check_between(name: str, value: object, low: float, high: float) -> None:
    """A number in ``low``..``high``."""
    if not low <= check_number(name, value) <= high:
        raise ValueError(f"{name} must be in {low:g}..{high:g}, got {shown(value)}")


def check_bool(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)} ({type(value).__name__})")


def check_token_ids(name: str, value: object, maximum: int = MAX_INT) -> None:
    """A tuple of token ids."""
    if not isinstance(value, tuple):
        raise TypeError(f"{name} must be a tuple of token ids, got {shown(value)} ({type(value).__name__})")
    for token_id in value:
        check_int(f"each of {name}", token_id, 0, maximum)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of some names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
