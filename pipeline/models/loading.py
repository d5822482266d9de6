"""Teacher, student and tokenizer: load, compare, run to hidden states and logits, save for others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from pipeline.config.schema import Dtype, ModelConfig
from pipeline.core.files import content_hash, file_hash
from pipeline.core.progress import log
from pipeline.core.runtime import compute_device, has_fast_matmul
from pipeline.core.types import InputError
from pipeline.models.compatibility import check_architecture
from pipeline.models.forward import Model
from pipeline.models.paths import model_folder

C = TypeVar("C", bound=ModelConfig)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def resolve_dtype(config: C) -> C:
    """The same options with `auto` made definite: what is recorded, hashed and run.

    Without instructions for it, a CPU multiplies bfloat16 at an eighth of float32's speed (measured on AVX2).
    """
    if config.dtype is Dtype.auto:
        is_fast = has_fast_matmul(torch.bfloat16, compute_device())
        return dataclasses.replace(config, dtype=Dtype.bfloat16 if is_fast else Dtype.float32)
    dtype = config.dtype.name
    if not has_fast_matmul(getattr(torch, dtype), compute_device()):
        log.warning("%s: this machine has no fast %s; dtype=float32 would be many times faster", config.path, dtype)
    return config


def check_trained_dtype(config: ModelConfig) -> None:
    """Refuse to train in float16 where DeepSpeed does not."""
    if config.dtype is Dtype.float16 and not has_fast_matmul(torch.float16, compute_device()):
        raise InputError(
            "student.dtype: expected float32 or bfloat16 on a CPU without float16 instructions, found float16; "
            "use bfloat16, or a GPU"
        )


def open_model(config: ModelConfig, device: torch.device, partition: dict[str, Any] | None = None) -> Model:
    """From options to a value: the model they describe, on a device; in parts over the ranks with `partition`."""
    config = resolve_dtype(config)
    return load_model(
        model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code),
        dtype=config.dtype.name,
        device=device,
        attention=config.attention,
        num_layers=config.num_layers,
        trust_remote_code=config.trust_remote_code,
        partition=partition,
    )


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: torch.device,
    attention: str | None = None,
    num_layers: int | None = None,
    trust_remote_code: bool = False,
    partition: dict[str, Any] | None = None,
) -> Model:
    """The causal language model of a folder, cut to its first layers if asked; no weight is left random.

    Refuses an architecture in which packed segments see each other or whose logits we do not know to make. With
    `partition`, DeepSpeed's options at ZeRO 3, each rank keeps its part of every weight as it is read, and that check
    is left to the caller: such a model can run only inside an engine.
    """
    config = _architecture(folder, num_layers=num_layers, trust_remote_code=trust_remote_code)
    # while it lives, from_pretrained partitions
    partitioning = None if partition is None else transformers.integrations.HfDeepSpeedConfig(partition)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    model, loading = loaded
    if loading["missing_keys"] or loading["mismatched_keys"]:
        wrong = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
        raise InputError(f"{folder}: expected a weight for every parameter, found none that fits {wrong[:5]}")
    if partitioning is not None:
        return model.eval()
    model = model.to(device).eval()
    check_architecture(model)
    return model


def _architecture(folder: Path, *, num_layers: int | None, trust_remote_code: bool) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise InputError(f"num_layers: expected 1 to {config.num_hidden_layers} ({folder}), found {num_layers}")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    config.use_cache = False  # with a cache, packed segments would silently see each other
    return config


def meta_model(config: ModelConfig) -> Model:
    """The model that options describe, without weights: its modules and their names, on no device."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    trust = config.trust_remote_code
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            _architecture(folder, num_layers=config.num_layers, trust_remote_code=trust), trust_remote_code=trust
        )


def linear_layers(model: Model) -> list[str]:
    """The full names of a model's linear layers, GPT-2's transposed ones among them."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a folder and its config.json."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: expected weights as *.safetensors, found none; convert the model")
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(volatile, None)
    return content_hash([config, [file_hash(file) for file in files]])


def save_model(model: Model, state: dict[str, Tensor], tokenizer: Any, folder: Path, *, shard_bytes: int) -> None:
    """Write weights as safetensors with config and tokenizer, so that plain `from_pretrained` loads the folder."""
    model.config.use_cache = True
    # how to generate goes on as it came: many models say a temperature without do_sample, which transformers loads but
    # refuses to save, at the end of a long run
    generation, model.generation_config = model.generation_config, transformers.GenerationConfig()
    model.save_pretrained(folder, state_dict=state, max_shard_size=shard_bytes)
    generation.to_json_file(folder / "generation_config.json")
    model.config.use_cache, model.generation_config = False, generation
    tokenizer.save_pretrained(folder)
