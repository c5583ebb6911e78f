"""exit_adapter.safetensors: written, read with its model on any backend and dtype, refused by name with another."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.cli.main import main
from layerskip_kernels.model import sources
from layerskip_kernels.model.exit_adapter import quantised_adapter, write_exit_adapter
from layerskip_kernels.ops.reference import is_quantised
from support.checkpoint_files import HF_CONFIG, random_tensors, write_directory
from support.commands import error_of
from support.exit_adapters import random_adapter


@pytest.fixture
def source(tmp_path):
    write_directory(tmp_path / "model", num_hidden_layers=3)
    return tmp_path / "model"


@pytest.fixture
def adapter(source, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    model = load_model(source)
    write_exit_adapter(folder, 2, random_adapter(model), model.name, model.weights)
    return folder


@pytest.fixture
def with_head(source, tmp_path):
    """An adapter with a head of its own, of every second token."""
    folder = tmp_path / "with_head"
    folder.mkdir()
    model = load_model(source)
    write_exit_adapter(folder, 2, adapter_with_head(model), model.name, model.weights)
    return folder


def adapter_with_head(model):
    rows = torch.randn(model.config.vocab_size, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    found = random_adapter(model, lm_head=rows, every=2)
    return {**found, "head.ids": found["head.ids"].int()}


def rewrite(folder, change) -> None:
    """Change the header of an adapter's file."""
    path = folder / "exit_adapter.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16, "weights": "q8_0"}, {"backend": "reference"}],
    ids=str,
)
def test_a_model_finds_its_adapter_however_it_is_loaded(source, adapter, options):
    plain = load_model(source, **options)
    model = load_model(source, exit_adapter=adapter, **options)
    assert [(a.exit_layer, a.num_kv_layers) for a in model.exit_adapters] == [(2, 1)]
    config = GenerationConfig(max_new_tokens=6, return_logits=True, num_speculations=2)
    [found], [expected] = generate(model, [[5, 6, 7]], config), generate(plain, [[5, 6, 7]], config.plain())
    assert found.drafted > 0
    assert found.token_ids == expected.token_ids and torch.equal(found.logits, expected.logits)


def test_a_shipped_adapter_is_found_by_its_name(source, adapter, monkeypatch):
    monkeypatch.setattr(sources, "SHIPPED", adapter.parent)
    assert sources.shipped_exit_adapters() == ["adapter"]
    model = load_model(source, exit_adapter="adapter")
    assert [adapter.exit_layer for adapter in model.exit_adapters] == [2]
    with pytest.raises(FileNotFoundError, match=r"^other is missing; an exit adapter is a file named exit_adapter"):
        load_model(source, exit_adapter="other")


def test_numbers_are_read_as_they_were_written(source, adapter):
    model = load_model(source, backend="reference", exit_adapter=adapter / "exit_adapter.safetensors")
    written = random_adapter(load_model(source))
    [read] = model.exit_adapters
    assert torch.equal(read.weights.final_norm, written["norm.weight"])
    layer = read.weights.layers[1]
    assert torch.equal(layer.w_down, written["layers.0.mlp.down_proj.weight"])
    assert torch.equal(layer.attn_norm, written["layers.0.input_layernorm.weight"])


def test_an_adapter_without_attention_is_known_by_its_tensors(source, tmp_path):
    model = load_model(source, backend="reference")
    written = random_adapter(model, "mlp")
    names = {name.split(".", 2)[2] for name in written if name != "norm.weight"}
    assert names == {"post_attention_layernorm.weight", *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))}
    path = write_exit_adapter(tmp_path, 1, written, model.name, model.weights)
    read = load_model(source, backend="reference", exit_adapter=path)
    layer = read.exit_adapters[0].weights.layers[1]
    assert not layer.attends and torch.equal(layer.w_down, written["layers.0.mlp.down_proj.weight"])
    assert torch.equal(layer.first_norm, written["layers.0.post_attention_layernorm.weight"])
    config = GenerationConfig(max_new_tokens=6, num_speculations=2)
    [found], [alone] = generate(read, [[5, 6, 7]], config), generate(model, [[5, 6, 7]], config.plain())
    assert found.drafted > 0 and found.token_ids == alone.token_ids
    rewrite(tmp_path, lambda h: h.update({"layers.0.mlp.oops": h.pop("layers.0.mlp.up_proj.weight")}))
    with pytest.raises(ValueError, match=r"lacks tensor 'layers\.0\.mlp\.up_proj\.weight'"):
        load_model(source, exit_adapter=path)


