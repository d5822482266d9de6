"""LoRA through peft: trained low-rank matrices next to frozen weights, exported merged into them and as an adapter.

Hu et al. 2021, arXiv 2106.09685: y = W x + s B A dropout(x) with s = alpha / rank, and B = 0 at the start. peft
replaces layers inside the student. The student's class, forward and module names stay, so no other code depends on
LoRA. peft is optional and takes seconds to import, so it is imported only where an adapter is used.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import AdapterConfig, StudentConfig
from pipeline.core.files import is_hub_name
from pipeline.core.progress import log
from pipeline.core.runtime import full_numel
from pipeline.core.types import InputError
from pipeline.models.forward import Model
from pipeline.models.loading import linear_layers, meta_model
from pipeline.models.paths import model_folder


def check_adapter(config: StudentConfig) -> None:
    """InputError if the adapter's options do not fit the student. Only its modules are built, no weight is read."""
    if config.adapter is not None:
        _insert(meta_model(config), config.adapter)


def add_adapter(student: Model, options: AdapterConfig, *, seed: int) -> None:
    """Freeze the student and insert the adapter's layers, in place; `seed` alone determines their initial weights."""
    torch.manual_seed(seed)
    adapted = _insert(student, options)
    kinds = sorted({name.split(".")[-1] for name in adapted})
    num_total = sum(full_numel(parameter) for parameter in student.parameters())
    num_trained = sum(full_numel(parameter) for parameter in student.parameters() if parameter.requires_grad)
    log.info(
        "adapter on %d layers (%s): %d of %d parameters are trained",
        *(len(adapted), ", ".join(kinds), num_trained, num_total),
    )


def merge_adapter(config: StudentConfig, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write the adapter to `folder` in peft's format; returns the student's weights with the adapter merged in.

    `weights` is the complete state dict of a student with its adapter; it is not changed. They are loaded into a model
    on the meta device, so that peft itself names, writes and merges them, in the same way at every ZeRO stage.
    """
    import peft

    assert config.adapter is not None
    student = meta_model(config)
    lora_config = _lora_config(student, config.adapter)
    fully_trained = _fully_trained_modules(student, config.adapter)
    lora_config.modules_to_save, lora_config.revision = fully_trained or None, config.revision
    with warnings.catch_warnings():
        # about fully trained tied matrices; they are correct because they are written twice
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        adapted = peft.get_peft_model(student, lora_config, autocast_adapter_dtype=False)
    base_folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    lora_config.base_model_name_or_path = config.path if is_hub_name(config.path) else str(base_folder.resolve())
    state = {}
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        # peft keeps the original of a fully trained module too; it has to be loaded, though it is never read
        places = (".original_module", ".modules_to_save.default") if module in fully_trained else ("",)
        for place in places:
            state[f"base_model.model.{module}{place}.{last}"] = weight
    adapted.load_state_dict(state, assign=True)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's template, with nothing filled in
    return dict(adapted.merge_and_unload(safe_merge=True).state_dict())


def _insert(student: Model, options: AdapterConfig) -> list[str]:
    """Insert peft's layers into the student and mark what is trained; the names of the layers with an adapter."""
    import peft

    lora_config, fully_trained = _lora_config(student, options), _fully_trained_modules(student, options)
    peft.inject_adapter_in_model(lora_config, student)
    for name in fully_trained:
        # trained in place: peft would train a copy, and a tied matrix would become two
        student.get_submodule(name).requires_grad_(True)
    return [name for name, module in student.named_modules() if hasattr(module, "lora_A")]


def _lora_config(student: Model, options: AdapterConfig) -> Any:
    """peft's LoraConfig; InputError if the targets are not in this student or include a head that cannot have one."""
    import peft

    targets = options.targets or []
    linear_names = linear_layers(student)
    for target in targets:
        if not any(_matches(name, target) for name in linear_names):
            present = ", ".join(sorted({name.split(".")[-1] for name in linear_names})) or "none"
            raise InputError(
                f"student.adapter.targets: expected the ends of names of linear layers, found {target!r}; "
                f"{type(student).__name__} has {present}"
            )
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if any(_matches(_name_of(student, head), target) for target in targets):
        if head.weight is embeddings.weight:
            raise InputError(
                "student.adapter.targets: expected layers without the head, because its matrix is also the embeddings, "
                f"which would change with it, found {targets}; leave the head out (train_embeddings=true with "
                "train_head=true trains its full weight)"
            )
        if options.train_head:
            raise InputError(
                "student.adapter.targets: expected layers without the head, because train_head trains its full weight, "
                f"found {targets}; leave the head out, or set train_head=false"
            )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets or "all-linear",
        use_rslora=options.rslora,
        use_dora=options.dora,
    )


def _matches(name: str, target: str) -> bool:
    """Whether a target is the end of a module's full name: mlp.down_proj is one of model.layers.0.mlp.down_proj."""
    return f".{name}".endswith(f".{target}")


def _fully_trained_modules(student: Model, options: AdapterConfig) -> list[str]:
    """The names of the modules whose full weight is trained, next to the adapter: embeddings, head, both or none."""
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is embeddings.weight and options.train_embeddings != options.train_head:
        raise InputError(
            "student.adapter: expected train_embeddings and train_head to be equal, because they are one matrix in "
            f"this {type(student).__name__}, found {options.train_embeddings} and {options.train_head}; set both alike"
        )
    names = []
    if options.train_embeddings:
        names.append(_name_of(student, embeddings))
    if options.train_head:
        names.append(_name_of(student, head))
    return names


def _name_of(student: Model, module: torch.nn.Module) -> str:
    """The full name of a module of the student."""
    return next(name for name, candidate in student.named_modules() if candidate is module)
