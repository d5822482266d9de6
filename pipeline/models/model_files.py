"""The files of a model folder: complete and readable before anything is computed from them, and their hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.core.files import content_hash, file_hash
from pipeline.core.types import InputError

LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that git-lfs has not downloaded
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def check_model_files(folder: Path) -> None:
    """InputError if a folder is no complete causal language model; of the weights only the headers are read."""
    config = read_model_config(folder)
    if "text_config" in config:
        raise InputError(
            f"{folder}: expected a language model, found {config.get('model_type')}, whose language model is a part "
            "(text_config in config.json); load that part with transformers and save it to a folder of its own"
        )
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: expected complete weights, found an adapter (adapter_config.json), which transformers applies "
            "only where peft is installed; merge it into its base model (peft: merge_and_unload), or move it elsewhere"
        )
    for file in weight_files(folder):
        _check_safetensors(file)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder; InputError if there is none, or none that can be read."""
    path = folder / "config.json"
    if not path.exists():
        inner = folder / "model"  # of a run
        advice = f"give {inner}" if (inner / "config.json").exists() else "check the path"
        raise InputError(f"{folder}: expected a model in Hugging Face layout, found no config.json; {advice}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found none ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found another value; download the model again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers reads the weights; InputError if one is missing."""
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: expected weights as *.safetensors, found none; convert the model")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: expected model.safetensors or {index.name}, found neither; rename or convert it"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{index}: expected a weight_map, found none that can be read; download the model again"
        ) from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{index}: expected {len(names)} files of weights beside it, found {len(names) - len(missing)} (without "
            f"{missing[0]}); download the model again"
        )
    return [folder / name for name in names]


def _check_safetensors(path: Path) -> None:
    """InputError unless a file is as long as its header describes.

    The format: length of the header (8 bytes, little endian), header (JSON: name -> dtype, shape, data_offsets), data.
    """
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        found = path.stat().st_size
        if first == LFS_POINTER[:8]:
            raise InputError(
                f"{path}: expected weights, found a pointer of git-lfs; run git lfs pull, or download the model again"
            )
        try:
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise InputError(
                f"{path}: expected a header of safetensors, found none ({found} bytes); download the model again"
            ) from None
    if found != expected:
        raise InputError(
            f"{path}: expected {expected} bytes, as its header describes, found {found}; download the model again"
        )


def tensor_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The name and size of each tensor in a folder's weight files, from their headers alone."""
    sizes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        _check_safetensors(path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return sizes


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a folder and its config.json."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: expected weights as *.safetensors, found none; convert the model")
    config = read_model_config(folder)
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(volatile, None)
    return content_hash([config, [file_hash(file) for file in files]])


def code_hash(folder: Path, *, trust_remote_code: bool) -> dict[str, str]:
    """{"remote_code": sha256 of the Python files of a model folder}, or {} where none of them is run.

    InputError if the folder names code that lies in another repository: it could change without a word.
    """
    files = sorted(folder.rglob("*.py")) if trust_remote_code else []
    if trust_remote_code:
        for name in ("config.json", "tokenizer_config.json"):
            if (folder / name).exists() and "--" in str(json.loads((folder / name).read_text()).get("auto_map", "")):
                raise InputError(
                    f"{folder / name}: auto_map: expected code in the same folder, found code of another repository "
                    "(OWNER/NAME--FILE); copy its *.py files into a copy of the folder, and remove OWNER/NAME--"
                )
    return {"remote_code": content_hash([[str(f.relative_to(folder)), file_hash(f)] for f in files])} if files else {}
