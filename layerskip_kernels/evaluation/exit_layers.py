"""The exit layers that are tried where none were named."""

__all__ = ["HELP", "exit_layers_of"]

PARTS = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
HELP = "default: 1/8, 1/4, 1/3 and 1/2 of the layers"


def exit_layers_of(num_layers: int) -> list[int]:
    """An eighth, a quarter, a third and a half of the layers, rounded; ascending and below the last."""
    return sorted({max(1, round(num_layers * part)) for part in PARTS} & {*range(1, num_layers)})
