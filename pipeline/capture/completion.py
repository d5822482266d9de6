"""The teacher completes prompts, and its distribution over each token it says is captured as it says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.capture.teacher import PendingBatch, Spoken, capture_positions, joined, start_copy, timestamp
from pipeline.core.topk import sampled, select, uniform_draws
from pipeline.core.types import UNKNOWN_TARGET, Manifest, TokenSequence
from pipeline.data.packing import pack, with_completion
from pipeline.models.forward import Model
from pipeline.models.generation import generate


@torch.inference_mode()
def completed_batches(teacher: Model, prompts: Sequence[TokenSequence], manifest: Manifest) -> Iterator[PendingBatch]:
    """Complete prompts of like length together, and pack what was said into sequences.

    The batches follow from the prompts alone, so that a shard done again says the same.
    """
    options = manifest.made_of.get("complete", {})
    by_length = sorted(prompts, key=lambda prompt: (len(prompt.input_ids_S), prompt.record_ids))
    size = options.get("batch_records", 1)
    for first in range(0, len(by_length), size):
        batch = by_length[first : first + size]
        started = timestamp(next(teacher.parameters()).device)
        said, spoken = _say(teacher, batch, manifest)
        yield _packed(batch, said, spoken, manifest, started)


def _say(teacher: Model, batch: Sequence[TokenSequence], manifest: Manifest) -> tuple[list[list[int]], list[Spoken]]:
    """The tokens that the teacher says after each prompt, the end token included, and what it thought at each.

    `spoken[t]` has a row for every prompt of the batch; those past a prompt's own end are not to be read.
    """
    options, device = manifest.made_of["complete"], next(teacher.parameters()).device
    room = [min(options["max_new_tokens"], manifest.window - len(prompt.input_ids_S)) for prompt in batch]
    draws_BTD = torch.stack(
        [uniform_draws(p.key, max(room), draws=manifest.draws, seed=manifest.draw_seed) for p in batch]
    )
    chances_BT1 = torch.stack([uniform_draws(p.key, max(room), draws=1, seed=~options["seed"]) for p in batch])
    unknown_B = torch.full((len(batch),), UNKNOWN_TARGET, device=device)
    spoken: list[Spoken] = []

    def choose(t: int, logits_BV: Tensor) -> Tensor:
        spoken.append(capture_positions(logits_BV, unknown_B, draws_BTD[:, t], manifest))
        return _choose(logits_BV, options, chances_BT1[:, t])

    ends = [{manifest.made_of["end_token_id"]}] * len(batch)
    prompts = [prompt.input_ids_S for prompt in batch]
    said = generate(teacher, prompts, choose, room=room, ends=ends, vocabulary_size=manifest.vocabulary_size)
    return said, spoken


def _choose(logits_BV: Tensor, options: dict[str, object], chances_B1: Tensor) -> Tensor:
    if options["how"] == "greedy":
        return logits_BV.argmax(dim=1)
    assert isinstance(options["temperature"], float)
    return sampled(logits_BV.float() / options["temperature"], uniforms_ND=chances_B1).ids_NK[:, 0]


def _packed(
    batch: Sequence[TokenSequence], said: list[list[int]], spoken: list[Spoken], manifest: Manifest, started: object
) -> PendingBatch:
    """Prompts and completions as sequences whose targets are what the teacher said; its truth nobody knows."""
    segments = [with_completion(prompt, words) for prompt, words in zip(batch, said, strict=True)]
    rows = {prompt.record_ids[0]: b for b, prompt in enumerate(batch)}
    sequences = list(pack(segments, window=manifest.window))
    whole = joined(spoken)  # row t * B + b: step t of prompt b
    order = [t * len(batch) + rows[r] for s in sequences for r in s.record_ids for t in range(len(said[rows[r]]))]
    weak_ids_N = torch.tensor([word for s in sequences for r in s.record_ids for word in said[rows[r]]])
    rows_N = torch.tensor(order, device=whole.entropy_N.device)
    kept = Spoken(
        top=select(whole.top, rows_N),
        next_log_prob_N=whole.next_log_prob_N[rows_N],
        entropy_N=whole.entropy_N[rows_N],
    )
    return start_copy(sequences, kept, weak_ids_N, started)
