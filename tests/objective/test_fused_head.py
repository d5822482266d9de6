"""The fused head against full logits and autograd: every kind of head, dtype and size of chunk."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from pipeline.core.types import Batch, InputError
from pipeline.models.forward import hidden_states, logit_rules
from pipeline.objective import fused_head, position_groups
from pipeline.objective.fused_head import combined_loss, sum_names
from pipeline.objective.terms import StepInputs, TermOptions
from support import fake_gpu
from support.twin import make_batch

VOCABULARY, ROWS, HIDDEN = 30, 37, 16  # the head has more rows than there are tokens
TERMS = {
    "lm": TermOptions(on=("gold",)),
    "kd": TermOptions(on=("gold", "corpus"), temperature=2.0),
    "hard": TermOptions(on=("corpus",)),
    "confidence": TermOptions(on=("corpus",)),
}
FACTORS = {"lm": 0.7, "kd": 1.1, "hard": 0.2, "confidence": 0.4}


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=ROWS, initializer_range=0.3, **sizes, **settings)
    return LlamaForCausalLM(config)


def capped() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=ROWS, initializer_range=0.3, final_logit_softcapping=3.0, **sizes))


def scaled() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    model.config.logit_scale = 0.25  # Cohere multiplies by it; Granite divides
    return model


def with_bias() -> nn.Module:
    model = llama(tie_word_embeddings=False)
    model.lm_head = nn.Linear(HIDDEN, ROWS)
    nn.init.normal_(model.lm_head.bias)
    return model


def lora(**settings: Any) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=12, init_lora_weights=False, **settings)
    return peft.get_peft_model(llama(tie_word_embeddings=False), config)


HEADS = {
    "untied": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(tie_word_embeddings=True),
    "bias": with_bias,
    "scale": scaled,
    "softcap": capped,
    "LoRA off the head": lambda: lora(target_modules=["q_proj", "v_proj"]),
    "LoRA on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "LoRA on the head, dropout": lambda: lora(target_modules=["lm_head"], lora_dropout=0.5),
    "head trained in full": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "frozen head": lambda: frozen(llama(tie_word_embeddings=False)),
}


def frozen(model: nn.Module) -> nn.Module:
    model.lm_head.weight.requires_grad_(False)
    return model


def gradients(
    model: nn.Module, batch: Batch, *, fused: bool, vocabulary: int = VOCABULARY, diagnose: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # dropout
    model.zero_grad()
    ids_BS = torch.arange(len(batch.gold_N))[None] % VOCABULARY
    hidden_NH = hidden_states(model, ids_BS, torch.arange(ids_BS.shape[1])[None])[0]
    torch.manual_seed(4)
    options = {"vocabulary_size": vocabulary, "fused": fused}
    loss, sums = combined_loss(
        model, hidden_NH, batch, TERMS, StepInputs(coefficients=FACTORS, diagnose=diagnose), **options
    )
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), sums, found


def batch_of(**settings: Any) -> Batch:
    return make_batch(num_gold=11, num_corpus=20, vocabulary=VOCABULARY, gold_is_captured=True, scale=2.0, **settings)


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_in_chunks_equals_full_logits(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = HEADS[name](), batch_of()
    loss, sums, grads = gradients(model, batch, fused=False, diagnose=True)
    monkeypatch.setattr(fused_head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(fused_head, "MIN_CHUNK_POSITIONS", chunk)
    monkeypatch.setattr(fused_head, "CPU_BLOCK_POSITIONS", 3)
    found_loss, found_sums, found_grads = gradients(model, batch, fused=True, diagnose=True)
    assert found_loss == pytest.approx(float(loss), rel=1e-5)
    assert torch.allclose(found_sums, sums, rtol=1e-4, atol=1e-4)
    assert found_grads.keys() == grads.keys()
    assert grads
    for key, grad in grads.items():
        assert torch.allclose(found_grads[key], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), key


@pytest.mark.parametrize("depths", [0, 2])
def test_on_a_gpu_the_host_waits_once_a_micro_batch(depths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the positions of each term, in one copy; on a fake GPU, which counts. Then the loss runs to its gradients."""
    cuda, gpu = fake_gpu.install(monkeypatch), torch.device("cuda", 1)
    model, batch = llama(tie_word_embeddings=False), batch_of()
    batch = dataclasses.replace(batch, depths_N=torch.arange(31) % (depths + 1))
    hidden_NH = torch.randn(31, HIDDEN)
    step = StepInputs(coefficients=FACTORS)
    expected = combined_loss(model, hidden_NH, batch, TERMS, step, vocabulary_size=VOCABULARY)
    fake_gpu.on_gpu(model, gpu)
    with fake_gpu.FakeGpus(cuda.log), torch.no_grad():
        there = batch.to(gpu)
        hidden_NH = hidden_NH.to(gpu)
        cuda.log.clear()
        found = combined_loss(model, hidden_NH, there, TERMS, step, vocabulary_size=VOCABULARY)
        groups = len(position_groups.group_positions(batch, TERMS))
    waits = [line for line in cuda.log if "wait" in line or "blocking" in line]
    assert waits == ["copy to host, blocking"]
    assert cuda.log.count("copy to cuda:1") == groups == 2  # the positions of each group
    assert torch.allclose(found[0], expected[0])


