"""The folders of `conf/`: groups of choices."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = PACKAGE / "conf"


def groups() -> dict[str, list[str]]:
    """The groups of `conf/` with their choices."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }
