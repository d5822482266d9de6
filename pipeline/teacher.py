"""The teacher's forward: packed sequences -> what stage one stores about them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline import models
from pipeline.corpus import collate_inputs
from pipeline.topk import entropy, hybrid, sampled, top_k, uniforms, widen
from pipeline.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence, TopK

HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix


@torch.inference_mode()
def capture_batch(teacher: models.Model, batch: Sequence[TokenSequence], manifest: Manifest) -> list[Captured]:
    """One forward; what stage one stores about each sequence. Only supervised positions reach the head."""
    device = next(teacher.parameters()).device
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = models.hidden_states(teacher, input_ids_BS.to(device), position_ids_BS.to(device))
    hidden_NH = hidden_BSH.flatten(0, 1)[flat_N.to(device)]
    targets_N = torch.cat([sequence.target_ids_N for sequence in batch]).to(device)
    counts = [len(sequence.target_positions_N) for sequence in batch]
    draws = [
        uniforms(sequence.key, count, draws=manifest.draws, seed=manifest.draw_seed)
        for sequence, count in zip(batch, counts, strict=True)
    ]
    chunks = [
        _capture_chunk(models.logits(teacher, hidden, manifest.vocabulary_size).float(), targets, drawn, manifest)
        for hidden, targets, drawn in zip(
            *(part.split(HEAD_POSITIONS) for part in (hidden_NH, targets_N, torch.cat(draws))), strict=True
        )
    ]
    width = max(chunk[0].ids_NK.shape[1] for chunk in chunks)
    tops = [widen(top, width) for top, _, _ in chunks]
    columns = [
        torch.cat([top.ids_NK for top in tops]),
        torch.cat([top.relative_logits_NK for top in tops]),
        torch.cat([top.log_tail_NC for top in tops]),
        torch.cat([next_log_prob_N for _, next_log_prob_N, _ in chunks]),
        torch.cat([entropy_N for _, _, entropy_N in chunks]),
    ]
    return [
        Captured(
            top=TopK(ids_NK=ids, relative_logits_NK=relative, log_tail_NC=tail, temperatures=manifest.temperatures),
            next_log_prob_N=next_log_prob_N,
            entropy_N=entropy_N,
        )
        for ids, relative, tail, next_log_prob_N, entropy_N in zip(
            *(column.cpu().split(counts) for column in columns), strict=True
        )
    ]


def _capture_chunk(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, uniforms_ND: torch.Tensor, manifest: Manifest
) -> tuple[TopK, torch.Tensor, torch.Tensor]:
    """What is kept of some positions: distribution, log-probability of the known target, entropy."""
    if manifest.kind == "topk":
        top = top_k(logits_NV, k=manifest.k, temperatures=manifest.temperatures)
    elif manifest.kind == "sampled":
        top = sampled(logits_NV, uniforms_ND=uniforms_ND)
    else:
        top = hybrid(logits_NV, k=manifest.k, uniforms_ND=uniforms_ND)
    target_logits_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    log_prob_N = target_logits_N - torch.logsumexp(logits_NV, dim=1)
    log_prob_N = torch.where(targets_N == UNKNOWN_TARGET, torch.nan, log_prob_N)
    return top, log_prob_N.half(), entropy(logits_NV).half()
