"""Pools of distributions: several members' TopK at the same positions become one.

The kept entries of a pool are the tokens that every member kept; all others are one outcome, the tail. Of it the
linear pool is exact. In the logarithmic pool, and where a distribution is sharpened, its mass is an upper bound
for weights with sum 1 and temperatures up to 1,

    sum over the tail of  prod_m p_m^w_m   <=   prod_m (sum over the tail of p_m)^w_m   (Hoelder's inequality),

because only each member's total over the tail is known. With one member the logarithmic pool is that member.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.topk import temperature_index
from pipeline.core.types import InputError, TopK

LEAST_SUM = 1e-30  # of exponentials in float32: below it they lose digits, and their logarithm is computed otherwise
ROWS_IN_CACHE = 64  # positions whose table of places stays in a CPU's cache: 64 * 50,000 * 2 bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One member's logits at the kept entries of a pool, relative to its own largest logit."""

    relative_logits_NK: Tensor
    """float32; -inf where the pool does not keep the entry."""
    log_tail_NC: Tensor
    """float32, nats: log of the sum of exp(relative logit / T) over all other tokens."""
    log_z_N: Tensor
    """float32, nats: log of the sum of exp(relative logit) over all tokens."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pooled:
    """The pool at N positions."""

    top: TopK
    target_log_prob_N: Tensor
    """float32, nats: log-probability of the true target at T = 1; NaN where it is unknown."""
    log_normaliser_N: Tensor
    """float32, nats: log of the sum over kept tokens and tail by which a product is divided; 0 in a linear pool."""


def aligned(tops: Sequence[TopK], vocabulary_size: int, *, option: str = "members") -> tuple[Tensor, list[Member]]:
    """The ids [N, K] of the first member's entries, and each member at those that all members kept.

    What a member kept and another one did not goes into its tail, exactly. InputError where a position has no token
    that all kept; it names the option that the members are from.
    """
    first = tops[0]
    is_common_NK = first.relative_logits_NK > -torch.inf
    places = [None, *(_places(first.ids_NK, top, vocabulary_size) for top in tops[1:])]
    for found in places[1:]:
        assert found is not None
        is_common_NK = is_common_NK & (found >= 0)
    if not is_common_NK.any(dim=1).all():
        raise InputError(
            f"{option}: expected at each position a token that all of them kept, found none in common; capture with a "
            "larger k"
        )
    return first.ids_NK.long(), [_member(top, is_common_NK, found) for top, found in zip(tops, places, strict=True)]


def _places(ids_NK: Tensor, other: TopK, vocabulary_size: int) -> Tensor:
    """For each id [N, K] its column among the other member's entries, or -1 where it is not kept there."""
    is_kept_NJ = other.relative_logits_NK > -torch.inf
    # half the memory, where the columns fit
    integer = torch.int16 if is_kept_NJ.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    columns_J = torch.arange(is_kept_NJ.shape[1], dtype=integer)
    if ids_NK.shape == other.ids_NK.shape and torch.equal(ids_NK, other.ids_NK):
        return torch.where(is_kept_NJ, columns_J, -1).long()
    # padding repeats the first id: here it has an id of its own, which nobody looks for
    other_NJ = other.ids_NK.long()
    if not is_kept_NJ.all():
        other_NJ = torch.where(is_kept_NJ, other_NJ, vocabulary_size)
    ids_NK, places_NK = ids_NK.long(), torch.empty(ids_NK.shape, dtype=integer)
    table_RV = torch.full((ROWS_IN_CACHE, vocabulary_size + 1), -1, dtype=integer)
    for ids_RK, other_RJ, places_RK in zip(
        *(x.split(ROWS_IN_CACHE) for x in (ids_NK, other_NJ, places_NK)), strict=True
    ):
        rows_RV = table_RV[: len(other_RJ)]
        rows_RV.scatter_(1, other_RJ, columns_J.expand_as(other_RJ))
        torch.gather(rows_RV, 1, ids_RK, out=places_RK)
        rows_RV.scatter_(1, other_RJ, -1)
    return places_NK.long()


