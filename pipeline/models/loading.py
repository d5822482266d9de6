"""Models: choose the dtype, load and check, list their linear layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from pipeline.config.schema import Dtype, ModelConfig
from pipeline.core.progress import log
from pipeline.core.runtime import compute_device, has_fast_matmul
from pipeline.core.types import InputError
from pipeline.models.forward import Model
from pipeline.models.kernel_choice import settle_attention
from pipeline.models.model_files import check_model_files
from pipeline.models.paths import model_folder

C = TypeVar("C", bound=ModelConfig)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def resolve_dtype(config: C) -> C:
    """The same options with `dtype=auto` replaced by the dtype for this machine: what is recorded, hashed and run.

    A CPU without fast bfloat16 instructions multiplies it at an eighth of float32's speed (measured on AVX2).
    """
    if config.dtype is Dtype.auto:
        is_fast = has_fast_matmul(torch.bfloat16, compute_device())
        return dataclasses.replace(config, dtype=Dtype.bfloat16 if is_fast else Dtype.float32)
    dtype = config.dtype.name
    if not has_fast_matmul(getattr(torch, dtype), compute_device()):
        log.warning("%s: %s is slow on this machine; dtype=float32 would be faster", config.path, dtype)
    return config


def check_trained_dtype(config: ModelConfig) -> None:
    """InputError for training in float16 on a machine where DeepSpeed does not support it."""
    if config.dtype is Dtype.float16 and not has_fast_matmul(torch.float16, compute_device()):
        raise InputError(
            "student.dtype: expected float32 or bfloat16 on a CPU without float16 instructions, found float16; "
            "use bfloat16, or a GPU"
        )


def open_model(config: ModelConfig, device: torch.device, partition: dict[str, Any] | None = None) -> Model:
    """Load the model that options describe; `partition` as in `load_model`."""
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
    """Load a causal language model from a folder; with `num_layers` only its first layers.

    InputError if a file or the weight of a parameter is missing, or if `check_architecture` rejects the model.
    `partition` is DeepSpeed's config at ZeRO 3: each rank then keeps only its part of every weight. Such a model can
    run only inside an engine, so the caller has to call `check_architecture` there.
    """
    check_model_files(folder)
    config = load_config(folder, num_layers=num_layers, trust_remote_code=trust_remote_code)
    # straight to a GPU, in the type that is asked for: the weights are never whole in host memory
    place = None if device.type == "cpu" or partition is not None else {"": device}
    # from_pretrained partitions the weights as long as this object exists
    partitioning = None if partition is None else transformers.integrations.HfDeepSpeedConfig(partition)
    model_and_report: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        device_map=place,
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    model, report = model_and_report
    if report["missing_keys"] or report["mismatched_keys"]:
        without_weight = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        raise InputError(
            f"{folder}: expected a weight for every parameter, found none that fits {without_weight[:5]}; save or "
            "download the model again"
        )
    if partitioning is not None:
        return model.eval()
    model = model.to(device).eval()
    settle_attention(model, attention)
    return model


def load_config(folder: Path, *, num_layers: int | None, trust_remote_code: bool) -> Any:
    """The config of a folder's model, with `num_layers` of its first layers only."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise InputError(
                f"num_layers: expected 1 to {config.num_hidden_layers} ({folder}), found {num_layers}; choose fewer, "
                "or null for all"
            )
        config.num_hidden_layers = num_layers
        if len(getattr(config, "layer_types", None) or []) > num_layers:  # in some configs it follows by itself
            config.layer_types = config.layer_types[:num_layers]
    config.use_cache = False  # with a KV cache, packed segments would attend to each other without any error
    return config


def meta_model(config: ModelConfig) -> Model:
    """The model that options describe without its weights, on the meta device: only modules, names and shapes."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    trust = config.trust_remote_code
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            load_config(folder, num_layers=config.num_layers, trust_remote_code=trust), trust_remote_code=trust
        )


def linear_layers(model: Model) -> list[str]:
    """The full names of a model's linear layers, including GPT-2's transposed ones (Conv1D)."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]
