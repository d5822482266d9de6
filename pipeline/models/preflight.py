"""Checks of a model that need none of its weights: they stop a run before its texts are tokenized."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from pipeline.config.schema import ModelConfig
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.models.compatibility import check_architecture
from pipeline.models.forward import Model
from pipeline.models.kernel_choice import settle_attention, use_fastest_attention
from pipeline.models.loading import load_config, meta_model, resolve_dtype
from pipeline.models.model_files import check_model_files
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import vocabulary_size

SMALL_VOCABULARY, SMALL_WIDTH = 64, 64
MAX_SMALL_PARAMETERS = 1_000_000_000  # 4 GB
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")


def check_model(config: ModelConfig, tokenizer: Any) -> None:
    """InputError if files are missing, the head is too small for the tokenizer, or the architecture does not fit."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    check_model_files(folder)
    try:
        head = meta_model(config).get_output_embeddings()
    except InputError:
        raise
    except Exception as error:  # whatever transformers, or the model's own code, raises
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{folder}: expected a causal language model that transformers can build, found: {reason}; use another "
            "model, or another version of transformers"
        ) from error
    rows, added = None if head is None else head.weight.shape[0], tokenizer.get_added_vocab()
    size = max((token for name, token in tokenizer.get_vocab().items() if name not in added), default=0) + 1
    if rows is not None and vocabulary_size(tokenizer) > rows >= size:  # markers of images, for example
        beyond = sorted(name for name, token in added.items() if token >= rows)
        log.info("%s: added tokens without a row in the head, which no text may contain: %s", folder, beyond)
    if rows is None or rows < size:
        raise InputError(
            f"{folder}: expected a head with at least {size} rows, because the tokenizer has ids up to {size - 1}, "
            f"found {rows or 'no head'}; give the model and the tokenizer that belong together"
        )
    _check_small(config)


def _check_small(config: ModelConfig) -> None:
    """Check the architecture on a small copy of the model; what cannot be checked like this is checked at loading."""
    if config.attention not in (None, "sdpa", "eager", "sdpa_segments", "eager_segments"):
        # other kernels need a GPU, and a driver that uses one would hold a part of its memory until the run ends
        log.info("%s: attention=%s is checked when the weights are loaded", config.path, config.attention)
        return
    try:
        model = small_model(config)
        if config.attention is None:
            use_fastest_attention(model)
        else:
            check_architecture(model)
    except InputError:
        raise
    except Exception as error:  # of a copy that is too small, or of a kernel that does not run here
        reason = str(error).strip().split("\n")[0]
        log.info("%s: its architecture is checked only when its weights are loaded (%s)", config.path, reason)


def attention_of_copy(config: ModelConfig, device: torch.device) -> str | None:
    """The fastest kernel with which a small copy of the model passes the checks; None if it cannot be built.

    For models whose parts lie on several ranks: with them, no forward may fail.
    """
    config = resolve_dtype(config)
    try:
        model = small_model(config).to(device=device, dtype=getattr(torch, config.dtype.name))
        settle_attention(model, None)
    except InputError:
        raise
    except Exception as error:
        log.info("%s: attention as transformers chooses (%s)", config.path, str(error).strip().split("\n")[0])
        return None
    return str(model.config._attn_implementation)


def small_model(config: ModelConfig) -> Model:
    """A copy of a model with few layers, a small vocabulary, narrow MLPs and random weights, in float32 on the CPU."""
    small = small_config(config)
    options = {"attn_implementation": config.attention, "trust_remote_code": config.trust_remote_code}
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(small, **options)
    num_parameters = sum(parameter.numel() for parameter in empty.parameters())
    if num_parameters > MAX_SMALL_PARAMETERS:
        raise ValueError(f"two layers have {num_parameters} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32, **options)


def small_config(config: ModelConfig) -> transformers.PretrainedConfig:
    """The config of a small copy of a model, with at least one layer of each type."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    whole = load_config(folder, num_layers=config.num_layers, trust_remote_code=config.trust_remote_code)
    layer_types = getattr(whole, "layer_types", None) or ["all"] * whole.num_hidden_layers
    num_layers = max(2, *(layer_types.index(kind) + 1 for kind in layer_types))
    num_layers = min(num_layers, whole.num_hidden_layers)
    small = load_config(folder, num_layers=num_layers, trust_remote_code=config.trust_remote_code)
    small.vocab_size = SMALL_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    for name in WIDTHS:
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, SMALL_WIDTH)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small
