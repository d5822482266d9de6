"""LoRA through peft: small trained matrices beside frozen weights; merged into them, and alone, when a run ends.

Hu et al. 2021, arXiv 2106.09685: y = W x + s B A dropout(x) with s = alpha / rank, and B = 0 at the start. peft puts
its layers inside the student, whose class, forward and module names stay, so that nothing else has to know of them. It
is imported where an adapter is asked for: it is optional, and takes seconds.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import AdapterConfig, StudentConfig
from pipeline.core.progress import log
from pipeline.core.runtime import full_numel
from pipeline.core.types import InputError
from pipeline.models import loading as models
from pipeline.models.forward import Model
from pipeline.models.paths import is_hub_name, model_folder


def check_adapter(config: StudentConfig) -> None:
    """Refuse an adapter that does not fit the student, by its modules alone: no weight is read."""
    if config.adapter is not None:
        _insert(models.meta_model(config), config.adapter)


def add_adapter(student: Model, options: AdapterConfig, *, seed: int) -> None:
    """Freeze the student and put the adapter's layers into it; the seed alone decides how they begin, on every rank."""
    torch.manual_seed(seed)
    layers = _insert(student, options)
    sizes = [(full_numel(p), p.requires_grad) for p in student.parameters()]
    trained, kinds = sum(size for size, is_trained in sizes if is_trained), sorted({n.split(".")[-1] for n in layers})
    log.info(
        "adapter on %d layers (%s): %d of %d parameters are trained",
        *(len(layers), ", ".join(kinds), trained, sum(size for size, _ in sizes)),
    )


def merge_adapter(config: StudentConfig, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write the adapter alone, as peft reads it; returns the student's weights with the adapter in them.

    `weights` is the whole state dict of a student with its adapter, none of which is changed. A skeleton takes them as
    they are, so that naming, writing and merging are peft's own work, whatever the ZeRO stage.
    """
    import peft

    assert config.adapter is not None
    student = models.meta_model(config)
    settings, whole = _settings(student, config.adapter), _trained_whole(student, config.adapter)
    settings.modules_to_save, settings.revision = whole or None, config.revision
    with warnings.catch_warnings():  # of tied matrices trained whole, which are right because they are written twice
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        adapted = peft.get_peft_model(student, settings, autocast_adapter_dtype=False)
    folder_of_base = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    settings.base_model_name_or_path = config.path if is_hub_name(config.path) else str(folder_of_base.resolve())
    state = {}
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        # beside what is trained whole peft keeps the original, which nobody will read
        for inner in (".original_module", ".modules_to_save.default") if module in whole else ("",):
            state[f"base_model.model.{module}{inner}.{last}"] = weight
    adapted.load_state_dict(state, assign=True)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form that peft leaves to be filled in
    return dict(adapted.merge_and_unload(safe_merge=True).state_dict())


def _insert(student: Model, options: AdapterConfig) -> list[str]:
    """Put peft's layers into the student and say which are trained; the names of those that got one."""
    import peft

    settings, whole = _settings(student, options), _trained_whole(student, options)
    peft.inject_adapter_in_model(settings, student)
    for name in whole:
        # as it stands, where peft would train a copy: a tied matrix stays one
        student.get_submodule(name).requires_grad_(True)
    return [name for name, module in student.named_modules() if hasattr(module, "lora_A")]


def _settings(student: Model, options: AdapterConfig) -> Any:
    """peft's options, with targets that are in this student."""
    import peft

    linear = models.linear_layers(student)
    for target in options.targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            found = ", ".join(sorted({name.split(".")[-1] for name in linear})) or "none"
            raise InputError(
                f"student.adapter.targets: expected the ends of names of linear layers, found {target!r}; "
                f"{type(student).__name__} has {found}"
            )
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    on_head = any(f".{_name_of(student, head)}".endswith(f".{target}") for target in options.targets or [])
    if on_head and (is_tied or options.train_head):
        why = "it is the embeddings too, which would change with it" if is_tied else "train_head trains it whole"
        raise InputError(
            f"student.adapter.targets: expected layers without the head, because {why}, found {options.targets}; "
            f"leave the head out{', or train both whole' if is_tied else ' or use train_head=false'}"
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


def _trained_whole(student: Model, options: AdapterConfig) -> list[str]:
    """The names of the modules that are trained beside the adapter."""
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is embeddings.weight and options.train_embeddings != options.train_head:
        raise InputError(
            "student.adapter: expected train_embeddings and train_head alike, because they are one matrix in this "
            f"{type(student).__name__}, found {options.train_embeddings} and {options.train_head}"
        )
    asked = ((embeddings, options.train_embeddings), (head, options.train_head))
    return [_name_of(student, module) for module, is_trained in asked if is_trained]


def _name_of(student: Model, wanted: torch.nn.Module) -> str:
    return next(name for name, module in student.named_modules() if module is wanted)
