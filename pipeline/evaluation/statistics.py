"""What the scores of several runs say together. Pure."""

from __future__ import annotations


def performance_gap_recovered(score: float, *, weak: float, ceiling: float) -> float | None:
    """PGR = (score - weak) / (ceiling - weak), never clamped (Burns et al. 2023, arXiv 2312.09390, section 3).

    None where the ceiling does not lie above the weak score: there is no gap then.
    """
    if ceiling <= weak:
        return None
    return (score - weak) / (ceiling - weak)
