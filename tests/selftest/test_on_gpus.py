"""`pytest -m gpu`: the checks of scripts/selftest.py, each as a test, where there is a GPU."""

from __future__ import annotations

import pytest

from pipeline.selftest.commands import CHECKS
from pipeline.selftest.outcomes import Outcome
from pipeline.selftest.place import Place

pytestmark = [pytest.mark.gpu, pytest.mark.alone]  # alone: they measure time and memory


@pytest.mark.parametrize("name", CHECKS)
def test_this_machine(name: str, place: Place) -> None:
    finding = CHECKS[name](place)
    if finding.outcome is Outcome.SKIPPED:
        pytest.skip(finding.figures)
    assert finding.outcome is Outcome.PASS, finding.figures
