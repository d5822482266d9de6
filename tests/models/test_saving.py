"""Weights that are gathered one by one are written as `save_pretrained` writes the whole model."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pipeline.core.files import atomic_folder
from pipeline.models import saving
from pipeline.models.saving import save_model

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "experts": transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "more experts": transformers.Qwen2MoeConfig(
        **LLAMA, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "gpt2": transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("which", CONFIGS)
def test_the_same_files_as_save_pretrained(which: str, shard_bytes: int, tokenizer: Any, tmp_path: Path) -> None:
    """Names and content, and of dense models the division into files and the index.

    The model is loaded first, as a student is, so that its weights were converted. `whole` copies as `.cpu()` does on a
    GPU, where tied weights become two. Of experts save_pretrained counts each as large as all of its layer.
    """
    transformers.AutoModelForCausalLM.from_config(CONFIGS[which]).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "expected", max_shard_size=shard_bytes)
    state, asked = model.state_dict(keep_vars=True), list[int]()

    def whole(weight: Tensor) -> Tensor:
        asked.append(id(weight))
        return weight.detach().clone()

    save_model(model, state, tokenizer, tmp_path / "model", whole=whole, shard_bytes=shard_bytes)
    assert sorted(asked) == sorted({id(weight) for weight in state.values()})  # a tied weight once
    expected = {path.name: load_file(path) for path in (tmp_path / "expected").glob("*.safetensors")}
    found = {path.name: load_file(path) for path in (tmp_path / "model").glob("*.safetensors")}
    assert len(found) == 1 if shard_bytes > 10**6 else len(found) > 2
    assert all(
        len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes for tensors in found.values()
    )
    one, other = ({name: t for file in files.values() for name, t in file.items()} for files in (expected, found))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if "experts" not in which:
        assert {file: t.keys() for file, t in expected.items()} == {file: t.keys() for file, t in found.items()}
        if shard_bytes < 10**6:
            index = "model.safetensors.index.json"
            indexes = [json.loads((tmp_path / folder / index).read_text()) for folder in ("expected", "model")]
            assert indexes[0] == indexes[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("which", ["untied", "experts"])
def test_at_most_one_file_and_one_layer_are_held(
    which: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by their own memory: the copies that `whole` has given out and that still live.

    Of experts a second layer, whose file is not complete yet: they are parts of one tensor.
    """
    config = copy.deepcopy(CONFIGS[which])
    config.num_hidden_layers = 24
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    shard_bytes, live, most = 60_000, dict[int, int](), 0
    layers: dict[str, int] = {}
    for name, weight in model.named_parameters():
        key = ".".join(name.split(".")[:3])
        layers[key] = layers.get(key, 0) + weight.nbytes
    largest_layer = max(layers.values())

    def whole(weight: Tensor) -> Tensor:
        nonlocal most
        given = weight.detach().clone()
        storage = given.untyped_storage()
        live[id(storage)] = given.nbytes
        weakref.finalize(storage, live.pop, id(storage))
        most = max(most, sum(live.values()))
        return given

    steps: list[None] = []
    monkeypatch.setattr(saving, "made_progress", lambda: steps.append(None))
    state = model.state_dict(keep_vars=True)
    save_model(model, state, tokenizer, tmp_path / "model", whole=whole, shard_bytes=shard_bytes)
    assert len(steps) > len(layers)  # the watchdog knows of each layer and file
    bound = shard_bytes + largest_layer * (2 if which == "experts" else 1)
    assert 0 < most <= bound < sum(layers.values()) / 3


def test_a_tokenizer_with_several_chat_templates_has_a_subfolder(tokenizer: Any, tmp_path: Path) -> None:
    """Which transformers writes beside tokenizer.json: nothing that follows training may stumble over it."""
    two = copy.deepcopy(tokenizer)
    two.chat_template = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["tied"])
    with atomic_folder(tmp_path / "model") as folder:
        state = model.state_dict(keep_vars=True)
        save_model(model, state, two, folder, whole=lambda weight: weight.detach(), shard_bytes=10**9)
    assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == two.chat_template
