"""Times as people say them."""

__all__ = ["duration"]


def duration(seconds: float) -> str:
    """ "40 seconds", "12 minutes", "1.7 hours", "2.5 days"."""
    for unit, size, digits in (("days", 86_400, 1), ("hours", 3_600, 1), ("minutes", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"
