"""The folders of `conf/`: groups of files to choose from, and the places where a script uses them."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = PACKAGE / "conf"


def groups(own_folder: str | None = None) -> dict[str, list[str]]:
    """The groups of `conf/`, and of a folder of the user's own of the same layout, with their choices."""
    found: dict[str, set[str]] = {}
    for root in [CONF_DIR] + ([Path(own_folder)] if own_folder else []):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
            found.setdefault(folder.name, set()).update(path.stem for path in folder.glob("*.yaml"))
    return {name: sorted(choices) for name, choices in found.items()}


def places(root: str, group: str) -> list[str]:
    """The places where the defaults of a root use a group, as model@student; none where it is used without a place."""
    text = (CONF_DIR / f"{root}.yaml").read_text() if (CONF_DIR / f"{root}.yaml").exists() else ""
    return re.findall(rf"^ +- ({group}@[\w.]+):", text, re.MULTILINE)
