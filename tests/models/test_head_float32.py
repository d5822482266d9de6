"""Logits in float32 of heads in half precision, against the same numbers in float64: every kind of head."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from pipeline.core.runtime import has_fast_matmul
from pipeline.models import head_float32
from pipeline.models.forward import logits
from pipeline.models.head_float32 import logits_float32
from pipeline.models.prepack import PrepackedLinear, prepack
from support.commands import ROOT
from support.tiny import make_model

HIDDEN, ROWS, VOCABULARY = 16, 37, 30  # the head has more rows than there are tokens


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=ROWS, initializer_range=0.3, tie_word_embeddings=tied, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def with_head(head: nn.Module) -> Any:
    model = llama()
    model.lm_head = head
    return model


def with_config(**values: float) -> Any:
    model = llama(tied=True)
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def lora(**settings: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=12, init_lora_weights=False, **settings)
    return peft.get_peft_model(llama(), config).eval()


HEADS: dict[str, Callable[[], Any]] = {
    "untied": llama,
    "tied": lambda: llama(tied=True),
    "bias": lambda: with_head(nn.Linear(HIDDEN, ROWS)),
    "scale": lambda: with_config(logit_scale=0.25),
    "soft cap": lambda: with_config(final_logit_softcapping=3.0),
    "LoRA": lambda: lora(target_modules=["lm_head"]),
    "trained beside LoRA": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "not linear": lambda: with_head(nn.Sequential(nn.Linear(HIDDEN, ROWS), nn.Tanh())),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_in_parts_is_exact(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_float32, "PART_ELEMENTS", 7 * HIDDEN)
    model, hidden_NH = HEADS[name]().to(dtype), torch.randn(5, HIDDEN).to(dtype)
    with torch.no_grad():
        exact_NV = logits(copy.deepcopy(model).double(), hidden_NH.double(), VOCABULARY)
        rounded_NV = logits(model, hidden_NH, VOCABULARY)
        found_NV = logits_float32(model, hidden_NH, VOCABULARY)
        assert torch.equal(logits(model, hidden_NH, VOCABULARY), rounded_NV)  # the model is as it was
    assert (found_NV.dtype, found_NV.shape) == (torch.float32, (5, VOCABULARY))
    assert (found_NV.double() - exact_NV).abs().max() < 2e-6
    assert (rounded_NV.double() - exact_NV).abs().max() > 1e-4


def test_logits_that_bfloat16_rounds_to_a_tie() -> None:
    """16 + 1/64 and 16 + 1/32: between 16 and 32 the numbers of bfloat16 are 1/8 apart."""
    model = with_head(nn.Linear(2, 2, bias=False)).bfloat16()
    model.lm_head.weight.data = torch.tensor([[16.0, 1 / 64], [16.0, 1 / 32]], dtype=torch.bfloat16)
    hidden_NH = torch.ones(1, 2, dtype=torch.bfloat16)
    assert logits(model, hidden_NH, 2).tolist() == [[16.0, 16.0]]
    assert logits_float32(model, hidden_NH, 2).tolist() == [[16.015625, 16.03125]]


def test_a_float32_head_gives_the_same_bits() -> None:
    model, hidden_NH = llama(), torch.randn(5, HIDDEN)
    assert torch.equal(logits_float32(model, hidden_NH, VOCABULARY), logits(model, hidden_NH, VOCABULARY))


def test_a_prepacked_head_gives_the_same_bits() -> None:
    if not has_fast_matmul(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no fast bfloat16 instructions: nothing is prepacked")
    model, hidden_NH = HEADS["bias"]().to(torch.bfloat16), torch.randn(5, HIDDEN).bfloat16()
    prepacked = prepack(copy.deepcopy(model))
    assert type(prepacked.lm_head) is PrepackedLinear
    with torch.no_grad():
        expected_NV = logits_float32(model, hidden_NH, VOCABULARY)
        assert torch.equal(logits_float32(prepacked, hidden_NH, VOCABULARY), expected_NV)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_zero_3_partitions_gives_the_same_bits(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tokenizer, seed=1, tie_word_embeddings=tied)
    command = [sys.executable, str(ROOT / "tests" / "support" / "head_worker.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
