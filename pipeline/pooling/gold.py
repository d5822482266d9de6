"""Weights of a pool from captures of gold by its members: read, checked, fitted, refused where gold is too little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.core.progress import log
from pipeline.core.topk import temperature_index
from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.pooling.choices import records_of
from pipeline.pooling.distributions import aligned
from pipeline.pooling.fit import Fit, Outcomes, fit_linear, fit_logarithmic, target_log_p
from pipeline.pooling.members import JoinedRow, Member, groups, open_members, rows_of
from pipeline.pooling.rows import Pool, joined

MIN_RECORDS = 30  # a robust standard error needs some tens of independent records (Cameron & Miller 2015, section VI)
MAX_SUM_ERROR = math.log(2) / 1.96  # of the logarithm of the sum: the temperature is known within a factor of 2
MAX_ERROR = 0.25  # of a share: its 95 % interval is then 1 wide, from a member that is the pool to one without a part
DIGITS = 6  # of the weights: what rounding of sums may change is less


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoldPart:
    """Some positions of gold."""

    outcomes: Outcomes
    depths_N: Tensor
    """int64: the tokens of choices that the position has read."""
    log_reach_NE: Tensor | None
    """float64, nats: each member's log-probability of them; None where there are no choices."""


def fitted_pool(config: PoolConfig, members: Sequence[Member]) -> Pool:
    """The pool whose weights have the largest likelihood on gold; a logarithmic one's temperature is 1 / their sum.

    The table of the fit is logged. InputError where `fit_on` are not captures of one text with known targets by the
    members, or do not determine the weights.
    """
    gold = open_members(config.fit_on, config.downloads, what="fit_on")
    _check_models(gold, members)
    parts = list(_read(gold))
    if not parts:
        raise InputError(
            f"fit_on: expected known targets, found none in {gold[0].location}; capture records with their completions "
            "or answers"
        )
    if config.kind is PoolKind.linear:
        fit = fit_linear(*_whole_answers(parts))
    else:
        fit = fit_logarithmic([_shared_outcomes(part.outcomes, gold) for part in parts])
    log.info("%s", "\n".join(["weights fitted on gold", *fit_lines(fit, config.members)]))
    check_fit(fit)
    rounded = [round(weight, DIGITS) for weight in fit.weights]
    return Pool(
        kind=config.kind,
        weights=tuple(weight / sum(rounded) for weight in rounded),
        temperature=1.0 if config.kind is PoolKind.linear else 1.0 / sum(rounded),
        fit={
            "gold": [member.fingerprints for member in gold],
            "weights": rounded,
            "standard_errors": [round(error, 4) for error in fit.standard_errors],
            "at_border": list(fit.at_border),
            "positions": fit.num_positions,
            "records": fit.num_records,
        },
    )


def _check_models(gold: Sequence[Member], members: Sequence[Member]) -> None:
    """Refuse another tokenizer, and captures of gold that are not by the members, in their order.

    Of a cross-fitted student's captures and one by a single model it is not known whether they belong together.
    """
    expected, found = (pair[0].manifest.made_of["tokenizer"] for pair in (members, gold))
    if expected != found:
        raise InputError(
            f"fit_on: expected the members' tokenizer {expected}, found {found} in {gold[0].location}; capture gold "
            "with the members' models"
        )
    for of_gold, member in zip(gold, members, strict=True):
        one, other = ([cache.manifest.made_of.get("teacher_weights") for cache in m.caches] for m in (of_gold, member))
        if len(one) == len(other) and None not in (*one, *other) and one != other:
            raise InputError(
                f"fit_on: expected captures of gold by the members' models in the order of members, found another "
                f"model in {of_gold.location} than in {member.location}; put them in this order, or capture gold"
            )


# ------------------------------------------------------------------------------------------ gold as outcomes


def _read(gold: Sequence[Member]) -> Iterator[GoldPart]:
    vocabulary_size = gold[0].manifest.vocabulary_size
    for shard in range(gold[0].manifest.num_shards):
        for rows in groups(rows_of(gold, shard)):
            part = _gold_part(rows, vocabulary_size)
            if part is not None:
                yield part


def _gold_part(rows: Sequence[JoinedRow], vocabulary_size: int) -> GoldPart | None:
    """The positions of some sequences whose target is known; None without any."""
    sequences = [sequence for sequence, _ in rows]
    targets_N = torch.cat([sequence.target_ids_N for sequence in sequences])
    known = (targets_N != UNKNOWN_TARGET).nonzero()[:, 0]
    if len(known) == 0:
        return None
    by_member = [captured.select(known) for captured in joined(rows)]
    ids_NK, members = aligned([one.top for one in by_member], vocabulary_size, option="fit_on")
    log_p = [
        torch.cat([m.relative_logits_NK, m.log_tail_NC[:, [temperature_index(one.top.temperatures, 1.0)]]], dim=1)
        - m.log_z_N[:, None]
        for m, one in zip(members, by_member, strict=True)
    ]
    log_p_ENJ = torch.stack(log_p)
    is_target_NK = (ids_NK == targets_N[known, None]) & (log_p_ENJ[0, :, :-1] > -torch.inf)
    columns_N = torch.where(is_target_NK.any(dim=1), is_target_NK.int().argmax(dim=1), ids_NK.shape[1])  # or the tail
    reaches = [one.weights_N for one in by_member if one.weights_N is not None]
    return GoldPart(
        outcomes=Outcomes(
            log_p_ENJ=log_p_ENJ, targets_N=columns_N, records_N=torch.cat([*map(records_of, sequences)])[known]
        ),
        depths_N=torch.cat([sequence.depths_or_zeros() for sequence in sequences])[known],
        log_reach_NE=torch.stack(reaches, dim=1).double().log() if reaches else None,
    )


