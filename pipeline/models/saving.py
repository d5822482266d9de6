"""Write a model as `save_pretrained` does, but gather its weights one by one, and hold one file of them at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from pipeline.core.watchdog import made_progress
from pipeline.models.forward import Model

Whole = Callable[[Tensor], Tensor | None]
"""From a weight of a state dict to the complete one in host memory; None on ranks that only take part in gathering."""


def save_model(
    model: Model, state: Mapping[str, Tensor], tokenizer: Any, folder: Path | None, *, whole: Whole, shard_bytes: int
) -> None:
    """Write weights as safetensors, the config and the tokenizer, so that `from_pretrained` loads the folder.

    `state` has the weights by the model's own names; `whole` is called once for each that is written, in the same order
    on every rank. The ranks without a `folder` write nothing. A tied weight is written once, under the name that the
    model's class keeps.
    """
    if folder is not None:
        _save_config(model, folder)
        tokenizer.save_pretrained(folder)
    shapes = _shapes(model, state)
    groups, written = _groups(model, shapes)
    files = split_torch_state_dict_into_shards(
        written, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    waiting, held = dict(files.filename_to_tensors), dict[str, Tensor]()
    for names in groups:
        gathered = {name: tensor for name in names if (tensor := whole(state[name])) is not None}
        made_progress()
        if folder is None:
            continue
        held |= revert_weight_conversion(model, gathered)
        del gathered
        for file in [file for file, needed in waiting.items() if held.keys() >= set(needed)]:
            needed = waiting.pop(file)
            save_file({name: held.pop(name).contiguous() for name in needed}, folder / file, metadata={"format": "pt"})
            made_progress()
    if folder is not None and files.is_sharded:
        numbers = {"total_parameters": sum(tensor.numel() for tensor in shapes.values())} | files.metadata
        index = {"metadata": numbers, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shapes(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are written, by the model's names and without content: of tied ones only one."""
    kept = remove_tied_weights_from_state_dict({name: _identified(tensor) for name, tensor in state.items()}, model)
    ignored = model._keys_to_ignore_on_save or ()
    return {name: _on_meta(tensor) for name, tensor in kept.items() if name not in ignored}


def _save_config(model: Model, folder: Path) -> None:
    """Write the config, the code of a model that brings its own, and the generation config."""
    model.config.use_cache = True
    # The generation config is written unchanged by ourselves: in many models it sets a temperature without do_sample.
    # transformers loads this but refuses to save it, at the end of a long run.
    generation, model.generation_config = model.generation_config, transformers.GenerationConfig()
    model.save_pretrained(folder, state_dict={})
    generation.to_json_file(folder / "generation_config.json")
    model.config.use_cache, model.generation_config = False, generation


def _groups(model: Model, shapes: Mapping[str, Tensor]) -> tuple[list[list[str]], dict[str, Tensor]]:
    """The names that have to be gathered together, in the order in which they are written; and what is written.

    transformers 5 holds some weights otherwise than they lie in files, such as all experts of a layer in one tensor. It
    converts each layer by itself; where that gives other weights than all layers at once, all are one group.
    """
    written = {name: _on_meta(tensor) for name, tensor in revert_weight_conversion(model, dict(shapes)).items()}
    place = {name: i for i, name in enumerate(written)}
    first_place: dict[tuple[str, ...], int] = {}
    apart: dict[str, torch.Size] = {}
    for _, group in groupby(shapes, key=_layer_of):
        names = tuple(group)
        made = revert_weight_conversion(model, {name: shapes[name] for name in names})
        apart |= {name: tensor.shape for name, tensor in made.items()}
        first_place[names] = min(place.get(name, 0) for name in made)
    if apart != {name: tensor.shape for name, tensor in written.items()}:
        return [list(shapes)], written
    return [list(names) for names in sorted(first_place, key=first_place.__getitem__)], written


def _layer_of(name: str) -> Sequence[str]:
    """model.layers.3 of model.layers.3.mlp.up_proj.weight; the whole name of what belongs to no numbered layer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return parts[: number + 1]


def _identified(tensor: Tensor) -> Tensor:
    """A form of it by which transformers finds the tied weights.

    Of a parameter one without content, which it takes for the model's parameter of this name. Not by its memory: ZeRO 3
    leaves parameters empty, and at ZeRO 1 and 2 all are parts of one tensor.
    """
    return _on_meta(tensor) if isinstance(tensor, nn.Parameter) else tensor


def _on_meta(tensor: Tensor) -> Tensor:
    """A tensor of this complete shape, without content."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
