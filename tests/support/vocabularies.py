# ruff: noqa: RUF001
"""GGUF files of vocabularies, texts to try them on, and llama.cpp's ids (``python -m support.vocabularies``)."""

from __future__ import annotations

import base64
import io
import json
import random
import tempfile
import unicodedata
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

RECORDED = Path(__file__).parents[1] / "model" / "llama_cpp_ids.json"
SPACE = "▁"
SPECIALS = ["<|begin|>", "<|end_of_text|>", "<|fim_prefix|>"]
USER_DEFINED = ["<tool>", "  \t"]
# One name of each way to cut.
PRE_NAMES = """default llama-bpe smaug-bpe minicpm5 tekken gpt-4o qwen2 qwen35 gpt-2 smollm deepseek-v3 deepseek-coder
    falcon seed-coder""".split()
SPM_FLAGS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "no prefix": {"add_space_prefix": False},
    "EOS alone": {"add_bos_token": False, "add_eos_token": True},
}
WORDS = """the quick Brown fox's don't I'LL we'Ve def return print( ) { } [ ] self.x = 10 1234567 3.14 0x1F
    if else: # é ü naïve façade Straße ПРИВЕТ мир שלום السلام عليكم สวัสดีครับ ภาษาไทย
    世界 你好 こんにちは カタカナ 안녕하세요 हिन्दी বাংলা 👩‍👩‍👧 😀 🇺🇸
    ½ ² Ⅷ ٣٤٥ १२३ ~ ` ^ $ + < > | / // /* '' " ... … — “q” 'S 'd 'LL re’ CamelCase XMLHttp snake_case
    http://a.b/c?d=e&f=1 1,000,000 2024-11-28 16:09 a1b2 x² ǅ ªº ﬁ 𝒳 İ ı ſ K Å""".split()
# Where only a few of the ways to cut differ: symbols before newlines, newlines in a row, backquotes, digits after them.
RARE = ["x=\n\n\ny", "f();\n\n\n\nz", "`a` `b`", "x=`12345`", " =\r\n\r\n", "\n \n\n \n", "ab''s 'LL'd", "a  \n\n  b"]
WORDS += ["\\", "\u200b", "\u00ad", "\ufeff", "a\u0301", "\x7f"]
SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n ",
    "        ",
    "",
    "",
    "\u00a0",
    "\u3000",
    "\n    ",
]
RANGES = [
    (32, 126),
    (0xA0, 0x24F),
    (0x370, 0x7FF),
    (0xE00, 0xE7F),
    (0x2000, 0x2BFF),
    (0x3000, 0x30FF),
    (0x1F300, 0x1FAFF),
]


def random_texts(count: int, seed: int, specials: Iterable[str] = ()) -> list[str]:
    """Code, digits, emoji, Thai, Arabic, runs of white space, special tokens; what Unicode 14 assigns."""
    draw = random.Random(seed)
    return [_text(draw, list(specials)) for _ in range(count)]


def _text(draw: random.Random, specials: list[str]) -> str:
    pieces = []
    for _ in range(draw.randint(1, 12)):
        kind = draw.random()
        if specials and kind < 0.1:
            pieces.append(draw.choice(specials))
        elif kind < 0.2:
            letters = (chr(draw.randint(*draw.choice(RANGES))) for _ in range(draw.randint(1, 6)))
            pieces += [letter for letter in letters if unicodedata.category(letter) != "Cn"]
        elif kind < 0.3:
            pieces.append(draw.choice("09a.- \n") * draw.randint(1, 9))
        else:
            pieces.append(draw.choice(WORDS))
        pieces.append(draw.choice(SPACES))
    return "".join(pieces)


