"""What a whole optimizer step of combined training costs, beside plain LM training and distillation online."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bench.capture import CORPUS, MODEL
from pipeline.bench.timing import Findings, figure, in_turn, ratios, seconds, shown, table
from pipeline.config.schema import Dtype, ModelConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Batch, Captured, TokenSequence
from pipeline.data.mixture import collate
from pipeline.data.packing import Segment, collate_inputs, make_sequence
from pipeline.models import loading as models
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions, count_positions

WINDOW, SEQUENCES, K = 256, 4, 64
GOLD = 1  # of the sequences
TEACHER_LAYERS = 4
TERMS = {"lm": TermOptions(on=("gold",)), "kd": TermOptions(on=("corpus",))}


def run(quick: bool) -> Findings:
    """Forward, backward and AdamW on the same tokens: ours, `model(labels=...)`, and a teacher in the loop."""
    keep_allocator_memory()  # as training's ranks do
    path = str(MODEL)
    config = models.resolve_dtype(ModelConfig(path=path, dtype=Dtype.auto))
    device = compute_device()
    _, tokenizer = open_tokenizer(config)
    student = models.open_model(dataclasses.replace(config, num_layers=4 if quick else None), device).train()
    teacher = models.open_model(dataclasses.replace(config, num_layers=TEACHER_LAYERS), device)
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

    where = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
    known = {"labels": batch.input_ids_BS}  # as transformers calls them

    def plain() -> Tensor:
        return student(**where, **known).loss

    def online() -> Tensor:
        with torch.no_grad():
            log_p_BSV = torch.log_softmax(teacher(**where).logits.float(), dim=-1)
        out = student(**where, **known)
        log_q_BSV = torch.log_softmax(out.logits.float(), dim=-1)
        kd = functional.kl_div(log_q_BSV.flatten(0, 1), log_p_BSV.flatten(0, 1), log_target=True, reduction="batchmean")
        return out.loss + kd

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    ways = {"combined, ours": combined, "LM, model(labels=...)": plain, "online distillation": online}
    things = {name: lambda way=way: seconds(lambda: step(way())) for name, way in ways.items()}
    found = in_turn(things, runs=2 if quick else 7)
    mine = found["combined, ours"]
    over = {name: ratios(mine, values) for name, values in found.items()}
    rows = [["", "seconds", "ours over it"]]
    rows += [[name, shown(figure(values)), shown(over[name])] for name, values in found.items()]
    supervised = len(batch.target_ids_N)
    title = f"step: SmolLM2-135M in {config.dtype.name}, {batch.input_ids_BS.numel()} tokens, {supervised} supervised"
    print(table(title, rows))
    return {
        "step.time_ratio_to_lm": over["LM, model(labels=...)"],
        "step.time_ratio_to_online": over["online distillation"],
        "step.seconds": figure(mine),
    }


def windows(ids: list[int]) -> Iterator[TokenSequence]:
    """Full windows of one segment with a target at every position."""
    for number, first in enumerate(range(0, SEQUENCES * WINDOW, WINDOW)):
        part = tuple(ids[first : first + WINDOW])
        targets = tuple((s, part[s + 1]) for s in range(WINDOW - 1))
        yield make_sequence([Segment(record_id=number, ids=part, targets=targets)])


def captured_batch(teacher: Model, sequences: list[TokenSequence], vocabulary: int) -> Batch:
    """One micro-batch, the first sequences gold and the others as the teacher sees them."""
    rows = captured_rows(teacher, sequences, vocabulary)
    return collate(rows, [number < GOLD for number in range(len(rows))]).to(teacher.device)


@torch.no_grad()
def captured_rows(
    teacher: Model, sequences: list[TokenSequence], vocabulary: int
) -> list[tuple[TokenSequence, Captured | None]]:
    """Each sequence with what the teacher says of it; the first ones are gold and carry nothing."""
    rows: list[tuple[TokenSequence, Captured | None]] = []
    for number, one in enumerate(sequences):
        input_ids_BS, position_ids_BS, flat_N = collate_inputs([one])
        hidden_BSH = hidden_states(teacher, input_ids_BS.to(teacher.device), position_ids_BS.to(teacher.device))
        logits_NV = logits(teacher, hidden_BSH[0][flat_N.to(teacher.device)], vocabulary).float().cpu()
        unknown_N = torch.zeros(len(logits_NV), dtype=torch.float16)
        top, _, _ = top_k_and_entropy(logits_NV, k=K, temperatures=(1.0,))
        captured = Captured(top=top, next_log_prob_N=unknown_N, entropy_N=unknown_N)
        rows.append((one, None if number < GOLD else captured))
    return rows