def _member(top: TopK, is_common_NK: Tensor, places_NK: Tensor | None) -> Member:
    """`places_NK`: the columns of its entries that are common; None: in the places of the first member, as they are."""
    own_NJ = top.relative_logits_NK.float()
    exp_NJ = own_NJ.exp()
    if places_NK is None:
        relative_NK, is_left_NJ = own_NJ.masked_fill(~is_common_NK, -torch.inf), ~is_common_NK
    else:
        # an entry that is not common is in a column of its own behind the last one; sums are faster than torch.where
        num_columns = own_NJ.shape[1]
        marked_NK = (places_NK - num_columns) * is_common_NK + num_columns
        relative_NK = functional.pad(own_NJ, (0, 1), value=-torch.inf).gather(1, marked_NK)
        is_left_NJ = torch.ones(len(own_NJ), num_columns + 1, dtype=torch.bool).scatter_(1, marked_NK, False)[:, :-1]
    tails = [
        torch.logaddexp(top.log_tail_NC[:, c], _log_sum(own_NJ, exp_NJ, is_left_NJ, temperature=T))
        for c, T in enumerate(top.temperatures)
    ]
    log_tail_N = top.log_tail_NC[:, temperature_index(top.temperatures, 1.0)]
    return Member(
        relative_logits_NK=relative_NK,
        log_tail_NC=torch.stack(tails, dim=1),
        log_z_N=torch.logaddexp(exp_NJ.sum(dim=1).log(), log_tail_N),
    )


def _log_sum(logits_NJ: Tensor, exp_NJ: Tensor, is_left_NJ: Tensor, *, temperature: float) -> Tensor:
    """log of the sum of exp(logit / T) over some entries, -inf where there are none; no logit is above 0."""
    powers_NJ = exp_NJ if temperature == 1.0 else (logits_NJ / temperature).exp()
    sums_N = (powers_NJ * is_left_NJ).sum(dim=1)
    log_sums_N, is_small_N = sums_N.log(), sums_N < LEAST_SUM
    if is_small_N.any():
        rows = (is_small_N & is_left_NJ.any(dim=1)).nonzero()[:, 0]
        left_RJ = (logits_NJ[rows] / temperature).masked_fill(~is_left_NJ[rows], -torch.inf)
        log_sums_N[rows] = left_RJ.logsumexp(dim=1)
    return log_sums_N


def logarithmic_pool(
    tops: Sequence[TopK],
    target_log_probs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    vocabulary_size: int,
    temperature: float = 1.0,
) -> Pooled:
    """p(v) proportional to (prod_m p_m(v)^w_m)^(1 / temperature): sharper for temperatures below 1.

    In logits: z = sum_m w_m z_m / temperature, and for the tail at T the same of its log-sum-exps. They are those at
    T * temperature where all members have captured it; then one member's tail is exact. (Genest & Zidek 1986.)
    """
    ids_NK, members = aligned(tops, vocabulary_size)
    logits_NK = _weighted([member.relative_logits_NK for member in members], weights) / temperature
    common = _common_temperatures(tops)
    tails = {}
    for T in (T for T in common if T == 1.0 or T * temperature in common):
        at, power = (T * temperature, 1.0) if T * temperature in common else (T, temperature)
        columns = [m.log_tail_NC[:, top.temperatures.index(at)] for m, top in zip(members, tops, strict=True)]
        tails[T] = _weighted(columns, weights) / power
    log_z_N = _weighted([m.log_z_N for m in members], weights) / temperature
    return _pooled(ids_NK, logits_NK, tails, _weighted(target_log_probs, weights) / temperature, log_z_N)