def test_a_head_of_its_own_is_read_with_its_words(source, with_head):
    model, written = (
        load_model(source, backend="reference", exit_adapter=with_head),
        adapter_with_head(load_model(source)),
    )
    head = model.exit_at(2).head
    assert torch.equal(head.weight, written["head.weight"])
    assert head.ids.dtype == torch.int64 and torch.equal(head.ids, written["head.ids"].long())
    (with_head / "layerskip.json").write_text('{"exit_layer": 2, "draft_vocab": [4, 8]}')
    assert load_model(source, exit_adapter=with_head).exit_at(2).head.ids.tolist() == [4, 8]
    (with_head / "layerskip.json").write_text('{"exit_layer": 2, "draft_vocab": [4, 5]}')
    with pytest.raises(ValueError, match=r"draft_vocab must be among the \d+ tokens of the exit adapter's own head"):
        load_model(source, exit_adapter=with_head)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_adapter_is_quantised_by_a_command(source, with_head, tmp_path, capsys, backend):
    """Its layers and its head, from numbers and from blocks; the file is smaller, exit, words and defaults stay."""
    (with_head / "layerskip.json").write_text('{"exit_layer": 2, "num_speculations": 3}')
    for to, options in (("q8", []), ("q4", ["--type", "q4_0"])):
        assert main(["quantise", str(with_head), str(tmp_path / to), *options]) == 0
    assert "exit_adapter.safetensors: 0.0 MB" in capsys.readouterr().out
    assert main(["quantise", str(tmp_path / "q8"), str(tmp_path / "twice"), "--type", "q8_0"]) == 0
    capsys.readouterr()
    sizes = [
        (path / "exit_adapter.safetensors").stat().st_size for path in (with_head, tmp_path / "q8", tmp_path / "q4")
    ]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]
    plain, written = load_model(source, backend=backend), adapter_with_head(load_model(source))
    for to, weights in (("q8", "q8_0"), ("q4", "q4_0"), ("twice", "q8_0")):
        model = load_model(source, backend=backend, exit_adapter=tmp_path / to)
        words = written["head.ids"].long()
        expected = plain.with_exit_adapter(2, quantised_adapter({**written, "head.ids": words}, weights))
        [read], [made] = model.exit_adapters, expected.exit_adapters
        assert is_quantised(read.draft_head.weight) and torch.equal(read.draft_head.ids, words)
        if to != "twice":  # its numbers are rounded once more
            for one, other in zip(read.tensors, made.tensors, strict=True):
                assert torch.equal(one, other)
            assert torch.equal(read.draft_head.weight, made.draft_head.weight)
        assert model.draft_settings(GenerationConfig()) == (2, 3)
        config = GenerationConfig(max_new_tokens=6)
        [found], [alone] = generate(model, [[5, 6, 7]], config), generate(plain, [[5, 6, 7]], config.plain())
        assert found.drafted > 0 and found.token_ids == alone.token_ids


def test_the_files_that_its_defaults_name_come_along(source, with_head, tmp_path):
    """Or the folder could not be read: a name in layerskip.json is that of a file beside it."""
    (with_head / "words.json").write_text("[4, 8]")
    (with_head / "prompts.jsonl").write_text('"once"\n')
    named = {"exit_layer": 2, "draft_vocab": "words.json", "prompts": "prompts.jsonl"}
    (with_head / "layerskip.json").write_text(json.dumps(named))
    for folder in (tmp_path / "q8", with_head):  # the second one onto itself
        assert main(["quantise", str(with_head), str(folder)]) == 0
        assert load_model(source, exit_adapter=folder).exit_at(2).head.ids.tolist() == [4, 8]
        assert (folder / "prompts.jsonl").read_text() == '"once"\n'


