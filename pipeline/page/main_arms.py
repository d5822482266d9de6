"""Which arms of a text the page shows where it does not show all."""

from __future__ import annotations

from pipeline.analysis.values import ArmFigures, TextFigures
from pipeline.page.numbers import ROLES


def main_arms(text: TextFigures) -> dict[str, ArmFigures]:
    """The arm of each role on which conclusions rest, by role, in the order in which one reads them."""
    found = {figures.arm.role: figures for figures in text.arms if figures.arm.is_main}
    return {role: found[role] for role in sorted(found, key=list(ROLES).index)}


def first_of(text: TextFigures, *roles: str) -> ArmFigures | None:
    """The main arm of the first of these roles that the text has; None if it has none of them."""
    arms = main_arms(text)
    return next((arms[role] for role in roles if role in arms), None)


def studied_arm(text: TextFigures) -> ArmFigures | None:
    """The arm that the study is about: combined, or what comes nearest to it."""
    return first_of(text, "combined", "weak_only", "gold_only")
