"""Streamed text adds up to the text of all ids, whatever the decoder makes of single tokens."""

import random

import pytest

from layerskip_kernels.model.text_stream import TextStream
from support.tokenizers import byte_fallback, byte_level, ids_of, streamed

BYTES = (0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0x80, 0xF0, 0x9F, 0x98)


CHOICES = {
    byte_fallback: [1, 2, 259, 260, 261, 262, 263, *(3 + b for b in BYTES)],
    byte_level: [*ids_of(byte_level(), (*BYTES, 32, 97, 98)), 256],
}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("make", CHOICES)
def test_pieces_add_up_to_the_text(make, skip):
    tokenizer, draw = make(), random.Random(0)
    for _ in range(2000):
        ids = [draw.choice(CHOICES[make]) for _ in range(draw.randint(1, 14))]
        stream = TextStream(tokenizer, skip)
        pieces = [stream.push([i]) for i in ids]
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip), ids


@pytest.mark.parametrize("ids", [
    [261, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0x80, 261], [3 + 0xE2, 3 + 0x82, 3 + 0xAC, 2, 3 + 0x80, 262],
    [261, 3 + 0xE2, 3 + 0x82], [3 + 0xC3, 3 + 0xA9, 3 + 0xC3, 260],
], ids=str)  # fmt: skip
def test_a_run_of_bytes_stays_whole(ids):
    """Later bytes make all of a run invalid; a special token between them does not end it."""
    tokenizer = byte_fallback()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_what_is_complete_is_shown_at_once():
    stream = TextStream(byte_fallback())
    assert [stream.push([i]) for i in (260, 3 + 0xC3, 3 + 0xA9, 261, 262)] == ["a", "", "", "\u00e9 a", "b"]


def test_special_tokens_on_request():
    tokenizer = byte_level()
    [a] = ids_of(tokenizer, b"a")
    assert tokenizer.special_tokens == {"<|end|>": 256} and tokenizer.longest_token == 7
    assert [tokenizer.decode([a, 256, a], skip) for skip in (True, False)] == ["aa", "a<|end|>a"]
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert [stream.push([i]) for i in (a, 256)] == ["a", "<|end|>"]
