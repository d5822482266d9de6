"""Groups of positions that the same terms read, and the tokens whose logits they read there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.runtime import to_device
from pipeline.core.types import Batch, TopK
from pipeline.objective.class_prior import harden
from pipeline.objective.divergences import LOG_ZERO
from pipeline.objective.terms import HARD_LABELS, TERMS, SelectedLogits, TermOptions, term_positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionGroup:
    """Positions that the same terms read; N of them, with J selected tokens at each."""

    rows_N: Tensor
    """int64: indices of the positions among the batch's supervised positions."""
    term_names: tuple[str, ...]
    """The terms that read them."""
    extra_tokens: tuple[str, ...]
    """The names of the selected tokens besides the kept entries (see `Term.tokens`)."""
    ids_NJ: Tensor
    """int64: token ids, one column for each extra token, then the kept entries."""
    is_padding_NJ: Tensor
    """bool: the teacher kept fewer entries at this position."""
    is_skipped_NJ: Tensor
    """bool: see `skipped_columns`."""
    top: TopK | None
    """The teacher's distributions at the positions; None if no term reads them."""
    weights_N: Tensor
    """float32: see `Batch`."""
    depths_N: Tensor | None
    """int64: see `Batch`; None if all are 0."""

    @property
    def is_root_N(self) -> Tensor:
        """bool: the position has read no token of a choice."""
        return torch.ones_like(self.rows_N, dtype=torch.bool) if self.depths_N is None else self.depths_N == 0

    def with_student_top(
        self, logits_NV: Tensor, class_ids: Sequence[int], thresholds: Sequence[float]
    ) -> PositionGroup:
        """The same group with the ids of "student_top" filled in, if a term reads them.

        The student's most likely token is taken among the class tokens, which stand right after the prompt, or from the
        full vocabulary: without classes, and where the position has read a token of a choice already.
        """
        if "student_top" not in self.extra_tokens:
            return self
        ids_NJ = self.ids_NJ.clone()
        if class_ids and self.depths_N is None:
            top_N = harden(logits_NV, class_ids, thresholds)
        else:
            top_N = logits_NV.detach().argmax(dim=1)
            if class_ids:
                top_N = torch.where(self.is_root_N, harden(logits_NV, class_ids, thresholds), top_N)
        ids_NJ[:, self.extra_tokens.index("student_top")] = top_N
        is_skipped_NJ = skipped_columns(ids_NJ, self.is_padding_NJ, len(self.extra_tokens))
        return dataclasses.replace(self, ids_NJ=ids_NJ, is_skipped_NJ=is_skipped_NJ)

    def select(self, rows: slice) -> PositionGroup:
        """The group with some of its positions."""
        return PositionGroup(
            rows_N=self.rows_N[rows],
            term_names=self.term_names,
            extra_tokens=self.extra_tokens,
            ids_NJ=self.ids_NJ[rows],
            is_padding_NJ=self.is_padding_NJ[rows],
            is_skipped_NJ=self.is_skipped_NJ[rows],
            top=None if self.top is None else self.top.select(rows),
            weights_N=self.weights_N[rows],
            depths_N=None if self.depths_N is None else self.depths_N[rows],
        )


def group_positions(batch: Batch, terms: dict[str, TermOptions]) -> list[PositionGroup]:
    """One group for each set of terms that read the same positions; a position that no term reads is in no group."""
    # Each term is one bit of a position's code. With the terms lm, kd, hard (bits 0, 1, 2): a position that lm and hard
    # read has the code 0b101 = 5, and code 5 >> 2 & 1 = 1 shows that hard reads it. Code 0: no term reads it.
    codes_N = torch.zeros_like(batch.target_ids_N)
    for bit, (name, options) in enumerate(terms.items()):
        codes_N += term_positions(batch, name, options).long() << bit
    # One more bit for the positions inside of a choice, and one copy to the host: on a GPU each look at a value or at a
    # number of positions waits for the forward that is queued there
    is_inside_N = batch.depths_N > 0
    codes_N = (codes_N + (is_inside_N.long() << len(terms))).cpu()
    codes_N, is_inside_N = codes_N & ((1 << len(terms)) - 1), codes_N >> len(terms) > 0
    groups = []
    for code in [code for code in codes_N.unique().tolist() if code > 0]:
        term_names = tuple(name for bit, name in enumerate(terms) if code >> bit & 1)
        is_read_N = codes_N == code
        rows_N = to_device(is_read_N.nonzero().squeeze(1), batch.target_ids_N.device)
        group = _group(batch, terms, term_names, rows_N)
        depths_N = batch.depths_N[rows_N] if bool((is_read_N & is_inside_N).any()) else None
        groups.append(dataclasses.replace(group, depths_N=depths_N))
    return groups


