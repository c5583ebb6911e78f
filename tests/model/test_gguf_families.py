"""Every family from a GGUF file, laid out as llama.cpp's converter does it: against Transformers, whose model the file
was made from, and against llama.cpp, which runs the same file beside us."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import normalizers
from tokenizers.models import BPE

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.gguf_write import write_gguf
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.tokenizer import Tokenizer
from support.families import transformers_model
from support.family_gguf import GGUF_VARIANTS, write_family_gguf
from support.llama_cpp import LIVE, first_probabilities
from support.models import random_tokens

PROMPT = random_tokens(270)
CONFIG = GenerationConfig("autoregressive", max_new_tokens=12, eos_token_ids=(), return_logits=True)


@pytest.fixture(scope="module", params=GGUF_VARIANTS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gguf_cache: Path
) -> tuple[str, Path, Any]:
    """A family's name, its GGUF file, and Transformers' model."""
    folder = tmp_path_factory.mktemp("family")
    theirs = transformers_model(request.param, folder, **GGUF_VARIANTS[request.param], plain=True)
    write_family_gguf(folder / "tiny.gguf", folder)
    return request.param, folder / "tiny.gguf", theirs


@pytest.fixture(scope="module")
def gguf_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def test_logits_are_those_of_transformers(family: tuple[str, Path, Any]):
    _, path, theirs = family
    [ours] = generate(load_model(path, torch.float32), [PROMPT], CONFIG)
    with torch.no_grad():
        logits = theirs(torch.tensor([PROMPT + ours.token_ids[:-1]])).logits[0, len(PROMPT) - 1 :]
    assert logits.std() > 0.5, "the logits must spread for this to mean something"
    assert (logits - ours.logits).abs().max() < 1e-3
    assert logits.argmax(dim=1).tolist() == ours.token_ids


@LIVE
def test_probabilities_are_those_of_llama_cpp(family: tuple[str, Path, Any]):
    """Its activations are fp32 but K and V, which are fp32 here as well; its sums are in another order."""
    _, path, _ = family
    [ours] = generate(load_model(path, torch.float32), [PROMPT], CONFIG)
    theirs = first_probabilities(path, PROMPT)
    expected = ours.logits[0].softmax(dim=0)
    assert len(theirs) == len(expected)
    found = torch.tensor([theirs[token] for token in range(len(expected))])
    assert (found - expected).abs().max() < 2e-3


# ---- written ----

# Rows of whole blocks of 32, where heads allow it.
WHOLE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)


def byte_tokenizer() -> Tokenizer:
    """As of Gemma: a sentencepiece vocabulary, here of bytes alone."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(0x0A, 0x0A + 98))]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=GGUF_VARIANTS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gguf_cache: Path
) -> tuple[Path, Path]:
    """A family's folder and the file that was written of it."""
    folder = tmp_path_factory.mktemp("family")
    changes = {**GGUF_VARIANTS[request.param], **WHOLE}
    if request.param == "phi3":
        changes["rope_parameters"] = {
            **changes["rope_parameters"], "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
        }  # fmt: skip
    transformers_model(request.param, folder, **changes, plain=True)
    checkpoint = dataclasses.replace(read_checkpoint(folder), tokenizer=byte_tokenizer())
    write_gguf(checkpoint, folder / "written.gguf", "q8_0")
    return folder, folder / "written.gguf"


def test_a_written_file_is_the_same_model(written: tuple[Path, Path]):
    folder, path = written
    expected, kept = read_checkpoint(folder), read_checkpoint(path, torch.float32)
    assert expected.model_type == kept.model_type
    assert kept.config.max_positions == expected.config.max_positions
    blocks = read_checkpoint(path, keep_quantised=True).tensors
    assert sum(tensor.dtype == torch.uint8 for tensor in blocks.values()) > len(blocks) // 3
    assert kept.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        tolerance = 1e-6 if tensor.dim() == 1 else 0.01
        assert (kept.tensors[name] - tensor).norm() <= tolerance * tensor.norm(), name
    [ours] = generate(load_model(path, torch.float32, weights="16bit"), [PROMPT], CONFIG)
    [theirs] = generate(load_model(folder, torch.float32), [PROMPT], CONFIG)
    assert (ours.logits[0] - theirs.logits[0]).norm() < 0.2 * theirs.logits[0].norm()  # four layers of large numbers


@LIVE
def test_llama_cpp_reads_a_written_file(written: tuple[Path, Path]):
    """Its activations are rounded to 8 bits by another rule: near, not equal."""
    _, path = written
    [ours] = generate(load_model(path, torch.float32), [PROMPT], CONFIG)
    theirs, expected = first_probabilities(path, PROMPT), ours.logits[0].softmax(dim=0)
    found = torch.tensor([theirs[token] for token in range(len(expected))])
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("mistral", dict(sliding_window=100), r"layer_windows is \(100, 100, 100, 100\); supported: \(\)"),
        ("smollm3", dict(no_rope_layers=[1, 0, 1, 0]), r"layer_ropes is \('main', 'none', .*supported: "),
        ("gemma2", dict(query_pre_attn_scalar=40), r"attention_scale is 0\.158.*'gemma2' can say"),
        ("llama", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_scaling is"),
    ],
)
def test_a_switch_that_a_file_cannot_say_is_refused(tmp_path: Path, variant: str, changes: dict[str, Any], said: str):
    transformers_model(variant, tmp_path, plain=True, **changes)
    with pytest.raises(UnsupportedModel, match=said):
        write_gguf(read_checkpoint(tmp_path), tmp_path / "new.gguf", "q8_0")
    assert not list(tmp_path.glob("new.gguf*"))
