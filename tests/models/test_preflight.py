"""Models that cannot be used are refused without reading a weight; those that can be are accepted."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.config.schema import ModelConfig
from pipeline.core.types import InputError
from pipeline.models import preflight
from pipeline.models.preflight import check_model, small_config
from support.tiny import make_model, make_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 320}
GROUPED = {"intermediate_size": 300, "num_key_value_heads": 2}


def folder_of(name: str, student: Path, folder: Path, **config_values: Any) -> ModelConfig:
    """A folder with a config of another architecture, and the student's weights, which nothing may read."""
    shutil.copytree(student, folder)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **config_values})
    config.save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("name", "config_values"),
    [
        ("Llama", GROUPED),
        ("Qwen2", GROUPED),
        ("Qwen3", GROUPED | {"head_dim": 8}),
        ("Gemma2", GROUPED | {"head_dim": 8}),
        ("Gemma3Text", GROUPED | {"head_dim": 8, "sliding_window": 8}),
        ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
        ("GPTNeoX", {"intermediate_size": 300}),
        ("Phi3", GROUPED | {"pad_token_id": 0}),
        ("Mixtral", GROUPED | {"num_local_experts": 4}),
        ("Olmo2", GROUPED),
        ("SmolLM3", GROUPED | {"pad_token_id": 0}),
    ],
)
def test_architectures_that_can_be_used(
    name: str, config_values: dict[str, Any], student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = folder_of(name, student, tmp_path / "m", **config_values)
    with caplog.at_level(logging.INFO):
        check_model(config, make_tokenizer())
    assert "its architecture is checked only when" not in caplog.text


@pytest.mark.parametrize(("name", "config_values"), [("Bloom", {"n_layer": 4, "n_head": 4}), ("Mamba", {})])
def test_an_architecture_that_mixes_segments_is_refused(
    name: str, config_values: dict[str, Any], student: Path, tmp_path: Path
) -> None:
    config = folder_of(name, student, tmp_path / "m", **config_values)
    with pytest.raises(InputError, match="expected packed segments not to attend to each other, found that they do"):
        check_model(config, make_tokenizer())


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = make_model(tmp_path, tokenizer, seed=1, padding=-1)
    with pytest.raises(InputError, match="expected a head with at least 300 rows, .* ids up to 299, found 299; give"):
        check_model(ModelConfig(path=str(folder)), tokenizer)


def test_what_transformers_cannot_build_ends_in_one_line(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "m"))
    for change in ({"model_type": "unheard-of"}, {"model_type": "t5"}):
        values = json.loads((student / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match="expected a causal language model that transformers can build") as raised:
            check_model(ModelConfig(path=str(folder)), make_tokenizer())
        assert "\n" not in str(raised.value)


def test_the_small_copy_has_a_layer_of_each_type(student: Path, tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3
    config = folder_of(
        "Gemma3Text", student, tmp_path / "m", **GROUPED, head_dim=8, num_hidden_layers=7, layer_types=kinds
    )
    small = small_config(config)
    assert small.layer_types == kinds[:4]
    assert (small.num_hidden_layers, small.vocab_size, small.intermediate_size) == (4, 64, 64)
    config.num_layers = 1
    assert small_config(config).num_hidden_layers == 1


def test_no_random_numbers_are_used_up(student: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_model(ModelConfig(path=str(student)), make_tokenizer())
    assert torch.equal(torch.rand(1), expected)


def test_what_is_too_large_to_try_is_checked_later(
    student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "MAX_SMALL_PARAMETERS", 10)
    with caplog.at_level(logging.INFO):
        check_model(ModelConfig(path=str(student)), make_tokenizer())
    assert "its architecture is checked only when its weights are loaded (two layers have" in caplog.text
