"""Training an exit adapter: the layers in PyTorch are those of run_layers, and what is trained drafts better."""

import json
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, draft_step, generate, load_model, prefill
from layerskip_kernels.cli.main import main
from layerskip_kernels.cli.training import adapter_kinds
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.ops.reference import is_quantised
from layerskip_kernels.training import adapter_training, written_texts
from layerskip_kernels.training.adapt import adapt, default_exits
from layerskip_kernels.training.adapter_choice import StepCosts, measure_costs
from layerskip_kernels.training.adapter_layers import AdapterInTraining
from layerskip_kernels.training.adapter_start import OwnWeights, lens
from layerskip_kernels.training.adapter_training import AdapterTraining, AdaptSettings
from layerskip_kernels.training.exit_states import ExitStates, states_at_exits
from layerskip_kernels.training.written_texts import NOT_ASKED, judged_texts, pieces, write_texts
from support.families import VARIANTS, transformers_model
from support.models import cache_for, random_tokens, tiny_model

QUICK = AdaptSettings(num_tokens=500, max_new_tokens=24, exits=(3,), pilot_steps=2, passes=2, texts_per_step=6)


@pytest.fixture(scope="module")
def code_model() -> Model:
    """The shipped tiny model, in fp32: it has a tokenizer and something to say."""
    return load_model("layerskip-tiny-code", torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layers_are_those_of_the_backend(variant, tmp_path):
    """In fp32, within rounding: a model's last layer as the adapter of its last exit, which is the model then."""
    transformers_model(variant, tmp_path)
    model = load_model(tmp_path, torch.float32)
    exit_layer, tokens = model.config.num_layers - 1, random_tokens(150)
    # The adapter has the window and RoPE of the layer before the exit.
    config = model.config
    windows, ropes = ((*layers[:exit_layer], layers[exit_layer - 1]) if layers else () for layers in
                      (config.layer_windows, config.layer_ropes))  # fmt: skip
    same = replace(model, config=replace(config, layer_windows=windows, layer_ropes=ropes))
    own = OwnWeights(tmp_path, [exit_layer])
    layers = AdapterInTraining(config, exit_layer, own.first_adapter(exit_layer, 1))
    states, after = states_at_exits(same, [exit_layer, exit_layer + 1], tokens)
    with torch.no_grad():
        logits = layers.logits(layers(states[None])[0], own.head)
    weights, sizes = same.weights, same.sizes
    _, expected = same.ops.norm_head_argmax(after, weights.final_norm, weights.lm_head, sizes.vocab_size, *sizes.head)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [1, "mlp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_says_in_training_what_it_says_in_drafts(variant, kind, tmp_path):
    """In fp32, within rounding, of every family: what it starts as, a layer without attention as well."""
    transformers_model(variant, tmp_path)
    model, tokens = load_model(tmp_path, torch.float32), random_tokens(40)
    own = OwnWeights(tmp_path, [1])
    first = own.first_adapter(1, kind)
    assert any("self_attn" in name for name in first) == (kind == 1)
    layers = AdapterInTraining(own.config, 1, first)
    [states] = states_at_exits(model, [1], tokens)
    with torch.no_grad():
        logits = layers.logits(layers(states[None])[0], own.head)
    adapted = model.with_exit_adapter(1, first)
    [rows] = [rows for rows in each_exit(adapted, tokens, exits=[1], adapters=True) if rows.adapted]
    torch.testing.assert_close(logits, rows.logits, rtol=1e-3, atol=1e-3)


def test_states_are_kept_and_completed(tmp_path):
    model, texts = tiny_model(), [random_tokens(n, seed=n) for n in (5, 300, 9)]
    whole = ExitStates(model, (3, 2), texts, tmp_path)
    for i, tokens in enumerate(texts):
        assert torch.equal(whole.at(2, i), states_at_exits(model, [2], tokens)[0])
        assert torch.equal(whole.at(3, i), states_at_exits(model, [3], tokens)[0])
    paths = [tmp_path / f"states-{exit_layer}.bin" for exit_layer in (2, 3)]
    whole_bytes = [path.read_bytes() for path in paths]
    paths[1].write_bytes(whole_bytes[1][: len(whole_bytes[1]) // 2 + 1])  # a kill in the middle of the second text
    again = ExitStates(model, (2, 3), texts, tmp_path)
    assert all(torch.equal(again.at(exit_layer, i), whole.at(exit_layer, i)) for exit_layer in (2, 3) for i in range(3))
    assert [path.read_bytes() for path in paths] == whole_bytes


def test_states_are_those_of_drafting():
    """Bit for bit those that draft_step keeps in the cache."""
    model, tokens = tiny_model(), random_tokens(20)
    cache = cache_for(model, 30, page_size=30)
    sequence = cache.add_sequence(tokens)
    cache.commit(prefill(model, cache, [sequence]))
    draft = draft_step(model, cache, [sequence], 2, 3)
    [page] = cache.pool.pages(sequence.id)
    text = [*sequence.tokens, *draft.of(0)]  # 21 tokens and 3 drafts, of which the last has passed no layer yet
    assert torch.equal(cache.hidden[page, 20:23], states_at_exits(model, [2], text)[0][20:23])


def test_texts_are_the_models_own(code_model, tmp_path):
    prompts = [code_model.tokenizer.encode(text) for text in ("def mean(values):\n", "import os\n")]
    texts = write_texts(code_model, prompts, tmp_path, 60, 12)
    for prompt, text in zip(prompts, texts, strict=False):
        [said] = generate(code_model, [prompt], GenerationConfig("autoregressive", max_new_tokens=12))
        assert text.tokens == [*prompt, *said.token_ids][:-1]
        assert text.targets[len(prompt) - 1 :] == said.token_ids
        assert set(text.targets[: len(prompt) - 1]) <= {NOT_ASKED}
    assert len(texts) > len(prompts) and sum(text.num_targets for text in texts) >= 60
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["000000.jsonl", "000001.jsonl"]
    (tmp_path / names[0]).touch()
    assert write_texts(code_model, prompts, tmp_path, 60, 12) == texts
    (tmp_path / names[-1]).unlink()  # a kill before the last group was written
    assert write_texts(code_model, prompts, tmp_path, 60, 12) == texts
    others = write_texts(code_model, prompts, tmp_path / "other", 60, 12, seed=1)
    assert others[: len(prompts)] == texts[: len(prompts)] and others[len(prompts)] != texts[len(prompts)]


def test_a_chat_model_asks_itself_questions(tmp_path, monkeypatch):
    for name, few in (("BATCH", 4), ("MIN_QUESTION", 1)):
        monkeypatch.setattr(written_texts, name, few)
    model = load_model()
    [before, after] = model.tokenizer.chat_template.render([{"role": "user", "content": "@"}]).split("@")
    texts = write_texts(model, [], tmp_path, 2, 2)
    for text in texts:
        shown = model.tokenizer.decode(text.tokens, skip_special_tokens=False)
        assert shown.startswith(before) and after in shown and len(shown) > len(before + after)


def test_given_texts_are_judged(code_model, tmp_path):
    given, last = pieces(code_model, ["import os\nimport sys\n"]), code_model.config.num_layers
    [text] = judged_texts(code_model, given, states_at_exits(code_model, [last], given[0]), tmp_path / "given.jsonl")
    assert text.tokens == code_model.tokenizer.encode("import os\nimport sys\n")
    assert judged_texts(code_model, given, [], tmp_path / "given.jsonl") == [text]
    for count in (1, len(text.tokens)):
        [said] = generate(code_model, [text.tokens[:count]], GenerationConfig("autoregressive", max_new_tokens=1))
        assert text.targets[count - 1] == said.token_ids[0]


def training_for(model, folder, settings=QUICK) -> AdapterTraining:
    folder.mkdir(exist_ok=True)
    texts = write_texts(model, [], folder / "texts", settings.num_tokens, settings.max_new_tokens)
    words = sorted({target for text in texts for target in text.targets if target != NOT_ASKED})
    states = ExitStates(model, (3, model.config.num_layers), [text.tokens for text in texts], folder)
    return AdapterTraining(OwnWeights("layerskip-tiny-code", [3]), texts, states, words, 3, 1, settings)


def test_a_lens_reads_the_last_state(code_model):
    """After all layers but the last one, and that as the adapter, it is the unit matrix; an exit's is the best one."""
    last, texts = code_model.config.num_layers, [random_tokens(200, seed=n) for n in range(4)]
    own = OwnWeights("layerskip-tiny-code", [3, last - 1])
    for exit_layer, exact in ((last - 1, True), (3, False)):
        layers = AdapterInTraining(own.config, exit_layer, own.first_adapter(exit_layer, 1))
        at_exit, at_end = zip(*(states_at_exits(code_model, [exit_layer, last], text) for text in texts), strict=True)
        found = lens(layers, at_exit, at_end, own.norm)
        with torch.no_grad():
            read = torch.cat([layers(states[None])[0] for states in at_exit]) @ found.T
        wanted = layers.norm(torch.cat(at_end), own.norm)
        missed = (read - wanted).square().mean() / wanted.square().mean()
        assert missed < 1e-3 if exact else 0.01 < missed < 0.9
        moved = (read * 1.01 - wanted).square().mean() / wanted.square().mean()
        assert exact or moved > missed


def test_a_training_starts_as_a_lens_from_its_exit(code_model, tmp_path):
    """The head is the LM head after the lens between the right states, and right more often than that of others."""
    training = training_for(code_model, tmp_path)
    texts = write_texts(code_model, [], tmp_path / "texts", QUICK.num_tokens, QUICK.max_new_tokens)
    own, last = OwnWeights("layerskip-tiny-code", [3]), code_model.config.num_layers
    words = sorted({target for text in texts for target in text.targets if target != NOT_ASKED})
    learnt = [text.tokens for i, text in enumerate(texts) if i % 16 != 8]
    at_exit, at_end = zip(*(states_at_exits(code_model, [3, last], tokens) for tokens in learnt), strict=True)
    expected = own.head[words] @ lens(
        AdapterInTraining(own.config, 3, own.first_adapter(3, 1)), at_exit, at_end, own.norm
    )
    head = training.layers.tensors(torch.float32)["head.weight"]
    torch.testing.assert_close(head, expected, rtol=1e-3, atol=1e-3)  # the texts come in another order
    assert training.acceptances[0] > 0.2


def test_a_training_resumes_to_the_same_bits(code_model, tmp_path, monkeypatch):
    whole = training_for(code_model, tmp_path / "whole")
    whole.run(tmp_path / "whole.safetensors")
    first = training_for(code_model, tmp_path / "parts")
    monkeypatch.setattr(adapter_training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    steps = first.take_step

    def stop(planned: int) -> float:
        if first.step == whole.step - 2:
            raise KeyboardInterrupt
        return steps(planned)

    monkeypatch.setattr(first, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path / "parts.safetensors")
    second = training_for(code_model, tmp_path / "parts")
    second.run(tmp_path / "parts.safetensors")
    assert second.step == whole.step > 4 and second.acceptances == whole.acceptances
    for name, tensor in whole.layers.tensors(torch.float32).items():
        assert torch.equal(second.layers.tensors(torch.float32)[name], tensor)
        assert torch.equal(second.best[name], whole.best[name])


def test_a_training_ends_when_it_gains_nothing(code_model, tmp_path):
    settings = replace(QUICK, learning_rate=0.0, patience=1)
    training = training_for(code_model, tmp_path, settings)
    training.acceptances = [2.0]  # which nothing reaches
    training.run(tmp_path / "state.safetensors")
    assert training.step == training.steps_per_pass


def test_what_is_trained_drafts_better_and_changes_no_text(code_model, tmp_path):
    """On code that people wrote: what this model writes by itself is too easy to foretell."""
    code = [Path(adapter_training.__file__).read_text(encoding="utf-8")]
    settings = replace(QUICK, num_tokens=1, max_new_tokens=4, exits=(1,), texts_per_step=2, passes=4)
    prompts = ["def add(a, b):\n"]
    untrained = replace(settings, passes=0, adapter_layers=(1, "mlp"))
    first = adapt(code_model, "layerskip-tiny-code", tmp_path / "untrained", untrained, prompts, code)
    tried = json.loads((tmp_path / "untrained" / "training" / "choice.json").read_text())
    assert {candidate["num_layers"] for candidate in tried} == {1, "mlp"}
    assert load_model("layerskip-tiny-code", torch.float32, exit_adapter=tmp_path / "untrained").exit_adapters
    found = adapt(code_model, "layerskip-tiny-code", tmp_path, settings, prompts, code)
    assert found["acceptance"] > first["acceptance"] + 0.05
    adapted = load_model("layerskip-tiny-code", torch.float32, exit_adapter=tmp_path)
    [adapter] = adapted.exit_adapters
    assert adapter.exit_layer == found["exit_layer"] == 1
    assert adapter.draft_head is adapter.head and len(adapter.head.ids) == found["num_words"]
    assert json.loads((tmp_path / "adapt.json").read_text()) == found
    config = GenerationConfig(max_new_tokens=24, num_speculations=3)
    [drafted] = generate(adapted, ["def add(a, b):\n"], config)
    [plain] = generate(code_model, ["def add(a, b):\n"], GenerationConfig("autoregressive", max_new_tokens=24))
    assert drafted.token_ids == plain.token_ids and drafted.accepted > 0
    assert adapt(code_model, "layerskip-tiny-code", tmp_path, settings, prompts, code) == found
    (tmp_path / "training" / "state.safetensors").unlink()  # texts of other prompts are no good either
    with pytest.raises(ValueError, match="belongs to a training with other data"):
        adapt(code_model, "layerskip-tiny-code", tmp_path, settings, ["def other():\n"], code)
    settings = replace(settings, passes=0, exits=())
    further = adapt(code_model, "layerskip-tiny-code", tmp_path / "more", settings, prompts, code, start_from=tmp_path)
    assert further["exit_layer"] == 1 and further["num_words"] == found["num_words"]
    assert further["acceptance"] == pytest.approx(found["acceptance"], abs=0.02)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_the_costs_of_a_model_of_few_layers(layers):
    """Two layers have one exit, which alone says nothing of what a layer costs."""
    costs = measure_costs(tiny_model(num_layers=layers), random_tokens(9), rounds=2)
    assert costs.verify[1] > 0 and (layers > 2 or costs.layer == costs.verify[1] / 2)


def test_an_exit_that_the_model_lacks_is_refused(code_model, tmp_path):
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.11, got 12"):
        adapt(code_model, "layerskip-tiny-code", tmp_path, replace(QUICK, exits=(12,)))


@pytest.mark.parametrize("seed", [-1, 2**24])
def test_a_seed_out_of_range_is_refused(code_model, tmp_path, seed):
    with pytest.raises(ValueError, match="seed must be at "):
        adapt(code_model, "layerskip-tiny-code", tmp_path, replace(QUICK, seed=seed))


def test_an_adapter_without_attention_is_trained_and_goes_on(code_model, tmp_path):
    settings = replace(QUICK, num_tokens=200, exits=(2,), adapter_layers=("mlp",), passes=1)
    found = adapt(code_model, "layerskip-tiny-code", tmp_path / "mlp", settings)
    assert found["num_layers"] == "mlp"
    adapted = load_model("layerskip-tiny-code", torch.float32, exit_adapter=tmp_path / "mlp")
    [adapter] = adapted.exit_adapters
    assert not adapter.num_kv_layers and adapter.num_layers == 1
    config = GenerationConfig(max_new_tokens=16, num_speculations=3)
    [drafted], [plain] = (generate(model, ["def add(a, b):\n"], config) for model in (adapted, code_model))
    assert drafted.token_ids == plain.token_ids and drafted.accepted > 0
    settings = replace(settings, adapter_layers=(1,))
    further = adapt(code_model, "layerskip-tiny-code", tmp_path / "more", settings, start_from=tmp_path / "mlp")
    assert further["num_layers"] == "mlp"


def test_the_kinds_of_layers_that_the_command_takes():
    assert adapter_kinds("1, mlp,2") == [1, "mlp", 2]
    with pytest.raises(ArgumentTypeError, match="must be 1, 2 or mlp, with commas between, got '3'"):
        adapter_kinds("1,3")


def test_default_exits():
    assert default_exits(30) == (2, 4, 8)
    assert default_exits(2) == (1,)


def test_the_predicted_speed_up():
    costs = StepCosts({1: 10.0, 2: 10.0, 3: 12.0}, layer=0.5, word=1e-4, call=0.25)
    # One draft: (1 + a) tokens for a draft and a pass of two rows; two: (1 + a + a^2) for two and a pass of three.
    gain, count = costs.speed_up(0.5, 3, 2500)
    assert count == 1 and gain == pytest.approx(1.5 * 10 / (2 + 10))
    gain, count = costs.speed_up(1.0, 3, 2500)
    assert count == 2 and gain == pytest.approx(3 * 10 / (4 + 12))
    # An adapter's K and V cost a verification one layer more, for the last draft.
    gain, count = costs.speed_up(1.0, 3, 2500, 1)
    assert count == 2 and gain == pytest.approx(3 * 10 / (4 + 0.5 + 12))


def test_the_command(code_model, tmp_path, capsys):
    options = (
        "--model layerskip-tiny-code --tokens 9 --max-new-tokens 9 --exits 2 --passes 1 --pilot-steps 1 --threads 1"
    )
    assert main(["adapt", str(tmp_path / "adapter"), *options.split()]) == 0
    assert "layerskip sweep --model layerskip-tiny-code --exit-adapter" in capsys.readouterr().out
    [adapter] = load_model("layerskip-tiny-code", exit_adapter=tmp_path / "adapter").exit_adapters
    assert adapter.exit_layer == 2 and not is_quantised(adapter.head.weight)
    again = [*options.split(), "--adapter-weights", "q8_0"]  # nothing is trained anew
    assert main(["adapt", str(tmp_path / "adapter"), *again]) == 0
    [quantised] = load_model("layerskip-tiny-code", exit_adapter=tmp_path / "adapter").exit_adapters
    assert is_quantised(quantised.head.weight) and torch.equal(quantised.head.ids, adapter.head.ids)
    assert is_quantised(quantised.weights.layers[1].wq)
    further = [*options.split(), "--start-from", str(tmp_path / "adapter"), "--seed", "3"]
    assert main(["adapt", str(tmp_path / "further"), *further]) == 0  # from numbers that were rounded
    [trained] = load_model("layerskip-tiny-code", exit_adapter=tmp_path / "further").exit_adapters
    assert torch.equal(quantised.head.ids, trained.head.ids) and not is_quantised(trained.head.weight)
