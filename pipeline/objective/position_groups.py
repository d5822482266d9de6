"""Which positions which terms read, and the tokens that they name there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.types import Batch, TopK
from pipeline.objective.class_prior import harden
from pipeline.objective.divergences import LOG_ZERO
from pipeline.objective.terms import TERMS, SelectedLogits, TermOptions, term_positions, weak_labels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionGroup:
    """Positions that the same terms read."""

    rows_N: Tensor
    """int64: which of the batch's supervised positions."""
    names: tuple[str, ...]
    """The terms that read them."""
    extras: tuple[str, ...]
    """The tokens they name besides the kept entries."""
    ids_NJ: Tensor
    """int64: those, then the kept entries."""
    padding_NJ: Tensor
    repeats_NJ: Tensor
    top: TopK | None

    def with_own(self, logits_NV: Tensor, class_ids: Sequence[int], thresholds: Sequence[float]) -> PositionGroup:
        """The same, knowing the student's likeliest token (among the classes, if there are) if it is an extra."""
        if "own" not in self.extras:
            return self
        ids_NJ, column = self.ids_NJ.clone(), self.extras.index("own")
        own_N = harden(logits_NV, class_ids, thresholds) if class_ids else logits_NV.detach().argmax(dim=1)
        ids_NJ[:, column] = own_N
        repeats_NJ = repeated(ids_NJ, self.padding_NJ, len(self.extras))
        return dataclasses.replace(self, ids_NJ=ids_NJ, repeats_NJ=repeats_NJ)

    def part(self, rows: slice) -> PositionGroup:
        """Some of its positions."""
        top = None if self.top is None else self.top.select(rows)
        cut = {name: getattr(self, name)[rows] for name in ("rows_N", "ids_NJ", "padding_NJ", "repeats_NJ")}
        return PositionGroup(names=self.names, extras=self.extras, top=top, **cut)


def group_positions(batch: Batch, terms: dict[str, TermOptions]) -> list[PositionGroup]:
    """The positions that any term reads, by the terms that read them; the others never reach the head."""
    codes_N = torch.zeros_like(batch.target_ids_N)
    for bit, (name, options) in enumerate(terms.items()):
        codes_N += term_positions(batch, name, options).long() << bit
    groups = []
    for code in [int(code) for code in codes_N.unique() if code > 0]:
        names = tuple(name for bit, name in enumerate(terms) if code >> bit & 1)
        groups.append(_group(batch, terms, names, (codes_N == code).nonzero().squeeze(1)))
    return groups


def _group(batch: Batch, terms: dict[str, TermOptions], names: tuple[str, ...], rows_N: Tensor) -> PositionGroup:
    wanted = {token for name in names for token in TERMS[name].reads}
    tokens, top = {}, None
    if "target" in wanted:
        tokens["target"] = batch.target_ids_N[rows_N]
    if "weak" in wanted:
        tokens["weak"] = weak_labels(batch, terms["hard"].take)[rows_N]
    if "own" in wanted:
        tokens["own"] = torch.zeros_like(rows_N)  # known once there are logits
    if "kept" in wanted:
        assert batch.teacher is not None
        top = batch.teacher.select((batch.weak_N.cumsum(0) - 1)[rows_N])
    return make_group(rows_N, names, tokens, top)


def make_group(rows_N: Tensor, names: tuple[str, ...], tokens: dict[str, Tensor], top: TopK | None) -> PositionGroup:
    """Positions, the terms that read them, and the tokens that these name: extras by name, [N] each, and the kept."""
    columns = [ids_N[:, None] for ids_N in tokens.values()]
    padding = [torch.zeros_like(column, dtype=torch.bool) for column in columns]
    if top is not None:
        is_padding_NK = top.relative_logits_NK == -torch.inf
        # a token without any mass counts as one of the tail
        columns.append(torch.where(is_padding_NK, top.ids_NK[:, :1], top.ids_NK).long())
        padding.append(is_padding_NK)
    ids_NJ, padding_NJ = torch.cat(columns, dim=1), torch.cat(padding, dim=1)
    named = {"ids_NJ": ids_NJ, "padding_NJ": padding_NJ, "repeats_NJ": repeated(ids_NJ, padding_NJ, len(tokens))}
    return PositionGroup(rows_N=rows_N, names=names, extras=tuple(tokens), top=top, **named)


def repeated(ids_NJ: Tensor, padding_NJ: Tensor, num_extras: int) -> Tensor:
    """bool [N, J]: padding, and extras that are among the kept entries or the extras before them."""
    repeats_NJ = padding_NJ.clone()
    for column in range(num_extras):
        others_NJ = (ids_NJ == ids_NJ[:, column : column + 1]) & ~padding_NJ
        others_NJ[:, column:num_extras] = False
        repeats_NJ[:, column] = others_NJ.any(dim=1)
    return repeats_NJ


def select_logits(
    logits_NV: Tensor, group: PositionGroup, temperatures: Sequence[float], *, overlap: bool = False
) -> SelectedLogits:
    """What the terms read of whole logits, differentiable by autograd: slow and simple."""
    rest_NV = logits_NV.scatter(1, group.ids_NJ, LOG_ZERO)
    spread = {T: torch.softmax(rest_NV / T, dim=1) for T in temperatures} if overlap else {}
    return SelectedLogits(
        logits_NJ=logits_NV.gather(1, group.ids_NJ),
        log_rest={T: torch.logsumexp(rest_NV / T, dim=1) for T in temperatures},
        repeats_NJ=group.repeats_NJ,
        extras=group.extras,
        largest_rest_N=rest_NV.amax(dim=1),
        overlap={(S, T): (spread[S] * spread[T]).sum(dim=1) for S in spread for T in spread},
    )


def kd_of_logits(logits_NV: Tensor, top: TopK, options: TermOptions) -> Tensor:
    """The kd term of whole logits, summed over the positions: for whom the head is not at hand."""
    group = make_group(torch.arange(len(logits_NV)), ("kd",), {}, top)
    return TERMS["kd"].value(select_logits(logits_NV.float(), group, (options.temperature,)), top, options).sum()
