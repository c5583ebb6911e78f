"""The lens: how many layers a token needs, the page a stranger can read, the pictures, the command."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, generate
from layerskip_kernels.cli.main import main
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.evaluation import lens
from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.evaluation.lens import Lens, look, summary, token_text
from layerskip_kernels.evaluation.lens_page import lens_page
from layerskip_kernels.evaluation.lens_plot import cell_colour, draw_layers_needed, draw_lens, ink
from support.commands import error_of
from support.exit_adapters import random_adapter
from support.models import tiny_model
from support.tokenizers import Words

pytestmark = pytest.mark.usefixtures("one_thread")


class Awkward(Words):
    """Tokens whose text would break a page or a plot."""

    TEXTS = ("<script>alert(1)</script>", "\"&'", " $x^2$", "\n", "\x00\u200b", "", "\u6f22")

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.TEXTS[token % len(self.TEXTS)] for token in ids)


def lens_of(guesses: list[list[int]]) -> Lens:
    tokens = torch.tensor(guesses)
    odds = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    return Lens("made up", [1], tokens, odds, tokens[..., None], odds[..., None])


def test_the_layers_needed_by_hand():
    made = lens_of([[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7], [7, 7, 1, 7], [7, 7, 7, 8]])
    assert made.layers_needed.tolist() == [1, 2, 3, 4, 4]
    found = summary(tiny_model(), [made])
    assert found["histogram"] == [1, 1, 1, 2]
    assert found["mean_layer"] == pytest.approx(14 / 5)
    assert found["agreement"] == [3 / 5, 3 / 5, 3 / 5, 1.0]
    assert (found["tokens"], found["prompts"]) == (5, 1)


def test_look_shows_what_is_generated():
    model = tiny_model()
    [generation] = generate(
        model, [[1, 2, 3]], GenerationConfig("autoregressive", max_new_tokens=9, return_logits=True)
    )
    seen = look(model, "p", [1, 2, 3], 9)
    assert seen.token_ids == generation.token_ids
    assert seen.guesses.shape == seen.probabilities.shape == (9, 3)
    odds = generation.logits.softmax(-1)
    assert torch.equal(seen.probabilities[:, -1], odds.amax(-1))
    assert torch.equal(seen.alternative_probabilities[:, -1], odds.topk(3).values)
    assert torch.equal(seen.alternatives[:, -1], odds.topk(3).indices)


def adapted_model() -> Model:
    """Its adapter's head has every second token."""
    plain = tiny_model()
    rows = torch.randn(plain.config.vocab_size, plain.config.hidden_size, generator=torch.Generator().manual_seed(2))
    return plain.with_exit_adapter(2, random_adapter(plain, lm_head=rows, every=2))


def test_an_exit_adapter_stands_beside_the_layer_that_it_follows():
    model = adapted_model()
    seen, bare = look(model, "p", [1, 2, 3], 6), look(tiny_model(), "p", [1, 2, 3], 6)
    assert bare.adapters == () and torch.equal(seen.guesses, bare.guesses)
    text = [1, 2, 3, *seen.token_ids[:-1]]
    [said] = [rows for rows in each_exit(model, text, 2, adapters=True) if rows.adapted]
    [adapter] = seen.adapters
    assert adapter.exit_layer == 2 and torch.equal(adapter.guesses, said.tokens)
    assert not torch.equal(adapter.guesses, seen.guesses[:, 1])
    odds = said.logits.softmax(-1)
    assert torch.equal(adapter.probabilities, odds.amax(-1))
    assert torch.equal(adapter.alternatives, odds.topk(3).indices)
    found = summary(model, [seen, seen])
    right = (adapter.guesses == seen.guesses[:, -1]).double().mean().item()
    assert found["adapters"] == [{"exit_layer": 2, "agreement": pytest.approx(right)}]
    assert "adapters" not in summary(tiny_model(), [bare])
    page = lens_page(replace(model, tokenizer=Awkward()), seen)
    assert '<th scope="col">2</th><th scope="col">2 + adapter</th><th scope="col">3</th>' in page
    cells, shown = Page(page).cells, replace(model, tokenizer=Awkward())
    assert cells[2::4] == [token_text(shown, token) for token in adapter.guesses.tolist()]
    assert cells[3::4] == [token_text(shown, token) for token in seen.token_ids]


def test_adapters_of_several_exits_stand_each_beside_its_layer():
    one = adapted_model()
    both = one.with_exit_adapter(1, random_adapter(one, "mlp", seed=9))
    seen, alone = look(both, "p", [1, 2, 3], 6), look(one, "p", [1, 2, 3], 6)
    assert [adapter.exit_layer for adapter in seen.adapters] == [1, 2]
    assert torch.equal(seen.adapters[1].probabilities, alone.adapters[0].probabilities)
    assert not torch.equal(seen.adapters[0].probabilities, seen.probabilities[:, 0])
    found = summary(both, [seen])["adapters"]
    assert [of["exit_layer"] for of in found] == [1, 2] and found[1:] == summary(one, [alone])["adapters"]
    page = lens_page(replace(both, tokenizer=Awkward()), seen)
    titles = ("1", "1 + adapter", "2", "2 + adapter", "3")
    assert "".join(f'<th scope="col">{title}</th>' for title in titles) in page
    cells, shown = Page(page).cells, replace(both, tokenizer=Awkward())
    for at, guesses in ((1, seen.adapters[0].guesses), (3, seen.adapters[1].guesses), (4, seen.guesses[:, -1])):
        assert cells[at::5] == [token_text(shown, token) for token in guesses.tolist()]