def write_vocabulary(path: Path, vocabulary: dict[str, Any], architecture: str = "llama", **settings: Any) -> Path:
    """A GGUF model of one layer of zeros with this vocabulary: ``vocabulary`` as the file's arrays, ``settings`` and it
    without "tokenizer.ggml."."""
    writer, width, tokens = gguf.GGUFWriter(path, architecture), 32, vocabulary["tokens"]
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": width,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in (vocabulary | settings).items():
        adders[type(value)](f"tokenizer.ggml.{key}", value)
    for name, shape in _shapes(len(tokens), width).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(vocab_size: int, width: int) -> dict[str, tuple[int, ...]]:
    layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, width), "output_norm.weight": (width,)}
    shapes |= {f"blk.0.{name}.weight": (width, width) for name in layer}
    return shapes | {f"blk.0.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}


def bpe_vocabulary(merges: list[str], pre: str) -> dict[str, Any]:
    """A byte-level vocabulary with two words that no merges lead to."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in merges] + ["Ġreturnx", "deff"]
    types = [1] * len(tokens) + [3] * len(SPECIALS) + [4] * len(USER_DEFINED)
    first = len(tokens)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens + SPECIALS + USER_DEFINED,
        "token_type": types,
        "merges": merges,
        "bos_token_id": first,
        "eos_token_id": first + 1,
    }


def spm_vocabulary(pieces: list[str]) -> dict[str, Any]:
    """A sentencepiece vocabulary: control tokens, bytes, ``pieces`` from the best to the worst, and two more."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>", "[INST]"]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [-1000.0, -1000.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 3],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file, by its server on this machine (the package xllamacpp)."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, -1
        self.server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + "/tokenize", body, headers)
        return json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"]


def _trained_merges(texts: list[str], size: int) -> list[str]:
    """Merges across the borders of words, so that texts that are cut at other places have other ids."""
    import tokenizers
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return list({merge.replace(" ", ""): merge for merge in reversed(merges)}.values())[::-1]


def _trained_pieces(texts: list[str], size: int) -> list[str]:
    import tokenizers
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    spaced = [SPACE + text.replace(" ", SPACE) for text in texts]
    tokenizer.train_from_iterator(spaced, BpeTrainer(vocab_size=size, limit_alphabet=120, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    joined = [left + right for left, right in model["merges"]] + [SPACE * run for run in (2, 3, 4, 8)]
    return list(dict.fromkeys([*joined, *(token for token in model["vocab"] if len(token) == 1)]))


def _sentencepiece_model(texts: list[str], kind: str) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.encode("ascii", "ignore").decode().replace("\n", " ") for text in texts),
        model_writer=model,
        model_type=kind,
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=kind == "bpe",
        remove_extra_whitespaces=kind == "unigram",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def _sentencepiece_ids(texts: list[str], tried: list[str], kind: str) -> dict[str, Any]:
    import sentencepiece

    model = _sentencepiece_model(texts, kind)
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {"model": base64.b64encode(model).decode(), "ids": [judge.encode(text) for text in tried]}


def _record() -> dict[str, Any]:
    from layerskip_kernels.model.sources import default_model_path

    texts = random_texts(2000, seed=1) + RARE * 60
    merges, pieces = _trained_merges(texts, 900), _trained_pieces(texts, 700)
    tried = RARE + random_texts(40, seed=2, specials=SPECIALS + USER_DEFINED + [" returnx", "deff"])
    spm_tried = random_texts(40, seed=3, specials=["<tool>", "[INST]", "</s>", SPACE]) + [
        " " * n + "x" for n in range(1, 40)
    ]
    plain = random_texts(60, seed=5)
    own = random_texts(80, seed=4, specials=["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.gguf")

        def ids(vocabulary: dict[str, Any], texts: list[str], **settings: Any) -> list[list[int]]:
            judge = LlamaCpp(write_vocabulary(path, vocabulary, **settings))
            return [judge.encode(text) for text in texts]

        bpe = {pre: ids(bpe_vocabulary(merges, pre), tried) for pre in PRE_NAMES}
        spm = {name: ids(spm_vocabulary(pieces), spm_tried, **flags) for name, flags in SPM_FLAGS.items()}
        judge = LlamaCpp(default_model_path())
        smollm2 = [judge.encode(text) for text in own]
    return {
        "bpe": {"merges": merges, "texts": tried, "ids": bpe},
        "spm": {"pieces": pieces, "texts": spm_tried, "ids": spm},
        "smollm2": {"texts": own, "ids": smollm2},
        "sentencepiece": {
            "texts": plain,
            "models": {kind: _sentencepiece_ids(texts, plain, kind) for kind in ("bpe", "unigram")},
        },
    }


if __name__ == "__main__":
    # Printed before llama.cpp's threads are torn down with the process.
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in _record().items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