def _shared_outcomes(outcomes: Outcomes, gold: Sequence[Member]) -> Outcomes:
    """Without the outcomes that one of the members rules out: their product is 0. InputError where one of them is true.

    Only a tail can be ruled out: where a member keeps the whole vocabulary, or its tail was lost (some imports).
    """
    is_outcome_ENJ = outcomes.log_p_ENJ > -torch.inf
    is_true_EN = is_outcome_ENJ.gather(2, outcomes.targets_N[None, :, None].expand(len(is_outcome_ENJ), -1, -1))[..., 0]
    if not is_true_EN.all():
        place = int(is_true_EN.all(dim=1).int().argmin())
        raise InputError(
            f"fit_on: expected targets with a probability above 0, found {int((~is_true_EN[place]).sum())} of 0 in "
            f"{gold[place].location}, whose tail is empty; use kind=linear, or captures of this project"
        )
    log_p_ENJ = outcomes.log_p_ENJ.masked_fill(~is_outcome_ENJ.all(dim=0), -torch.inf)
    return dataclasses.replace(outcomes, log_p_ENJ=log_p_ENJ)


def _whole_answers(parts: Sequence[GoldPart]) -> tuple[Tensor, Tensor]:
    """For a linear pool: log-probabilities of the targets [N, E], and the records [N].

    Of choices the answer as a whole: the members' probabilities of its tokens up to its last node, times those of the
    target there. A mean of distributions over sequences is no product of means at the nodes.
    """
    log_p_NE = target_log_p([part.outcomes for part in parts])
    records_N = torch.cat([part.outcomes.records_N for part in parts])
    if any(part.log_reach_NE is None for part in parts):
        return log_p_NE, records_N
    depths_N = torch.cat([part.depths_N for part in parts])
    log_p_NE = log_p_NE + torch.cat([part.log_reach_NE for part in parts if part.log_reach_NE is not None])
    # records 0 0 1 with depths 0 1 0 in order: the last of each record is the deepest
    order = (records_N * (int(depths_N.max()) + 1) + depths_N).argsort()
    is_last = torch.ones_like(order, dtype=torch.bool)
    is_last[:-1] = records_N[order][1:] != records_N[order][:-1]
    return log_p_NE[order][is_last], records_N[order][is_last]


# ------------------------------------------------------------------------------------------- what was found


def check_fit(fit: Fit) -> None:
    """Refuse weights that gold does not determine."""
    advice = "give equal weights= by hand, or more gold"
    if fit.num_records < MIN_RECORDS:
        raise InputError(
            f"fit_on: expected at least {MIN_RECORDS} records of gold, because errors are estimated from how records "
            f"differ, found {fit.num_records}; {advice}"
        )
    if sum(fit.weights) <= 0:
        raise InputError("fit_on: expected members that predict gold better than chance, found none; use other members")
    of_gold = f"from {fit.num_positions} positions of {fit.num_records} records"
    # in units of the sum: members that are all twice as flat have twice the weights, and twice their errors
    if not max(fit.share_errors) <= MAX_ERROR:
        shown = ", ".join(f"{error:.2f}" for error in fit.share_errors)
        raise InputError(
            f"fit_on: expected shares of the weights with standard errors of at most {MAX_ERROR}, found {shown} "
            f"{of_gold}: gold does not show which member is right, or members are alike; {advice}"
        )
    if not fit.sum_error <= MAX_SUM_ERROR:
        raise InputError(
            f"fit_on: expected a sum of the weights with a relative standard error of at most {MAX_SUM_ERROR:.2f}, "
            f"found {fit.sum_error:.2f} {of_gold}: gold does not show how sharp the pool should be; {advice}"
        )


def fit_lines(fit: Fit, members: Sequence[str]) -> Iterator[str]:
    """The fit as a table for a terminal; log-likelihoods are means over positions, in nats."""
    width = max(len(address) for address in [*members, "all, equal weights"])
    yield f"{'member':<{width}}  weight  standard error  log-likelihood"
    for m, address in enumerate(members):
        error = f"{fit.standard_errors[m]:.3f}" + ("*" if fit.at_border[m] else " ")
        yield f"{address:<{width}}  {fit.weights[m]:>6.3f}  {error:>14}  {fit.alone[m]:>14.4f}"
    yield f"{'all, equal weights':<{width}}  {1 / len(members):>6.3f}  {'':>14}  {fit.equal:>14.4f}"
    yield f"{'all, these weights':<{width}}  {sum(fit.weights):>6.3f}  {'':>14}  {fit.fitted:>14.4f}"
    yield f"{fit.num_positions} positions of {fit.num_records} records"
    if any(fit.at_border):
        yield "* at the border: the weight cannot be smaller (larger); the error is what it would have without one"
