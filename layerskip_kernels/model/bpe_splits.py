"""How byte-level BPE vocabularies cut a text before merging, by the names that GGUF files give (tokenizer.ggml.pre).

Names, patterns and defaults are llama.cpp's (src/llama-vocab.cpp), patterns in the syntax of the `tokenizers` library.
Each pattern cuts what the one before left, into its matches and what lies between them.
"""

from dataclasses import dataclass

__all__ = ["BPE_SPLITS", "BpeSplit"]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{SYMBOLS}|{SPACES}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
)
# Letters of which the first are not lower case and the last not upper case, as far as ASCII goes.
UPPER, LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{u}*{l}+{end}|[^\r\n\p{{L}}\p{{N}}]?{u}+{l}*{end}"
SLASHED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{CASED.format(u=UPPER, l=LOWER, end='')}|\p{{N}}|{SLASHED_SYMBOLS}|{SPACES}"
GPT4O = rf"{CASED.format(u=UPPER, l=LOWER, end=CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{SLASHED_SYMBOLS}|{SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"(?:(?!\s)[一-龥\x{0800}-一가-\x{D7FF}])+", r"\p{N}")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
SEED_CODER = (rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)
DIGITS_FIRST = (r"\p{N}", GPT2)


@dataclass(frozen=True)
class BpeSplit:
    """``patterns``, one after the other; ``add_bos``: whether BOS comes first where the file does not say;
    ``ignore_merges``: a piece that is a token as a whole is taken as such, whatever the merges lead to."""

    patterns: tuple[str, ...]
    add_bos: bool = False
    ignore_merges: bool = False


def _all(names: str, split: BpeSplit) -> dict[str, BpeSplit]:
    return dict.fromkeys(names.split(), split)


BPE_SPLITS: dict[str, BpeSplit] = {
    **_all("default", BpeSplit(DEFAULT)),
    **_all(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        BpeSplit((LLAMA3,), add_bos=True, ignore_merges=True),
    ),
    **_all("dbrx smaug-bpe chatglm-bpe glm4", BpeSplit((LLAMA3,))),
    **_all("minicpm5", BpeSplit((r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")), ignore_merges=True)),
    **_all("tekken", BpeSplit((TEKKEN,), add_bos=True, ignore_merges=True)),
    **_all("gpt-4o llama4 kanana2", BpeSplit((GPT4O,))),
    **_all(
        "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo bailingmoe bailingmoe2 llada-moe",
        BpeSplit((QWEN2,)),
    ),
    **_all("qwen35", BpeSplit((QWEN35,))),
    **_all("gpt-2 phi-2 gigachat mpt olmo jais trillion a.x-4.0 mellum exaone4", BpeSplit((GPT2,))),
    **_all("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", BpeSplit(DIGITS_FIRST)),
    **_all("deepseek-v3 hunyuan-dense joyai-llm", BpeSplit(DEEPSEEK3)),
    **_all("deepseek-coder", BpeSplit(DEEPSEEK_CODER)),
    **_all("falcon", BpeSplit(FALCON)),
    **_all("seed-coder", BpeSplit(SEED_CODER)),
}
