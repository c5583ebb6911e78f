"""Plain data between the judge and the candidate of sandbox.py, as JSON that says each value's type.

Imported by a file's path, and importing nothing of the package.
"""

from typing import Any

__all__ = ["NotPlain", "pack", "unpack"]

LARGE = 1 << 53
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class NotPlain(Exception):  # noqa: N818 - the name is what it says to the reader
    """A value that is not made of None, numbers, strings, bytes, lists, tuples, sets and dicts."""


def pack(value: Any) -> Any:
    """What JSON can say of a value; subclasses become what they derive from. Raises NotPlain."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < LARGE else ["int", hex(value)]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [pack(item) for item in value]]
    raise NotPlain(f"a {type(value).__name__} is not plain data")


def unpack(packed: Any) -> Any:
    """The value again, made of built-in types alone. Raises NotPlain for what ``pack`` does not write."""
    if packed is None or isinstance(packed, bool | int | float | str):
        return packed
    try:
        name, content = packed
        if name == "int":
            return int(content, 16)
        if name == "bytes":
            return bytes.fromhex(content)
        if name == "complex":
            return complex(*content)
        if name == "dict":
            return {unpack(key): unpack(item) for key, item in content}
        return CONTAINERS[name]([unpack(item) for item in content])
    except (ValueError, TypeError, KeyError) as error:
        raise NotPlain("not what pack writes") from error
