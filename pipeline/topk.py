"""Dense logits -> TopK by one of three kinds, and TopK -> log-probabilities.

In all three the kept entries and the tail are the target distribution, so a loss has one way to read them.
`topk` is exact on its head and biased nowhere but inside the tail, whose mass is exact. `sampled` and `hybrid`
are unbiased estimates of the whole distribution at T = 1, and know no tail: what was not drawn counts as 0.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

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


def sampled(logits_NV: Tensor, *, uniforms_ND: Tensor) -> TopK:
    """D draws with replacement from softmax(logits): weights count / D, unbiased (Anshumann et al. 2025, 2503.16870).

    `uniforms_ND` in [0, 1) decide the draws, by inversion of the cumulative distribution in fp64.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    ids_ND, counts_ND = _draw(p_NV, uniforms_ND)
    return _from_weights(ids_ND, counts_ND / uniforms_ND.shape[1])


def hybrid(logits_NV: Tensor, *, k: int, uniforms_ND: Tensor) -> TopK:
    """The k largest exactly, the remaining mass r spread over D draws from the rest, each worth r * count / D.

    Unbiased, sums to one, exact on the head.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    head_NK, ids_NK = p_NV.topk(k, dim=1)
    rest_NV = p_NV.scatter(1, ids_NK, 0.0)
    rest_N1 = rest_NV.sum(dim=1, keepdim=True)
    drawn_ND, counts_ND = _draw(rest_NV, uniforms_ND)
    weights = torch.cat([head_NK, rest_N1 * counts_ND / uniforms_ND.shape[1]], dim=1)
    return _from_weights(torch.cat([ids_NK, drawn_ND], dim=1), weights)


def _draw(mass_NV: Tensor, uniforms_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Different ids drawn [N, D] and how often each was [N, D]; 0 times where there are fewer than D."""
    cumulative_NV = mass_NV.cumsum(dim=1)
    # side="right": an id without mass is never drawn
    wanted_ND = uniforms_ND.to(cumulative_NV) * cumulative_NV[:, -1:]
    drawn_ND = torch.searchsorted(cumulative_NV, wanted_ND, right=True).clamp(max=mass_NV.shape[1] - 1)
    drawn_ND = drawn_ND.sort(dim=1).values
    is_new_ND = torch.ones_like(drawn_ND, dtype=torch.bool)
    is_new_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]
    slot_ND = is_new_ND.cumsum(dim=1) - 1
    counts_ND = torch.zeros_like(drawn_ND).scatter_add(1, slot_ND, torch.ones_like(drawn_ND))
    return torch.zeros_like(drawn_ND).scatter(1, slot_ND, drawn_ND), counts_ND


def _from_weights(ids_NK: Tensor, weights_NK: Tensor) -> TopK:
    """Entries by falling weight; those of no weight become padding: -inf, with the first entry's id."""
    weights_NK, order_NK = weights_NK.sort(dim=1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    relative_NK = (weights_NK.log() - weights_NK[:, :1].log()).half()
    width = int((relative_NK > -torch.inf).sum(dim=1).max())
    return TopK(
        ids_NK=torch.where(relative_NK > -torch.inf, ids_NK, ids_NK[:, :1])[:, :width],
        relative_logits_NK=relative_NK[:, :width],
        log_tail_NC=torch.full((len(ids_NK), 1), -torch.inf, device=ids_NK.device),
        temperatures=(1.0,),
    )


def uniforms(key: bytes, count: int, *, draws: int, seed: int) -> Tensor:
    """fp64 [N, D] in [0, 1): a function of (seed, sequence key, position), so that a redone shard draws the same."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True) + key, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, draws, generator=generator, dtype=torch.float64)


def from_log_probabilities(ids_NK: Tensor, log_p_NK: Tensor, *, has_tail: bool) -> TopK:
    """Entries that somebody else kept, in any order and -inf where there is none: at least one a position, T = 1.

    With `has_tail` the mass outside is 1 - sum p, in fp64, and 0 where the entries sum to more; else it is 0.
    """
    log_p_NK, order_NK = log_p_NK.double().sort(dim=1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    largest_N1 = log_p_NK[:, :1]
    log_rest_N1 = torch.log1p(-log_p_NK.exp().sum(dim=1, keepdim=True).clamp(max=1.0))
    relative_NK = (log_p_NK - largest_N1).half()
    width = int((relative_NK > -torch.inf).sum(dim=1).max())
    return TopK(
        ids_NK=torch.where(relative_NK > -torch.inf, ids_NK, ids_NK[:, :1])[:, :width],
        relative_logits_NK=relative_NK[:, :width],
        log_tail_NC=(log_rest_N1 - largest_N1 if has_tail else torch.full_like(largest_N1, -torch.inf)).float(),
        temperatures=(1.0,),
    )


def widen(top: TopK, width: int) -> TopK:
    """The same distributions with padding up to `width` entries."""
    missing = width - top.ids_NK.shape[1]
    return TopK(
        ids_NK=torch.cat([top.ids_NK, top.ids_NK[:, :1].expand(-1, missing)], dim=1),
        relative_logits_NK=functional.pad(top.relative_logits_NK, (0, missing), value=-torch.inf),
        log_tail_NC=top.log_tail_NC,
        temperatures=top.temperatures,
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