def test_padding_rows_of_the_head_get_no_gradient() -> None:
    model = llama(tie_word_embeddings=False)
    _, _, found = gradients(model, batch_of(), fused=True)
    assert found["lm_head.weight"].shape == (ROWS, HIDDEN)
    assert found["lm_head.weight"][:VOCABULARY].abs().min(dim=1).values.max() > 0
    assert (found["lm_head.weight"][VOCABULARY:] == 0).all()


@pytest.mark.parametrize("name", ["untied", "tied", "bias", "softcap", "LoRA on the head"])
def test_bfloat16_within_its_rounding(name: str) -> None:
    """The head's gradients in bf16, against those of the same numbers in fp32: off by about one rounding, 2^-8.

    Without `confidence`, whose target is the largest logit: rounding may choose another one that is almost equal.
    """
    batch, terms = batch_of(), {name: TERMS[name] for name in ("lm", "kd", "hard")}
    model = HEADS[name]().to(torch.bfloat16)
    hidden_NH = torch.randn(31, HIDDEN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def grads_of(model: nn.Module, hidden_NH: Tensor, *, fused: bool) -> dict[str, Tensor]:
        hidden_NH = hidden_NH.clone().requires_grad_()
        model.zero_grad()
        loss, _ = combined_loss(
            model, hidden_NH, batch, terms, StepInputs(coefficients=FACTORS), vocabulary_size=VOCABULARY, fused=fused
        )
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {
            "hidden": hidden_NH.grad
        }
        return {name: grad.clone() for name, grad in grads.items() if grad is not None}

    ours = grads_of(model, hidden_NH, fused=True)
    assert all(grad.dtype == torch.bfloat16 for grad in ours.values())
    exact = grads_of(model.float(), hidden_NH.float(), fused=False)
    errors = {key: float((ours[key].float() - exact[key]).norm() / exact[key].norm()) for key in exact}
    assert max(errors.values()) < 2**-6, errors
    assert errors["hidden"] < 2**-7, errors


@pytest.mark.parametrize("fused", [True, False])
def test_positions_that_no_term_reads_never_reach_the_head(fused: bool) -> None:
    """Hidden states of NaN there change nothing, and the head's products cost as much as without these positions."""
    model, flops = llama(tie_word_embeddings=False), []
    for num_corpus in (30, 0):
        batch = make_batch(num_gold=4, num_corpus=num_corpus, vocabulary=VOCABULARY)
        hidden_NH = torch.randn(4 + num_corpus, HIDDEN).masked_fill(~batch.gold_N[:, None], torch.nan).requires_grad_()
        terms, step = {"lm": TermOptions(on=("gold",))}, StepInputs(coefficients={"lm": 1.0})
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss, sums = combined_loss(model, hidden_NH, batch, terms, step, vocabulary_size=VOCABULARY, fused=fused)
            loss.backward()
        flops.append(counter.get_total_flops())
        assert torch.isfinite(loss)
        assert torch.isfinite(sums).all()
        assert torch.isfinite(model.lm_head.weight.grad).all()
        assert hidden_NH.grad is not None
        assert (hidden_NH.grad[~batch.gold_N] == 0).all()
        assert (hidden_NH.grad[batch.gold_N] != 0).any(dim=1).all()
    assert flops[0] == flops[1] > 0


def test_heads_that_are_not_linear_are_rejected_and_work_through_full_logits() -> None:
    class NotLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(HIDDEN, ROWS), nn.Tanh())
            self.config = SimpleNamespace()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    hidden_NH, batch = torch.randn(31, HIDDEN), batch_of()
    with pytest.raises(InputError, match=re.escape("expected a linear layer, found Sequential; use loss.head=full")):
        combined_loss(
            NotLinear(), hidden_NH, batch, TERMS, StepInputs(coefficients=FACTORS), vocabulary_size=VOCABULARY
        )
    loss, sums = combined_loss(
        NotLinear(), hidden_NH, batch, TERMS, StepInputs(coefficients=FACTORS), vocabulary_size=VOCABULARY, fused=False
    )
    assert torch.isfinite(loss)
    assert len(sums) == len(sum_names(TERMS))
    dora = lora(target_modules=["lm_head"], use_dora=True)
    with pytest.raises(InputError, match="expected plain LoRA, found a variant"):
        combined_loss(dora, hidden_NH, batch, TERMS, StepInputs(coefficients=FACTORS), vocabulary_size=VOCABULARY)


def test_scales_of_real_architectures_are_read_from_their_configuration() -> None:
    granite, cohere = PretrainedConfig(logits_scaling=8.0), PretrainedConfig(logit_scale=0.0625)
    assert head_rules(granite) == (0.125, None)
    assert head_rules(cohere) == (0.0625, None)
    assert head_rules(PretrainedConfig()) == (1.0, None)


def head_rules(config: PretrainedConfig) -> tuple[float, float | None]:
    return logit_rules(SimpleNamespace(config=config))
