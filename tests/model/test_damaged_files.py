"""Hundreds of damaged files of each kind: each is read, or refused by name, shortly and in time; nothing hangs.

More of them in `make fuzz`. A failure prints the file's number, from which ``damaged`` makes it
again.
"""

import base64
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from layerskip_kernels import PagedKVCache, load_model
from layerskip_kernels.evaluation.prompts import example_prompts
from layerskip_kernels.model.draft_vocab import read_draft_vocab
from layerskip_kernels.model.exit_adapter import quantise_exit_adapter, write_exit_adapter
from layerskip_kernels.model.tokenizer import Tokenizer
from support.checkpoint_files import HF_CONFIG, random_tensors, write_directory
from support.damage import Kind, check_damaged, damaged_bytes, damaged_json
from support.exit_adapters import random_adapter
from support.gguf_files import write_parts
from support.models import tiny_model
from support.vocabularies import RECORDED

RICH_CONFIG = {
    **{"head_dim": 16, "hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "rope_theta": 1e4},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    "original_max_position_embeddings": 64,
    **{"torch_dtype": "float32", "use_cache": True, "layer_types": ["full_attention"] * 2, "pretraining_tp": 1},
}


def _model(folder: Path) -> None:
    write_directory(folder, **RICH_CONFIG)


def _config(folder: Path) -> Path:
    _model(folder)
    return folder / "config.json"


def _weights(folder: Path) -> Path:
    _model(folder)
    return folder / "model.safetensors"


def _index(folder: Path) -> Path:
    tensors = write_directory(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    shard_of = {name: shard for shard, part in shards.items() for name in part}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
    return path


def _written(name: str, contents: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        _model(folder)
        (folder / name).write_text(json.dumps(contents))
        return folder / name

    return make


def _tokenizer(folder: Path) -> Path:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["abc abd abe the cat sat on the mat"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _tokenizer_config(folder: Path) -> Path:
    _tokenizer(folder)
    _model(folder)
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    added = {"0": {"content": "<s>", "special": True}, "1": {"content": "</s>", "special": True}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template, "eos_token_id": 1}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings | {"added_tokens_decoder": added, "model_max_length": 10**30}))
    return path


def _chat_template(folder: Path) -> Path:
    path = _tokenizer_config(folder).with_name("chat_template.jinja")
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}")
    return path


def _converse(path: Path) -> None:
    tokenizer = Tokenizer.from_directory(path.parent)
    if tokenizer is not None and tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])


def _sentencepiece(folder: Path) -> Path:
    folder.mkdir()
    models = json.loads(RECORDED.read_text())["sentencepiece"]["models"]
    (folder / "tokenizer.model").write_bytes(base64.b64decode(models["bpe"]["model"]))
    return folder / "tokenizer.model"


def _added_tokens(folder: Path) -> Path:
    path = _sentencepiece(folder).with_name("added_tokens.json")
    size = Tokenizer.from_directory(folder).vocab_size
    path.write_text(json.dumps({"<a>": size, "<b>": size + 1}))
    return path


def _prompts(folder: Path) -> Path:
    _written("layerskip.json", DEFAULTS | {"prompts": "prompts.jsonl"})(folder)
    path = folder / "prompts.jsonl"
    path.write_text('"once"\n\n{"prompt": "upon\\u2028a", "task_id": "time"}\r\n')
    return path


def _exit_adapter(folder: Path) -> Path:
    """Beside a model's layerskip.json, as `layerskip adapt` leaves it."""
    _model(folder)
    model = load_model(folder)
    return write_exit_adapter(folder, 1, random_adapter(model), model.name, model.weights)


def _quantised_exit_adapter(folder: Path) -> Path:
    quantise_exit_adapter(_exit_adapter(folder), folder, "q8_0")
    return folder / "exit_adapter.safetensors"


def _adapter_defaults(folder: Path) -> Path:
    """The model is the one in the folder above."""
    if not (folder.parent / "model").exists():
        _model(folder.parent / "model")
    folder.mkdir()
    model = load_model(folder.parent / "model")
    write_exit_adapter(folder, 1, random_adapter(model), model.name, model.weights)
    (folder / "layerskip.json").write_text(json.dumps(DEFAULTS))
    return folder / "layerskip.json"


def _use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_directory(path.parent)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("the cat sat on a mat, abc \N{SNOWMAN}"))


