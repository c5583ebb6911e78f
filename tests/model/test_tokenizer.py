"""The tokenizer of a checkpoint, and the prompts that come with the package."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.bpe_splits import BPE_SPLITS
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.tokenizer import Tokenizer
from support.checkpoint_files import write_directory
from support.tokenizers import streamed


@pytest.fixture(scope="module")
def default() -> Checkpoint:
    """Shares the user's cache, so that the conversion happens once per machine."""
    return read_checkpoint()


TEXTS = [
    "def f(x):\n    return x  # naïve\n",
    "<|im_start|>user\nHello, 世界!<|im_end|>\n",
    "  👩‍👩‍👧 \t 3.14159",
    "",
]


def test_the_tokenizer_agrees_with_transformers(default: Checkpoint, tmp_path: Path):
    from transformers import AutoTokenizer

    from layerskip_kernels.model.gguf_cache import converted_directory
    from layerskip_kernels.model.sources import default_model_path

    theirs = AutoTokenizer.from_pretrained(converted_directory(default_model_path()))
    for text in TEXTS + [prompt for _, prompt in human_eval_prompts(20)]:
        ids = default.tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert default.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Hello, 世界!"}]
    for prompt in (True, False):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert default.tokenizer.apply_chat_template(messages, prompt) == ids


def test_messages_without_a_template_are_refused(tmp_path: Path):
    write_word_tokenizer(tmp_path / "words")
    with pytest.raises(ValueError, match=r"tokenizer\.json came without a chat template"):
        Tokenizer.from_directory(tmp_path / "words").apply_chat_template([{"role": "user", "content": "a"}])


def test_the_stream_of_pieces_is_the_text(default: Checkpoint):
    for text in TEXTS:
        ids = default.tokenizer.encode(text)
        pieces = streamed(default.tokenizer, ids)
        assert "".join(pieces) == default.tokenizer.decode(ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_is_held_back(default: Checkpoint):
    ids = default.tokenizer.encode("a 👧")
    assert len(ids) > 3
    pieces = streamed(default.tokenizer, ids[:-1])
    assert "".join(pieces[:-1]) in ("a", "a ")
    assert "".join(pieces) == default.tokenizer.decode(ids[:-1])


def write_word_tokenizer(directory: Path, **config: object) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    backend = Backend(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields | config))


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
def test_special_tokens_are_those_of_tokenizer_json(tmp_path: Path, config: dict):
    from transformers import AutoTokenizer

    write_word_tokenizer(tmp_path / "words", **config)
    tokenizer = Tokenizer.from_directory(tmp_path / "words")
    assert tokenizer.encode("a b a") == [1, 3, 4, 3]
    assert tokenizer.decode([1, 3, 4, 3, 2]) == "a b a"
    assert tokenizer.vocab_size == 5
    theirs = AutoTokenizer.from_pretrained(tmp_path / "words")
    assert theirs("a b a", truncation=False, padding=False)["input_ids"] == [1, 3, 4, 3]


BOS, EOS = 256, 257
NOTHING, SILENT = None, processors.ByteLevel(trim_offsets=True)
SAID = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
ASKS = [
    # tokenizer_class, what tokenizer.json puts around a text, what tokenizer_config.json says, ids of "ab"
    ("LlamaTokenizerFast", NOTHING, {"add_bos_token": True}, [BOS, 64, 65]),
    ("LlamaTokenizerFast", SILENT, {"add_bos_token": True}, [BOS, 64, 65]),  # DeepSeek-R1-Distill-Qwen-1.5B and others
    ("LlamaTokenizerFast", SILENT, {"add_bos_token": True, "add_eos_token": True}, [BOS, 64, 65, EOS]),
    ("LlamaTokenizer", SAID, {"add_bos_token": False}, [64, 65]),
    ("LlamaTokenizer", SAID, {"add_bos_token": True, "add_eos_token": True}, [BOS, 64, 65, EOS]),
    ("LlamaTokenizer", processors.Sequence([SILENT, SAID]), {"add_bos_token": False}, [64, 65]),
    ("LlamaTokenizer", SAID, {}, [BOS, 64, 65]),
    ("GemmaTokenizerFast", SILENT, {"add_bos_token": True, "add_eos_token": False}, [BOS, 64, 65]),
    ("PreTrainedTokenizerFast", SILENT, {"add_bos_token": True}, [64, 65]),
    ("PreTrainedTokenizerFast", SAID, {"add_bos_token": False}, [BOS, 64, 65]),
    ("Qwen2TokenizerFast", SILENT, {"add_bos_token": True}, [64, 65]),
    ("GPT2TokenizerFast", SAID, {"add_bos_token": False}, [BOS, 64, 65]),
]