def test_types_that_an_adapter_cannot_have_are_refused_before_anything_is_written(source, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    error = error_of(["quantise", str(adapter), str(out), "--type", "q6_k"], capsys)
    assert "has rows of 64 numbers, which are no whole blocks of 256, those of q6_k; choose a type of smaller" in error
    error = error_of(["quantise", str(adapter), str(out), "--type", "q4_k_m"], capsys)
    assert "an exit adapter's weights must be one of q4_0, q4_1" in error
    error = error_of(["quantise", str(source), str(out) + ".gguf", "--type", "q4_k"], capsys)
    assert "--type must be one of q8_0, " in error
    assert not out.exists()


def test_words_that_are_no_ascending_ids_are_refused_by_name(source, with_head):
    path, size = with_head / "exit_adapter.safetensors", load_model(source).config.vocab_size
    whole, last = path.read_bytes(), (size - 1) // 2 * 2
    assert whole.endswith(struct.pack("<2i", last - 2, last))
    for wrong in ((last, last - 2), (last, last), (last - 2, size), (last - 2, -1)):
        path.write_bytes(whole[:-8] + struct.pack("<2i", *wrong))
        with pytest.raises(
            ValueError, match=r"'head\.ids' in .*exit_adapter\.safetensors must hold token ids in 0\.\."
        ):
            load_model(source, exit_adapter=path)


def test_defaults_beside_the_adapter_count(source, adapter):
    (source / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 3, "draft_vocab": [1, 2, 3]}')
    (adapter / "layerskip.json").write_text('{"exit_layer": 2, "num_speculations": 5, "draft_vocab": [4, 5]}')
    model = load_model(source, exit_adapter=adapter)
    assert model.draft_settings(GenerationConfig()) == (2, 5)
    assert model.exit_at(2).head.ids.tolist() == [4, 5]
    (adapter / "layerskip.json").unlink()
    alone = load_model(source, exit_adapter=adapter)
    assert alone.draft_settings(GenerationConfig(num_speculations=4)) == (2, 4) and alone.defaults is None


@pytest.fixture
def of_first_exit(source, tmp_path):
    """An adapter without attention at exit 1, to stand beside the one of exit 2."""
    folder = tmp_path / "first"
    folder.mkdir()
    model = load_model(source)
    write_exit_adapter(folder, 1, random_adapter(model, "mlp"), model.name, model.weights)
    return folder


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_adapters_of_several_exits(source, with_head, of_first_exit, backend):
    """What lies beside them counts for their own drafts; which exit drafts is chosen on the way."""
    (source / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 3}')
    (of_first_exit / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 2, "draft_vocab": [4, 5]}')
    (with_head / "layerskip.json").write_text('{"exit_layer": 2, "draft_vocab": [4, 8]}')
    model = load_model(source, backend=backend, exit_adapter=[with_head, str(of_first_exit)])
    assert [(a.exit_layer, a.num_kv_layers) for a in model.exit_adapters] == [(1, 0), (2, 1)]
    assert [model.exit_at(e).head.ids.tolist() for e in (1, 2)] == [[4, 5], [4, 8]]
    assert model.defaults is None and model.draft_exits(GenerationConfig()) == (1, 2)
    plain = load_model(source, backend=backend)
    for exit_layer in (1, 2):
        config = GenerationConfig(exit_layer=exit_layer, max_new_tokens=6, return_logits=True, num_speculations=2)
        [found], [expected] = generate(model, [[5, 6, 7]], config), generate(plain, [[5, 6, 7]], config.plain())
        assert found.drafted > 0
        assert found.token_ids == expected.token_ids and torch.equal(found.logits, expected.logits)
    assert load_model(source, backend=backend, exit_adapter=[]).defaults == plain.defaults
    [alone] = load_model(source, backend=backend, exit_adapter=[of_first_exit]).exit_adapters
    assert alone.exit_layer == 1


def test_a_second_adapter_that_is_of_the_same_exit_foreign_or_damaged_is_refused_by_name(
    source, adapter, with_head, of_first_exit, tmp_path, capsys
):
    def refused(*folders) -> str:
        options = [text for folder in folders for text in ("--exit-adapter", str(folder))]
        return error_of(["generate", "-m", str(source), *options, "x"], capsys)

    assert f"{with_head} is an exit adapter after layer 2, as {adapter} is; give one" in refused(adapter, with_head)
    write_directory(tmp_path / "other", random_tensors({**HF_CONFIG, "num_hidden_layers": 3}), num_hidden_layers=3)
    other, foreign = load_model(tmp_path / "other"), tmp_path / "foreign"
    other.weights.layers[1].mlp_norm[3] *= 1.1
    foreign.mkdir()
    write_exit_adapter(foreign, 1, random_adapter(other), other.name, other.weights)
    error = refused(adapter, foreign)
    assert f"{foreign / 'exit_adapter.safetensors'} is an exit adapter for 'other', not for 'model'" in error
    path = of_first_exit / "exit_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is damaged or truncated" in refused(adapter, of_first_exit)


@pytest.mark.parametrize("changes", ["weights", "shape"])
def test_another_models_adapter_is_refused_by_name(adapter, tmp_path, changes):
    other = {"num_hidden_layers": 3} if changes == "weights" else {"num_hidden_layers": 3, "intermediate_size": 96}
    tensors = None
    if changes == "weights":
        tensors = random_tensors({**HF_CONFIG, **other})
        tensors["model.layers.1.input_layernorm.weight"][7] *= 1.02
    write_directory(tmp_path / "other", tensors, **other)
    with pytest.raises(ValueError, match=r"exit_adapter\.safetensors is an exit adapter for 'model', not for 'other'"):
        load_model(tmp_path / "other", exit_adapter=adapter)


DAMAGE = {
    "a tensor that is missing": (lambda h: h.update({"layers.0.mlp.oops": h.pop("norm.weight")}), "lacks tensor 'norm"),
    "another exit": (lambda h: h["__metadata__"].update(exit_layer="3"), r"exit_layer must be in 1\.\.2, got '3'"),
    "another format": (lambda h: h["__metadata__"].update(format="9"), "not an exit adapter of format 1"),
    "no metadata": (lambda h: h.pop("__metadata__"), "not an exit adapter of format 1"),
    "too many layers": (
        lambda h: h.update({"layers.7.input_layernorm.weight": h.pop("layers.0.input_layernorm.weight")}),
        "has 8 layers; an exit adapter has at most 2",
    ),
    "another shape": (lambda h: h["norm.weight"].update(shape=[32, 2]), "has shape"),
    "a head without words": (lambda h: h.update({"layers.0.mlp.ids": h.pop("head.ids")}), "layers.0.mlp.ids"),
    "words without a head": (lambda h: h.update({"layers.0.mlp.head": h.pop("head.weight")}), "lacks tensor 'head"),
    "words of another type": (lambda h: h["head.ids"].update(dtype="F32"), "must be I32"),
    "a head of another shape": (lambda h: h["head.weight"]["shape"].reverse(), "has shape"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_refused_by_name(source, with_head, kind):
    change, message = DAMAGE[kind]
    rewrite(with_head, change)
    with pytest.raises(ValueError, match=f"exit_adapter.safetensors.*{message}"):
        load_model(source, exit_adapter=with_head)


def test_bytes_that_are_missing_or_no_numbers_are_refused_by_name(source, adapter):
    path = adapter / "exit_adapter.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"exit_adapter\.safetensors is damaged or truncated"):
        load_model(source, exit_adapter=path)
    path.write_bytes(whole[:-4] + b"\xff" * 4)
    with pytest.raises(ValueError, match=r"exit_adapter\.safetensors holds a NaN"):
        load_model(source, exit_adapter=path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing; an exit adapter is a file named"):
        load_model(source, exit_adapter=adapter / "nowhere")
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not an exit adapter"):
        load_model(source, exit_adapter=path)


def test_the_command_line_takes_it(source, adapter, capsys):
    error = error_of(["generate", "-m", str(source), "--exit-adapter", str(adapter / "nowhere"), "x"], capsys)
    assert "nowhere is missing; an exit adapter is a file named exit_adapter.safetensors" in error


def test_an_adapter_is_written_whole_or_not_at_all(source, adapter, monkeypatch):
    model, path = load_model(source), adapter / "exit_adapter.safetensors"
    before = path.read_bytes()

    def killed(path, *_):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("layerskip_kernels.model.exit_adapter.write_safetensors", killed)
    with pytest.raises(KeyboardInterrupt):
        write_exit_adapter(adapter, 1, random_adapter(model), model.name, model.weights)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_exit_adapter(adapter, 1, random_adapter(model), model.name, model.weights)
    assert path.read_bytes() != before and [*adapter.iterdir()] == [path]