def test_look_notices_a_last_layer_that_says_something_else(monkeypatch):
    def wrong(*arguments: object) -> list:
        [generation] = generate(*arguments)
        return [replace(generation, token_ids=[*generation.token_ids[:-1], generation.token_ids[-1] ^ 1])]

    monkeypatch.setattr(lens, "generate", wrong)
    with pytest.raises(BitsDiffer):
        look(tiny_model(), "p", [1, 2, 3], 4)


def test_tokens_can_be_seen():
    model = replace(tiny_model(), tokenizer=Awkward())
    shown = [token_text(model, token) for token in range(7)]
    assert shown == ["<script>alert(1)</script>", "\"&'", "·$x^2$", "↵", "\\x00\\u200b", "[5]", "\u6f22"]
    assert token_text(tiny_model(), 5) == "[5]"


class Page(HTMLParser):
    """The tags of a page, what they link to, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] == "td":
            self.cells[-1] += text


def test_the_page_is_escaped_and_fetches_nothing():
    model = replace(tiny_model(), tokenizer=Awkward(), name="<b>m</b>")
    made = lens_of([[0, 1, 0], [2, 3, 3], [4, 5, 4]])
    page = Page(lens_page(model, replace(made, name="<i>p</i>")))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "b", "i"}
    assert not any(key in attributes for _, attributes in page.tags for key in ("src", "href"))
    assert page.cells == [token_text(model, token) for token in (0, 1, 0, 2, 3, 3, 4, 5, 4)]
    settled = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert [i for i, name in enumerate(settled) if name == "settled"] == [2, 4, 8]


def test_colours_tell_the_final_token_from_others_and_can_be_read():
    assert cell_colour(True, 1.0) != cell_colour(False, 1.0)
    assert cell_colour(True, 0.2) != cell_colour(True, 0.9)
    assert (ink(cell_colour(True, 1.0)), ink(cell_colour(True, 0.0))) == ("#ffffff", "#111111")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_pictures(tmp_path, ending):
    pytest.importorskip("matplotlib")
    model = replace(tiny_model(), tokenizer=Awkward(), name="$m_1$")
    adapted = replace(adapted_model(), tokenizer=Awkward())
    draw_layers_needed(summary(adapted, [look(adapted, "q", [4], 5)]), tmp_path / f"adapted.{ending}")
    if ending == "svg":
        assert "with the exit adapter" in (tmp_path / "adapted.svg").read_text()
    lenses = [look(model, "$p^2", [1, 2, 3], 5), look(model, "q", [4], 5)]
    first, again, histogram = (tmp_path / f"{name}.{ending}" for name in ("first", "again", "histogram"))
    draw_lens(model, lenses[0], first)
    draw_lens(model, lenses[0], again)
    draw_layers_needed(summary(model, lenses), histogram)
    assert first.read_bytes() == again.read_bytes()
    if ending == "svg":
        assert "what each layer would say" in first.read_text()
        assert "mean" in histogram.read_text()
    else:
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in (first, histogram))


# ---- the command ----


def test_the_page_comes_by_default(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["lens", "--prompt", "a b c", "--max-new-tokens", "4"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lens.html"]
    assert "the 4 tokens generated need" in capsys.readouterr().out
    assert len(Page((tmp_path / "lens.html").read_text(encoding="utf-8")).cells) == 4 * 3


def test_the_command_names_the_adapter(monkeypatch, capsys):
    adapted = replace(adapted_model(), tokenizer=Words())
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: adapted)
    assert main(["lens", "--prompt", "a b c", "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == summary(adapted, [look(adapted, "", "a b c", 4)])["adapters"]


def test_a_data_set_gives_the_mean_and_a_histogram(tiny, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a b c"}\n"d e"\n', encoding="utf-8")
    figure, numbers = tmp_path / "h.svg", tmp_path / "h.json"
    command = ["lens", "--prompt-file", str(prompts), "--max-new-tokens", "5"]
    assert main([*command, "--histogram", str(figure), "--output", str(numbers)]) == 0
    found = json.loads(numbers.read_text())
    lenses = [look(tiny, "", prompt, 5) for prompt in ("a b c", "d e")]
    assert found.pop("machine")["versions"]["torch"]
    assert found == summary(tiny, lenses)
    assert f"need {found['mean_layer']:.2f} of 3" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.json", "h.svg", "p.jsonl"]


def test_another_ending_is_refused_before_the_work(tiny, capsys):
    assert "must end with .png, .svg, .pdf" in error_of(["lens", "--plot", "lens.gif"], capsys)
