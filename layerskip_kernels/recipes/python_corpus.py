"""Python source of the standard library and of installed packages under permissive licences, as training text.

    python -m layerskip_kernels.recipes.python_corpus OUTPUT [ROOT ...]

writes OUTPUT/train.jsonl, OUTPUT/validation.jsonl ({"text", "source"} a line) and OUTPUT/sources.json (each
distribution's version, licence and share). ROOT: folders of packages (site-packages) or of a standard library;
default: those of this Python. A text is either a whole file or one function with its docstring and the imports it
needs: the shape of a HumanEval problem.
"""

import argparse
import ast
import email.parser
import hashlib
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from layerskip_kernels.evaluation.prompts import human_eval_prompts

__all__ = ["Distribution", "distributions", "documents", "functions_with_docstrings", "write_corpus"]

PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|HPND)\b", re.IGNORECASE)
OTHER = re.compile(r"GPL|MPL|Mozilla|EUPL|CDDL|Proprietary|Commercial|CC-BY|NonCommercial", re.IGNORECASE)
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
}
SKIPPED_DISTRIBUTIONS = {"human-eval", "human_eval"}  # what the model is measured on
MAX_FILE, MAX_FUNCTION, MIN_FUNCTION = 100_000, 2_500, 120  # characters
# Characters of one distribution: the large ones would be half of the corpus, and functions are what is asked for.
MAX_SHARE = {"function": 1_500_000, "file": 200_000}
VALIDATION_SHARE = 0.01


@dataclass(frozen=True)
class Distribution:
    """A package, or a standard library: name, version, licence as its metadata says, and its Python files."""

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[Path, ...]


def distributions(roots: list[Path]) -> list[Distribution]:
    """The permissively licensed distributions under the roots, the newest version of each name."""
    newest: dict[str, Distribution] = {}
    for root in roots:
        for found in _standard_library(root) if (root / "ast.py").is_file() else _packages(root):
            known = newest.get(found.name)
            if known is None or _version_key(found.version) > _version_key(known.version):
                newest[found.name] = found
    return sorted(newest.values(), key=lambda distribution: distribution.name)


def _version_key(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:4]]


def _standard_library(root: Path) -> Iterator[Distribution]:
    version = root.name.removeprefix("python")
    yield Distribution("python standard library", version, "PSF-2.0", root, tuple(_python_files(root)))


def _packages(root: Path) -> Iterator[Distribution]:
    for info in sorted(root.glob("*.dist-info")):
        if not (info / "METADATA").is_file() or not (info / "RECORD").is_file():
            continue
        metadata = email.parser.Parser().parsestr((info / "METADATA").read_text(encoding="utf-8", errors="replace"))
        name, licence = metadata["Name"].lower(), licence_of(metadata)
        if licence is None or name in SKIPPED_DISTRIBUTIONS:
            continue
        names = (line.split(",")[0] for line in (info / "RECORD").read_text(encoding="utf-8").split("\n"))
        files = [root / path for path in names if path.endswith(".py") and not set(Path(path).parts) & SKIPPED_FOLDERS]
        yield Distribution(name, metadata["Version"], licence, root, tuple(sorted(f for f in files if f.is_file())))


def licence_of(metadata: email.message.Message) -> str | None:
    """The licence that a distribution's metadata names, when it is a permissive one and nothing else."""
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    first_line = (metadata["License"] or "").strip().split("\n")[0]
    named = metadata["License-Expression"] or "; ".join(classifiers) or first_line[:80]
    return named if PERMISSIVE.search(named) and not OTHER.search(named) else None


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not set(path.relative_to(root).parts) & SKIPPED_FOLDERS:
            yield path


def documents(distribution: Distribution) -> Iterator[tuple[str, str]]:
    """("file", text) and ("function", text with its docstring); nothing that does not parse or is mostly data."""
    for path in distribution.files:
        try:
            text = path.read_text(encoding="utf-8").expandtabs(4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        if len(text) <= MAX_FILE and not _is_data(text):
            yield "file", text.strip() + "\n"
        for function in functions_with_docstrings(text, tree):
            yield "function", function


def _is_data(text: str) -> bool:
    digits = sum(character.isdigit() for character in text)
    return not text.strip() or digits > 0.15 * len(text) or max(map(len, text.splitlines())) > 400


def functions_with_docstrings(text: str, tree: ast.Module) -> Iterator[str]:
    """Each function of a module that has a docstring, dedented, after the module's imports that it uses."""
    lines = text.splitlines()
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or node.end_lineno is None:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        body = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        if MIN_FUNCTION <= len(body) <= MAX_FUNCTION and len(node.body) > 1:
            yield _imports_for(node, imports) + body + "\n"


def _imports_for(node: ast.FunctionDef, imports: list[ast.Import | ast.ImportFrom]) -> str:
    used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    lines = []
    for statement in imports:
        names = [alias for alias in statement.names if (alias.asname or alias.name).split(".")[0] in used]
        if names and not (isinstance(statement, ast.ImportFrom) and statement.level):
            kept = (
                ast.Import(names) if isinstance(statement, ast.Import) else ast.ImportFrom(statement.module, names, 0)
            )
            lines.append(ast.unparse(kept))
    return "\n".join(lines) + "\n\n\n" if lines else ""


def write_corpus(output: Path, roots: list[Path], seed: int = 0) -> None:
    """Write train.jsonl, validation.jsonl and sources.json: no text twice, none with a line of a HumanEval problem."""
    forbidden, seen = _human_eval_lines(), set[bytes]()
    texts: list[tuple[str, str]] = []
    shares: dict[str, dict[str, object]] = {}
    for distribution in tqdm(distributions(roots), desc="Reading", unit="package"):
        found = list(documents(distribution))
        random.Random(seed).shuffle(found)
        left = dict(MAX_SHARE)
        for kind, text in found:
            key = hashlib.sha256(re.sub(r"\s+", "", text).encode()).digest()
            if key in seen or left[kind] < len(text) or not forbidden.isdisjoint(map(str.strip, text.splitlines())):
                continue
            seen.add(key)
            texts.append((distribution.name, text))
            left[kind] -= len(text)
        if characters := sum(MAX_SHARE.values()) - sum(left.values()):
            fields = {"version": distribution.version, "licence": distribution.licence, "characters": characters}
            shares[distribution.name] = fields
    _write(output, texts, shares, seed)


def _human_eval_lines() -> set[str]:
    lines = {line.strip() for _, prompt in human_eval_prompts() for line in prompt.splitlines()}
    return {line for line in lines if len(line) >= 30 and not line.startswith(("from ", "import "))}


def _write(output: Path, texts: list[tuple[str, str]], shares: dict[str, dict[str, object]], seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    random.Random(seed).shuffle(texts)
    num_validation = max(1, int(VALIDATION_SHARE * len(texts)))
    for name, part in (("validation", texts[:num_validation]), ("train", texts[num_validation:])):
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for source, text in part:
                file.write(json.dumps({"text": text, "source": source}) + "\n")
    (output / "sources.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Permissively licensed Python source as training text.")
    parser.add_argument("output", type=Path)
    parser.add_argument("roots", type=Path, nargs="*")
    args = parser.parse_args()
    defaults = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    write_corpus(args.output, args.roots or defaults)


if __name__ == "__main__":
    main()
