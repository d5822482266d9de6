"""All figures of the arms of a study on one held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.analysis.values import ArmPredictions, HeldOut, TextFigures


def text_figures(arms: Sequence[ArmPredictions], held_out: HeldOut, metric: str) -> TextFigures:
    """Scores, differences, PGR, calibration, imitation and slices of all arms on one held-out text."""
    raise NotImplementedError