def _group(batch: Batch, terms: dict[str, TermOptions], term_names: tuple[str, ...], rows_N: Tensor) -> PositionGroup:
    tokens = {token for name in term_names for token in TERMS[name].tokens}
    extra_ids: dict[str, Tensor] = {}
    if "target" in tokens:
        extra_ids["target"] = batch.target_ids_N[rows_N]
    if "teacher_label" in tokens:
        extra_ids["teacher_label"] = HARD_LABELS[terms["hard"].take](batch)[rows_N]
    if "student_top" in tokens:
        extra_ids["student_top"] = torch.zeros_like(rows_N)  # filled in by `with_student_top`, once there are logits
    top = None
    if "kept" in tokens:
        assert batch.teacher is not None
        # the teacher has a row only where weak_N is true: weak_N 0 1 0 1 1 -> rows -1 0 0 1 2, read where it is true
        teacher_rows_N = batch.weak_N.cumsum(0) - 1
        top = batch.teacher.select(teacher_rows_N[rows_N])
    return dataclasses.replace(make_group(rows_N, term_names, extra_ids, top), weights_N=batch.weights_N[rows_N])


def make_group(
    rows_N: Tensor, term_names: tuple[str, ...], extra_ids: dict[str, Tensor], top: TopK | None
) -> PositionGroup:
    """A group from its positions, the terms that read them, the ids [N] of each extra token and the kept entries.

    Every position has weight 1 and depth 0.
    """
    columns = [ids_N[:, None] for ids_N in extra_ids.values()]
    padding = [torch.zeros_like(column, dtype=torch.bool) for column in columns]
    if top is not None:
        is_padding_NK = top.relative_logits_NK == -torch.inf
        # an entry without probability (-inf) is padding: its token then belongs to the tail
        columns.append(torch.where(is_padding_NK, top.ids_NK[:, :1], top.ids_NK).long())
        padding.append(is_padding_NK)
    ids_NJ, is_padding_NJ = torch.cat(columns, dim=1), torch.cat(padding, dim=1)
    return PositionGroup(
        rows_N=rows_N,
        term_names=term_names,
        extra_tokens=tuple(extra_ids),
        ids_NJ=ids_NJ,
        is_padding_NJ=is_padding_NJ,
        is_skipped_NJ=skipped_columns(ids_NJ, is_padding_NJ, len(extra_ids)),
        top=top,
        weights_N=torch.ones(len(rows_N), device=rows_N.device),
        depths_N=None,
    )


def skipped_columns(ids_NJ: Tensor, is_padding_NJ: Tensor, num_extra: int) -> Tensor:
    """bool [N, J]: columns that must not be counted, because they are padding or another column has the same token.

    The first `num_extra` columns are extra tokens. One is skipped if its id is among the kept entries or the extra
    tokens before it: ids 7 7 | 9 7 are skipped as 1 1 | 0 0, and ids 7 7 | 9 8 as 0 1 | 0 0.
    """
    is_skipped_NJ = is_padding_NJ.clone()
    for column in range(num_extra):
        is_same_NJ = (ids_NJ == ids_NJ[:, column : column + 1]) & ~is_padding_NJ
        is_same_NJ[:, column:num_extra] = False  # itself and the extra tokens after it
        is_skipped_NJ[:, column] = is_same_NJ.any(dim=1)
    return is_skipped_NJ


def select_logits(
    logits_NV: Tensor, group: PositionGroup, temperatures: Sequence[float], *, overlap: bool = False
) -> SelectedLogits:
    """What the terms read, from full logits; slow and simple, and autograd differentiates it."""
    rest_NV = logits_NV.scatter(1, group.ids_NJ, LOG_ZERO)
    softmaxes = {T: torch.softmax(rest_NV / T, dim=1) for T in temperatures} if overlap else {}
    overlaps = {}
    for S, softmax_S_NV in softmaxes.items():
        for T, softmax_T_NV in softmaxes.items():
            overlaps[S, T] = (softmax_S_NV * softmax_T_NV).sum(dim=1)
    return SelectedLogits(
        logits_NJ=logits_NV.gather(1, group.ids_NJ),
        log_rest={T: torch.logsumexp(rest_NV / T, dim=1) for T in temperatures},
        is_skipped_NJ=group.is_skipped_NJ,
        extra_tokens=group.extra_tokens,
        largest_rest_N=rest_NV.amax(dim=1),
        overlap=overlaps,
    )


def kd_of_logits(logits_NV: Tensor, top: TopK, options: TermOptions) -> Tensor:
    """The kd term summed over positions, from full logits: for callers that have logits but no model head."""
    group = make_group(torch.arange(len(logits_NV)), ("kd",), {}, top)
    return TERMS["kd"].value(select_logits(logits_NV.float(), group, (options.temperature,)), top, options).sum()
