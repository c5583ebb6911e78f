"""The errors a caller may want to catch by name; everything else is a ValueError or a TypeError."""

from layerskip_kernels._kv import CacheFull

__all__ = ["CacheFull", "SwapError", "UnsupportedModel"]


class SwapError(RuntimeError):
    """A sequence's swapped K and V could not be written, or cannot be used; prefill can compute them again."""


class UnsupportedModel(ValueError):  # noqa: N818 - the name is what it says to the reader
    """A checkpoint that this package does not run; names the field, its value and what is supported."""

    def __init__(self, field: str, value: object, supported: str) -> None:
        super().__init__(f"unsupported model: {field} is {value!r}; supported: {supported}")
        self.field, self.value, self.supported = field, value, supported
