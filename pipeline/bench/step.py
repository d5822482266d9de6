"""The time of one optimizer step of combined training, compared with plain LM training and online distillation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bench.capture import CORPUS, MODEL
from pipeline.bench.timing import Results, format_figure, ratios, run_in_turns, seconds, summarize, table
from pipeline.config.schema import Dtype, ModelConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Batch, Captured, TokenSequence
from pipeline.data.mixture import collate
from pipeline.data.packing import Segment, collate_inputs, make_sequence
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions, count_positions

WINDOW, SEQUENCES, K = 256, 4, 64
GOLD = 1  # gold sequences per batch, out of SEQUENCES
TEACHER_LAYERS = 4
TERMS = {"lm": TermOptions(on=("gold",)), "kd": TermOptions(on=("corpus",))}


def run(quick: bool) -> Results:
    """Forward, backward and AdamW on the same tokens: the combined loss, `model(labels=...)`, and a live teacher."""
    keep_allocator_memory()  # as the ranks of a training run do
    path = str(MODEL)
    config = resolve_dtype(ModelConfig(path=path, dtype=Dtype.auto))
    device = compute_device()
    _, tokenizer = open_tokenizer(config)
    student = open_model(dataclasses.replace(config, num_layers=4 if quick else None), device).train()
    teacher = open_model(dataclasses.replace(config, num_layers=TEACHER_LAYERS), device)
    prose = " ".join(json.loads(line)["prompt"] for line in CORPUS.read_text().splitlines()[:200])
    sequences = list(windows(tokenizer(prose)["input_ids"]))
    vocabulary = vocabulary_size(tokenizer)
    batch = captured_batch(teacher, sequences, vocabulary)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    counts = dict(zip(TERMS, count_positions(batch, TERMS).tolist(), strict=True))
    factors = {name: 1.0 / max(count, 1) for name, count in counts.items()}

    def combined() -> Tensor:
        hidden_BSH = hidden_states(student, batch.input_ids_BS, batch.position_ids_BS)
        hidden_NH = hidden_BSH.flatten(0, 1)[batch.flat_positions_N]
        return combined_loss(
            student, hidden_NH, batch, TERMS, StepInputs(coefficients=factors), vocabulary_size=vocabulary
        )[0]

    position_ids_BS = batch.position_ids_BS.to(student.device)
    inputs = {"input_ids": batch.input_ids_BS, "position_ids": position_ids_BS, "use_cache": False}
    inputs_and_targets = inputs | {"labels": batch.input_ids_BS}  # transformers shifts these by one itself

    def plain() -> Tensor:
        return student(**inputs_and_targets).loss

    def online() -> Tensor:
        with torch.no_grad():
            log_p_BSV = torch.log_softmax(teacher(**inputs).logits.float(), dim=-1)
        out = student(**inputs_and_targets)
        log_q_BSV = torch.log_softmax(out.logits.float(), dim=-1)
        kd = functional.kl_div(log_q_BSV.flatten(0, 1), log_p_BSV.flatten(0, 1), log_target=True, reduction="batchmean")
        return out.loss + kd

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    losses = {"combined, ours": combined, "LM, model(labels=...)": plain, "online distillation": online}
    measurements = {name: lambda loss=loss: seconds(lambda: step(loss())) for name, loss in losses.items()}
    times = run_in_turns(measurements, runs=2 if quick else 7)
    ratio_to = {name: ratios(times["combined, ours"], values) for name, values in times.items()}
    rows = [["", "seconds", "ratio of ours to it"]]
    rows += [[name, format_figure(summarize(values)), format_figure(ratio_to[name])] for name, values in times.items()]
    supervised = len(batch.target_ids_N)
    title = f"step: SmolLM2-135M in {config.dtype.name}, {batch.input_ids_BS.numel()} tokens, {supervised} supervised"
    print(table(title, rows))
    return {
        "step.time_ratio_to_lm": ratio_to["LM, model(labels=...)"],
        "step.time_ratio_to_online": ratio_to["online distillation"],
        "step.seconds": summarize(times["combined, ours"]),
    }


def windows(ids: list[int]) -> Iterator[TokenSequence]:
    """Cut SEQUENCES full windows from the ids; each is one segment with a target at every position except the last."""
    for number, first in enumerate(range(0, SEQUENCES * WINDOW, WINDOW)):
        window = tuple(ids[first : first + WINDOW])
        targets = tuple((s, window[s + 1]) for s in range(WINDOW - 1))
        yield make_sequence([Segment(record_id=number, ids=window, targets=targets)])


def captured_batch(teacher: Model, sequences: list[TokenSequence], vocabulary: int) -> Batch:
    """One micro-batch: GOLD gold sequences, then the others with the distributions of the teacher."""
    rows = captured_rows(teacher, sequences, vocabulary)
    return collate(rows, [number < GOLD for number in range(len(rows))]).to(teacher.device)


@torch.no_grad()
def captured_rows(
    teacher: Model, sequences: list[TokenSequence], vocabulary: int
) -> list[tuple[TokenSequence, Captured | None]]:
    """Each sequence with the teacher's distributions; the first GOLD sequences are gold and have none."""
    rows: list[tuple[TokenSequence, Captured | None]] = []
    for number, sequence in enumerate(sequences):
        input_ids_BS, position_ids_BS, flat_N = collate_inputs([sequence])
        hidden_BSH = hidden_states(teacher, input_ids_BS.to(teacher.device), position_ids_BS)
        logits_NV = logits(teacher, hidden_BSH[0][flat_N.to(teacher.device)], vocabulary).float().cpu()
        zeros_N = torch.zeros(len(logits_NV), dtype=torch.float16)  # no term of this benchmark reads these columns
        top, _, _ = top_k_and_entropy(logits_NV, k=K, temperatures=(1.0,))
        captured = Captured(top=top, next_log_prob_N=zeros_N, entropy_N=zeros_N)
        rows.append((sequence, None if number < GOLD else captured))
    return rows
