"""The errors a caller may want to catch by name; everything else is a ValueError or a TypeError."""

import reprlib

from layerskip_kernels._kv import CacheFull

__all__ = ["CacheFull", "SwapError", "UnsupportedModel", "shown"]

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 2, 4, 4, 4
_short.maxstring = _short.maxother = 120
_short.maxlong = 40


def shown(value: object) -> str:
    """A value as an error message shows it: its ``repr``, shortened to 140 characters in bounded time."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    text = _short.repr(value)
    return text if len(text) <= 140 else f"{text[:137]}..."


class SwapError(RuntimeError):
    """A sequence's swapped K and V could not be written, or cannot be used; prefill can compute them again."""


class UnsupportedModel(ValueError):  # noqa: N818 - the name is what it says to the reader
    """A checkpoint that this package does not run; names the file, the field, its value and what is supported."""

    def __init__(self, field: str, value: object, supported: str, where: object = None) -> None:
        place = "" if where is None else f"{where}: "
        super().__init__(f"unsupported model: {place}{field} is {shown(value)}; supported: {supported}")
        self.field, self.value, self.supported = field, value, supported