def linear_pool(
    tops: Sequence[TopK],
    target_log_probs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    vocabulary_size: int,
    reaches: Sequence[Tensor] | None = None,
) -> Pooled:
    """p(v) = sum_m w_m p_m(v), exact for the kept entries and for the mass of the tail; at T = 1 alone.

    With `reaches`, each member's probabilities [N] of the tokens of choices that a position has read, it is the mean of
    the distributions over choices as sequences: p(v|node) = sum_m w_m p_m(node) p_m(v|node) / sum_m w_m p_m(node).
    (Stone 1961, the opinion pool.)
    """
    ids_NK, members = aligned(tops, vocabulary_size)
    columns = [m.log_tail_NC[:, temperature_index(top.temperatures, 1.0)] for m, top in zip(members, tops, strict=True)]
    shares = _shares(weights, reaches)
    log_p_NK = _log_mean([m.relative_logits_NK - m.log_z_N[:, None] for m in members], shares)
    log_tail_N = _log_mean([tail_N - m.log_z_N for m, tail_N in zip(members, columns, strict=True)], shares)
    return _pooled(ids_NK, log_p_NK, {1.0: log_tail_N}, _log_mean(target_log_probs, shares))


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m v_m, of weights above 0: 0 * -inf would be NaN."""
    terms = [value if weight == 1.0 else weight * value for value, weight in zip(values, weights, strict=True)]
    return functools.reduce(torch.add, terms)


def _log_mean(log_values: Sequence[Tensor], log_weights: Sequence[Tensor]) -> Tensor:
    """log sum_m w_m exp(v_m) of values [N] or [N, K], with weights of one element or [N]."""
    terms = [
        value + (log_w[:, None] if value.dim() == 2 else log_w)
        for value, log_w in zip(log_values, log_weights, strict=True)
    ]
    return functools.reduce(torch.logaddexp, terms)


def _shares(weights: Sequence[float], reaches: Sequence[Tensor] | None) -> list[Tensor]:
    """The logarithms of the members' shares w_m p_m(node) / sum: [1] without probabilities of reaching a node, or [N].

    Where no member reaches a node, no loss reads it: its shares are the weights.
    """
    log_weights = torch.tensor(weights).log()[:, None]
    if reaches is None:
        return list(log_weights)
    log_shares = torch.stack(list(reaches)).log() + log_weights  # [members, N]
    log_sums_N = log_shares.logsumexp(dim=0)
    return list(torch.where(log_sums_N > -torch.inf, log_shares - log_sums_N, log_weights))


def _common_temperatures(tops: Sequence[TopK]) -> tuple[float, ...]:
    return tuple(T for T in tops[0].temperatures if all(T in top.temperatures for top in tops))


def _pooled(
    ids_NK: Tensor, logits_NK: Tensor, tails: dict[float, Tensor], target_N: Tensor, log_z_N: Tensor | None = None
) -> Pooled:
    """Entries and tails by their unnormalised log weights, the entries in falling order.

    A target's is relative to `log_z_N`, the log weight that stands for 1 (0 if it is None).
    """
    reference_N = torch.zeros_like(target_N) if log_z_N is None else log_z_N
    largest_N = logits_NK.amax(dim=1)
    relative_NK = logits_NK - largest_N[:, None]
    log_sum_N = largest_N + relative_NK.exp().sum(dim=1).log()
    log_normaliser_N = torch.logaddexp(log_sum_N, tails[1.0]) - reference_N
    order_NK = _falling_order(relative_NK)
    relative_NK = relative_NK.gather(1, order_NK)
    is_kept_NK = relative_NK > -torch.inf
    width = int(is_kept_NK.sum(dim=1).max())
    padded_NK = (order_NK - order_NK[:, :1]) * is_kept_NK + order_NK[:, :1]  # an entry that is not kept: the first
    top = TopK(
        ids_NK=ids_NK.gather(1, padded_NK)[:, :width],
        relative_logits_NK=relative_NK.half()[:, :width],
        log_tail_NC=torch.stack([tail_N - largest_N / T for T, tail_N in tails.items()], dim=1),
        temperatures=tuple(tails),
    )
    return Pooled(top=top, target_log_prob_N=target_N - log_normaliser_N, log_normaliser_N=log_normaliser_N)


def _falling_order(relative_NK: Tensor) -> Tensor:
    """The columns by falling logit, of logits of at most 0; equal ones from left to right: [N, K].

    numpy sorts integers with vector instructions, ten times faster than torch sorts floats with their columns.
    """
    # the bits of a float without its sign, as an integer, grow with its size
    sizes_NK = (relative_NK.view(torch.int32) & 0x7FFFFFFF).long()
    keys_NK = sizes_NK * 65536 + torch.arange(relative_NK.shape[1])
    return torch.from_numpy(np.sort(keys_NK.numpy(), axis=1)) & 0xFFFF
