"""The teacher completes prompts; its distribution at each generated token is captured during generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.capture.teacher import PendingBatch, capture_positions, device_of, prompt_draw_key, start_copy, timestamp
from pipeline.core.topk import sampled, uniform_draws
from pipeline.core.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence
from pipeline.data.packing import pack, with_completion
from pipeline.models.forward import Model
from pipeline.models.generation import generate


@torch.inference_mode()
def completed_batches(teacher: Model, prompts: Sequence[TokenSequence], manifest: Manifest) -> Iterator[PendingBatch]:
    """Complete prompts of similar length together, and pack prompts and completions into sequences.

    The batches depend on the prompts and the manifest alone, so that a shard captured again has the same completions.
    """
    options = manifest.made_of.get("complete", {})
    by_length = sorted(prompts, key=lambda prompt: (len(prompt.input_ids_S), prompt.record_ids))
    size = options.get("batch_records", 1)
    for first in range(0, len(by_length), size):
        batch = by_length[first : first + size]
        started = timestamp(device_of(teacher))
        completions, steps = _complete(teacher, batch, manifest)
        yield _pack_completions(batch, completions, steps, manifest, started)


def _complete(
    teacher: Model, batch: Sequence[TokenSequence], manifest: Manifest
) -> tuple[list[list[int]], list[Captured]]:
    """The generated ids of each prompt, including the end token, and the captured distributions of each step.

    `steps[t]` has one row for each prompt; rows after the end of a prompt's completion are not used.
    """
    options, device = manifest.made_of["complete"], device_of(teacher)
    max_new_tokens = [min(options["max_new_tokens"], manifest.window - len(prompt.input_ids_S)) for prompt in batch]
    longest = max(max_new_tokens)
    keys = [prompt_draw_key(prompt, manifest) for prompt in batch]
    draws_BTD = torch.stack(
        [uniform_draws(key, longest, draws=manifest.draws, seed=manifest.draw_seed) for key in keys]
    )
    sampling_BT1 = torch.stack([uniform_draws(key, longest, draws=1, seed=~options["seed"]) for key in keys])
    unknown_B = torch.full((len(batch),), UNKNOWN_TARGET, device=device)
    steps: list[Captured] = []

    def choose(t: int, logits_BV: Tensor) -> Tensor:
        steps.append(capture_positions(logits_BV, unknown_B, draws_BTD[:, t], manifest))
        return _next_token(logits_BV, options, sampling_BT1[:, t])

    completions = generate(
        teacher,
        [prompt.input_ids_S for prompt in batch],
        choose,
        max_new_tokens=max_new_tokens,
        end_ids=[set(manifest.made_of.get("end_token_ids", [manifest.made_of["end_token_id"]]))] * len(batch),
        vocabulary_size=manifest.vocabulary_size,
    )
    return completions, steps


def _next_token(logits_BV: Tensor, options: dict[str, object], uniforms_B1: Tensor) -> Tensor:
    """The next token of each prompt [B]: the most likely one, or one sampled at the temperature of the options."""
    if options["how"] == "greedy":
        return logits_BV.argmax(dim=1)
    assert isinstance(options["temperature"], float)
    return sampled(logits_BV.float() / options["temperature"], uniforms_ND=uniforms_B1).ids_NK[:, 0]


def _pack_completions(
    batch: Sequence[TokenSequence],
    completions: list[list[int]],
    steps: list[Captured],
    manifest: Manifest,
    started: object,
) -> PendingBatch:
    """Sequences of prompts with completions. Each generated token is supervised; its true target is unknown."""
    segments = [with_completion(prompt, ids) for prompt, ids in zip(batch, completions, strict=True)]
    sequences = list(pack(segments, window=manifest.window))
    row_of = {prompt.record_ids[0]: row for row, prompt in enumerate(batch)}
    # the batch's rows, in the order in which packing placed their records
    packed_rows = [row_of[record_id] for sequence in sequences for record_id in sequence.record_ids]
    weak_ids_N = torch.tensor([token for row in packed_rows for token in completions[row]])
    # concatenated, the steps hold step t of row b at index t * B + b: with B = 3, step 2 of row 1 is at 2 * 3 + 1 = 7
    indices = [t * len(batch) + row for row in packed_rows for t in range(len(completions[row]))]
    captured = Captured.cat(steps)
    captured = captured.select(torch.tensor(indices, device=captured.entropy_N.device))
    return start_copy(sequences, dataclasses.replace(captured, weak_ids_N=weak_ids_N), started)
