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
from pipeline.core.runtime import compute_device, multiplies_fast
from pipeline.core.types import InputError
from pipeline.models.forward import logits
from pipeline.models.paths import model_folder

C = TypeVar("C", bound=ModelConfig)
Model = Any  # a transformers causal language model; its library leaves too much of it untyped to say more

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in a model folder."""
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def open_tokenizer(config: ModelConfig) -> tuple[Path, Any]:
    """From options to values: the local folder of a model, and its tokenizer."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    return folder, load_tokenizer(folder, trust_remote_code=config.trust_remote_code)


def settled(config: C) -> C:
    """The same options with `auto` made definite: what is recorded, hashed and run.

    Without instructions for it, a CPU multiplies bfloat16 at an eighth of float32's speed (measured on AVX2).
    """
    if config.dtype is Dtype.auto:
        is_fast = multiplies_fast(torch.bfloat16, compute_device())
        return dataclasses.replace(config, dtype=Dtype.bfloat16 if is_fast else Dtype.float32)
    dtype = config.dtype.name
    if not multiplies_fast(getattr(torch, dtype), compute_device()):
        log.warning("%s: this machine has no fast %s; dtype=float32 would be many times faster", config.path, dtype)
    return config


def check_trained_dtype(config: ModelConfig) -> None:
    """Refuse to train in float16 where DeepSpeed does not."""
    if config.dtype is Dtype.float16 and not multiplies_fast(torch.float16, compute_device()):
        raise InputError(
            "student.dtype: expected float32 or bfloat16 on a CPU without float16 instructions, found float16; "
            "use bfloat16, or a GPU"
        )


def open_model(config: ModelConfig, device: torch.device, partition: dict[str, Any] | None = None) -> Model:
    """From options to a value: the model they describe, on a device; in parts over the ranks with `partition`."""
    config = settled(config)
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


def skeleton(config: ModelConfig) -> Model:
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


def check_architecture(model: Model) -> None:
    """Refuse a model in which packed segments see each other or whose logits we do not know to make."""
    was_training = model.training
    model.eval()
    check_logits_path(model)
    check_packing(model)
    model.train(was_training)


def hidden_states(model: Model, input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, H] of packed segments that cannot see each other.

    Positions that restart, no attention mask and no cache: transformers then masks across segments.
    """
    decoder = model.get_decoder()
    return decoder(input_ids=input_ids_BS, position_ids=position_ids_BS, use_cache=False).last_hidden_state


@torch.no_grad()
def check_logits_path(model: Model) -> None:
    """Refuse an architecture whose own forward does something between hidden states and logits that we do not."""
    ids_BS = torch.arange(3, 11, device=model.device)[None] % model.config.vocab_size
    positions_BS = torch.arange(8, device=model.device)[None]
    theirs = model(input_ids=ids_BS, position_ids=positions_BS, use_cache=False).logits[0].float()
    hidden_BSH = hidden_states(model, ids_BS, positions_BS)
    ours = logits(model, hidden_BSH[0], theirs.shape[1]).float()
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):
        worst = (ours - theirs).abs().max().item()
        raise InputError(
            f"{type(model).__name__}: expected head(hidden) to equal the model's own logits, found a difference of "
            f"{worst:.3g}; teach pipeline/models/forward.py what this architecture does to its logits"
        )


@torch.no_grad()
def check_packing(model: Model) -> None:
    """Refuse an architecture (or attention kernel) in which one packed segment sees another.

    Two rows of three segments; the middle one changes, and the others must not, to the last bit. Models that do not
    mask by position ids (ALiBi, state spaces, positions of their own) fail here instead of training wrongly.
    """
    positions_S = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1], device=model.device)
    first_BS = (torch.arange(18, device=model.device).reshape(2, 9) * 7 + 3) % model.config.vocab_size
    second_BS = first_BS.clone()
    second_BS[:, 3:7] = (second_BS[:, 3:7] + 11) % model.config.vocab_size
    one, other = (hidden_states(model, ids_BS, positions_S.expand(2, -1)) for ids_BS in (first_BS, second_BS))
    outside = torch.tensor([0, 1, 2, 7, 8], device=model.device)
    if not torch.equal(one[:, outside], other[:, outside]):
        raise InputError(
            f"{type(model).__name__}: expected packed segments not to see each other, found that they do "
            f"(attention {model.config._attn_implementation}); try attention=sdpa or eager, or another architecture"
        )


def longest_sequence(folder: Path) -> int | None:
    """The positions that a model knows, or None if it does not say."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected a model in Hugging Face layout, found no config.json; check the path")
    config = json.loads((folder / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_window(folder: Path, window: int) -> None:
    """Refuse a window longer than the positions that a model knows."""
    longest = longest_sequence(folder)
    if longest is not None and window > longest:
        raise InputError(f"window: expected at most {longest} (the positions of {folder}), found {window}")


def vocabulary_size(tokenizer: Any) -> int:
    """The real vocabulary: the tokenizer's, not the padded number of rows that a head may have."""
    return len(tokenizer)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what turns text into ids: model, merges, added tokens, normalizer; not truncation or padding."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer: expected one with a tokenizer.json, found {type(tokenizer).__name__}")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return content_hash(state)


def text_rules(tokenizer: Any) -> dict[str, Any]:
    """What else decides how text becomes ids: part of a fingerprint, not of whether two models can share ids."""
    return {"chat_template": tokenizer.chat_template, "end_token_id": tokenizer.eos_token_id}


def check_same_tokenizer(teacher_hash: str, student_hash: str, *, cache: str, student: str) -> None:
    """Refuse a student whose token ids mean something else than the teacher's."""
    if teacher_hash != student_hash:
        raise InputError(
            f"tokenizer: expected {student} to have the teacher's tokenizer {teacher_hash[:12]} ({cache}), "
            f"found {student_hash[:12]}; use a teacher and a student of one family, or capture with another teacher"
        )


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