def write_byte_tokenizer(folder: Path, post_processor: Any, **config: object) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if post_processor is not None:
        backend.post_processor = post_processor
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return folder


@pytest.mark.parametrize(("name", "post_processor", "says", "ids"), ASKS)
def test_classes_that_listen_to_tokenizer_config(
    tmp_path: Path, name: str, post_processor: Any, says: dict[str, bool], ids: list[int]
):
    """As Transformers 4 does it, which is asked where it is installed; Transformers 5 drops what is said there."""
    import transformers

    folder = write_byte_tokenizer(tmp_path / "bytes", post_processor, tokenizer_class=name, **says)
    assert Tokenizer.from_directory(folder).encode("ab") == ids
    if transformers.__version__.startswith("4."):
        assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == ids


def test_a_chat_that_begins_with_bos_gets_no_second_one(tmp_path: Path):
    says = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "chat_template": "{{ bos_token }}ab"}
    tokenizer = Tokenizer.from_directory(write_byte_tokenizer(tmp_path / "bytes", SILENT, **says))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == [BOS, 64, 65]
    assert tokenizer.encode("<s>ab") == [BOS, 64, 65]


@pytest.mark.parametrize("says", [{"bos_token": "<none>"}, {"bos_token": None}, {"add_bos_token": "yes"}], ids=str)
def test_special_tokens_that_cannot_be_put_are_refused(tmp_path: Path, says: dict):
    says = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True} | says
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: (add_)?bos_token must be "):
        Tokenizer.from_directory(write_byte_tokenizer(tmp_path / "bytes", SILENT, **says))


def test_a_damaged_tokenizer_is_named(tmp_path: Path):
    write_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        read_checkpoint(tmp_path)


def test_human_eval():
    prompts = human_eval_prompts()
    assert [task_id for task_id, _ in prompts] == [f"HumanEval/{i}" for i in range(164)]
    assert "def has_close_elements(" in prompts[0][1]
    assert human_eval_prompts(3) == prompts[:3]
    assert all(prompt == prompt.rstrip() for _, prompt in prompts)
    with pytest.raises(ValueError, match=r"n must be in 1\.\.164"):
        human_eval_prompts(0)


def _written(folder: Path, **parts: Any) -> Path:
    """A tokenizer of bytes with another normalizer, pre-tokenizer or decoder."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    for name, part in parts.items():
        setattr(backend, name, part)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


TENFOLD = "a" * 10
BOMBS = {
    "replacements": {"normalizer": normalizers.Sequence([normalizers.Replace("a", TENFOLD)] * 9)},
    "replacements within": {"normalizer": normalizers.Sequence([normalizers.Replace(Regex("a"), TENFOLD)] * 2)},
    "a text put before": {"normalizer": normalizers.Prepend("a" * 100_000)},
    "a decoder's": {"decoder": decoders.Sequence([decoders.Replace("a", TENFOLD)] * 9)},
    "powers of two": {"pre_tokenizer": pre_tokenizers.Split(Regex("(a+)+$|(a+)+b"), "isolated")},
    "powers of two of blanks": {"normalizer": normalizers.Replace(Regex(r"(\s+)+0"), " ")},
    "cubes": {"pre_tokenizer": pre_tokenizers.Split(Regex(r"(?:\w*\w*\w*;)"), "isolated")},
}


@pytest.mark.parametrize("parts", BOMBS.values(), ids=BOMBS)
def test_a_tokenizer_that_grows_or_backtracks_without_end_is_refused(tmp_path: Path, parts: dict[str, Any]):
    with pytest.raises(ValueError, match=r"model/tokenizer\.json has a ") as error:
        Tokenizer.from_directory(_written(tmp_path / "model", **parts))
    assert len(str(error.value)) < len(str(tmp_path)) + 500


def test_what_published_tokenizers_do_to_a_text_is_read(tmp_path: Path):
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.Replace("``", '"')]
    parts = {"normalizer": normalizers.Sequence([*steps, normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])}
    assert Tokenizer.from_directory(_written(tmp_path / "model", **parts)) is not None


def test_every_split_that_llama_cpp_knows_is_read(tmp_path: Path):
    for name, split in BPE_SPLITS.items():
        pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        parts = {"pre_tokenizer": pre_tokenizers.Sequence(pieces)}
        assert Tokenizer.from_directory(_written(tmp_path / name, **parts)) is not None