def _adapter(folder: Path) -> Path:
    base = folder.parent / "base"
    if not base.exists():
        _model(base)
    folder.mkdir()
    settings = {
        **{"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"},
        **{"rank_pattern": {r"layers\.(0|1)\.\w+\.q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
        **{"target_modules": ["q_proj"], "init_lora_weights": True, "lora_dropout": 0.1, "modules_to_save": None},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder / "adapter_config.json"


def _gguf(folder: Path) -> Path:
    """Without a vocabulary: half a minute each, otherwise."""
    folder.mkdir()
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"embedding_length": 64, "feed_forward_length": 160, "block_count": 2, "context_length": 128}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2}
    for key, value in (sizes | heads).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("general.tags", ["a", "b"])
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.", "self_attn.": "attn_"}
    names |= {"mlp.": "ffn_", "_proj": "", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.token": "token", "attn_o.": "attn_output."}
    for name, tensor in random_tensors(HF_CONFIG).items():
        for hf, ggml in names.items():
            name = name.replace(hf, ggml)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODEL = tiny_model(torch.float32)
CACHE = PagedKVCache(MODEL, 4, 16)
TOKENS = list(range(1, 20))


def _swap(folder: Path) -> Path:
    folder.mkdir()
    sequence = CACHE.add_sequence(TOKENS)
    CACHE.pool.append([sequence.id], [19])
    CACHE.pool.raise_rows([sequence.id], [19], CACHE.pool.num_layers)
    CACHE.pool.commit([sequence.id], [19])
    for tensor in CACHE.tensors:
        tensor.fill_(0.5)
    path = CACHE.swap_out(sequence, folder / "sequence.kv")
    CACHE.free(sequence)
    return Path(path)


def _swap_in(path: Path) -> None:
    sequence = CACHE.add_sequence(TOKENS)
    try:
        CACHE.swap_in(sequence, path)
    finally:
        CACHE.free(sequence)
        CACHE.check_integrity()


def _head(size: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda raw, rng: damaged_bytes(raw, rng, size)


def _load(path: Path) -> object:
    return load_model(path.parent)


def _gguf_part(folder: Path) -> Path:
    """The second of two, in which tensors are."""
    return write_parts(_gguf(folder), 2)[1]


def _load_parts(path: Path) -> object:
    return load_model(path.with_name(path.name.replace("00002-of", "00001-of")))


def _load_exit_adapter(path: Path) -> object:
    return load_model(path.parent, exit_adapter=path)


DEFAULTS = {"exit_layer": 1, "num_speculations": 3, "draft_vocab": [3, 5, 7]}
STOPS = {"eos_token_id": [2, 7], "bos_token_id": 1, "temperature": 0.7, "transformers_version": "5.0.0"}
KINDS = {
    "config": Kind(_config, damaged_json, _load),
    "generation_config": Kind(_written("generation_config.json", STOPS), damaged_json, _load),
    "defaults": Kind(_written("layerskip.json", DEFAULTS), damaged_json, _load),
    "safetensors": Kind(_weights, _head(3000), _load),
    "index": Kind(_index, damaged_json, _load),
    "adapter_config": Kind(_adapter, damaged_json, _load),
    "adapter_weights": Kind(lambda folder: _adapter(folder).with_name("adapter_model.safetensors"), _head(300), _load),
    "draft_vocab": Kind(_written("draft_vocab.json", [1, 2, 3]), damaged_json, read_draft_vocab),
    "tokenizer_config": Kind(_tokenizer_config, damaged_json, _load),
    "tokenizer": Kind(_tokenizer, damaged_json, _use_tokenizer),
    "chat_template": Kind(_chat_template, damaged_bytes, _converse),
    "tokenizer_model": Kind(_sentencepiece, _head(300), _use_tokenizer),
    "added_tokens": Kind(_added_tokens, damaged_json, _use_tokenizer),
    "prompts": Kind(_prompts, damaged_bytes, lambda path: example_prompts(path.parent)),
    "exit_adapter": Kind(_exit_adapter, _head(1200), _load_exit_adapter),
    "quantised_exit_adapter": Kind(_quantised_exit_adapter, _head(1200), _load_exit_adapter),
    "adapter_defaults": Kind(
        _adapter_defaults,
        damaged_json,
        lambda path: load_model(path.parents[1] / "model", exit_adapter=path.parent),
    ),
    "gguf_part": Kind(_gguf_part, _head(600), _load_parts),
    "gguf": Kind(_gguf, _head(1500), load_model),
    "swap": Kind(_swap, damaged_bytes, _swap_in),
}


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, one_thread: None, kind: str):
    after = (lambda: shutil.rmtree(tmp_path / "cache", ignore_errors=True)) if "gguf" in kind else None
    check_damaged(kind, KINDS[kind], tmp_path / kind, after)


def test_a_lone_surrogate_names_no_token(tmp_path: Path):
    path = _tokenizer_config(tmp_path / "model")
    path.write_text('{"eos_token": "\\ud800"}')
    assert load_model(path.parent).config.eos_token_ids == (2,)
