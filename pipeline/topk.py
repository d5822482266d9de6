"""Dense logits -> TopK, and TopK -> log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.types import InputError, TopK


def top_k(logits_NV: Tensor, *, k: int, temperatures: tuple[float, ...]) -> TopK:
    """Keep the k largest logits of each position and fold all others, exactly, into one tail a temperature.

    log_tail(T) = log sum_{i not kept} exp((l_i - max l) / T), from the logits as given, in fp32. `logits_NV`
    must hold the real vocabulary only (rows of a padded head cut away).
    """
    size = logits_NV.shape[1]
    if not 1 <= k <= size:
        raise InputError(f"k: expected 1 to {size} (the vocabulary), found {k}; choose a smaller capture.k")
    logits_NV = logits_NV.float()
    values_NK, ids_NK = logits_NV.topk(k, dim=1)
    largest_N1 = values_NK[:, :1]
    tail_NV = (logits_NV - largest_N1).scatter_(1, ids_NK, -torch.inf)
    tails = [torch.logsumexp(tail_NV / T, dim=1) for T in temperatures]
    return TopK(
        ids_NK=ids_NK,
        relative_logits_NK=(values_NK - largest_N1).half(),
        log_tail_NC=torch.stack(tails, dim=1),
        temperatures=temperatures,
    )


def temperature_index(top_temperatures: tuple[float, ...], temperature: float) -> int:
    """Column of `log_tail_NC` for a temperature; refuses one that was not captured, whose tail nobody knows."""
    if temperature not in top_temperatures:
        raise InputError(
            f"temperature: expected one of the captured {list(top_temperatures)}, found {temperature}; "
            "choose one of them, or capture again with it in capture.temperatures"
        )
    return top_temperatures.index(temperature)


def log_probabilities(top: TopK, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept entries [N, K] and of the tail as a whole [N], in fp32 nats.

    They sum to one exactly, rounding of the stored logits included, because z is made of what is stored.
    """
    scaled_NK = top.relative_logits_NK.float() / temperature
    log_tail_N = top.log_tail_NC[:, temperature_index(top.temperatures, temperature)].float()
    log_z_N = torch.logaddexp(torch.logsumexp(scaled_NK, dim=1), log_tail_N)
    return scaled_NK - log_z_N[:, None], log_tail_N - log_z_N


def narrow(top: TopK, *, k: int) -> TopK:
    """The same distribution seen with fewer kept entries: the dropped ones fold into the tail, exactly."""
    held = top.ids_NK.shape[1]
    if not 1 <= k <= held:
        raise InputError(f"k: expected 1 to the captured {held}, found {k}; choose a smaller k or capture again")
    dropped_NK = top.relative_logits_NK[:, k:].float()
    columns = [
        torch.logaddexp(top.log_tail_NC[:, c], torch.logsumexp(dropped_NK / T, dim=1))
        for c, T in enumerate(top.temperatures)
    ]
    return TopK(
        ids_NK=top.ids_NK[:, :k],
        relative_logits_NK=top.relative_logits_NK[:, :k],
        log_tail_NC=torch.stack(columns, dim=1) if k < held else top.log_tail_NC,
        temperatures=top.temperatures,
    )


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of softmax(logits) at T = 1, in nats: log z - E[l], in fp32."""
    log_p_NV = torch.log_softmax(logits_NV.float(), dim=1)
    return torch.special.entr(log_p_NV.exp()).sum(dim=1)
