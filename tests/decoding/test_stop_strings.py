"""Stop strings: found wherever the borders of tokens are, and nothing is held back that cannot belong to one."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import GenerationConfig, StopStrings
from support.generations import sampled
from support.models import tiny_model
from support.tokenizers import Letters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stop_strings_end_a_text_across_tokens():
    model = replace(tiny_model(), tokenizer=Letters())
    config = GenerationConfig(seed=2, temperature=1.0, max_new_tokens=20, exit_layer=1, num_speculations=6)
    free = sampled(model, config)[0]
    assert free.text == Letters().decode(free.token_ids)
    stop = free.text[9:13]
    at = free.text.index(stop)
    for drafting_or_plain in (config.plain(), config):
        stopped = sampled(model, drafting_or_plain, stop=("?", stop), return_kv=True)[0]
        assert (stopped.text, stopped.finish_reason) == (free.text[:at], "stop")
        assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids
        assert (
            len(Letters().decode(stopped.token_ids[:-1])) < at + len(stop) <= len(Letters().decode(stopped.token_ids))
        )
        assert stopped.kv[0].size(1) == 9 + len(stopped.token_ids) - 1
    assert sampled(model, config, stop=("?",))[0].text == free.text


def fed(strings, pieces):
    stops = StopStrings(strings)
    shown = [stops.push(piece) for piece in pieces]
    return "".join([*shown, stops.finish()]), stops.found


@pytest.mark.parametrize(("strings", "text", "shown", "found"), [
    (["END"], "the ENEND of it", "the EN", "END"),
    (["aab"], "aaab", "a", "aab"),
    (["abab", "ba"], "ab abab", "ab a", "ba"),
    (["b", "ab", "aab"], "xaab", "x", "aab"),
    (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
    (["é\U0001f600"], "caf\u0065\u0301 é\U0001f600!", "caf\u0065\u0301 ", "é\U0001f600"),
    (["never"], "nevenev", "nevenev", None),
    ([], "all of it", "all of it", None),
])  # fmt: skip
def test_stop_strings_are_found_wherever_pieces_end(strings, text, shown, found):
    for size in (1, 2, 3, len(text)):
        assert fed(strings, [text[i : i + size] for i in range(0, len(text), size)]) == (shown, found)


def test_only_text_that_may_belong_to_a_stop_string_is_held_back():
    stops = StopStrings(["abcd"])
    assert [stops.push(piece) for piece in ("xab", "c", "ab", "cd", "e")] == ["x", "", "abc", "", ""]
    assert (stops.found, stops.finish()) == ("abcd", "")


def test_stop_strings_before_their_time_pass():
    stops = StopStrings(["ab"])
    assert [stops.push("xaba", may_end=False), stops.push("b")] == ["xab", ""]
    assert stops.found == "ab"


def test_stop_strings_agree_with_a_plain_search():
    """Random texts of three letters against str.find on the whole text."""
    generator = torch.Generator().manual_seed(0)

    def word(length):
        return "".join("abc"[i] for i in torch.randint(3, (length,), generator=generator))

    for _ in range(300):
        text, strings = word(30), [word(1 + n) for n in range(1, 5)]
        ends = {text.find(s) + len(s): s for s in sorted(strings, key=len) if s in text}
        expected = (text[: min(ends) - len(ends[min(ends)])], ends[min(ends)]) if ends else (text, None)
        assert fed(strings, list(text)) == expected


def test_stopping_takes_linear_time():
    """1,000 characters that nearly match a hundred thousand times over."""
    stops = StopStrings(["a" * 999 + "b"])
    assert len(stops.push("a" * 100_000)) == 100_000 - 999
    assert stops.push("b") == "" and stops.found
