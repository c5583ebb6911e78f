"""Whether Triton's products took the path of many rows."""

from collections import Counter

from layerskip_kernels.triton_ops import launch


def count_tiles(monkeypatch):
    """How many launches take it from here on, by the tiles of a program."""
    taken = Counter()
    streaming_prompts = launch.streaming_prompts

    def counted(tiles, *config):
        taken[tiles] += 1
        return streaming_prompts(tiles, *config)

    monkeypatch.setattr(launch, "streaming_prompts", counted)
    return taken


def count_integer_tiles(monkeypatch):
    """The same of quantised weights."""
    taken = Counter()
    streaming_tiles = launch.streaming_tiles

    def counted(num_rows, tiles, k):
        taken[tiles] += 1
        return streaming_tiles(num_rows, tiles, k)

    monkeypatch.setattr(launch, "streaming_tiles", counted)
    return taken
