"""What `--help` prints."""

from __future__ import annotations

from omegaconf import MISSING

from pipeline.config.groups import groups
from pipeline.config.options import options, to_plain
from pipeline.config.study import ROOTS


def help_text(root: str, story: str) -> str:
    """What `--help` prints: the story of the script, its groups with their choices, every option."""
    lines = [story.strip(), "", "Groups (name=choice):"]
    for group, choices in groups().items():
        lines.append(f"  {group:<14} {', '.join(choices)}")
    lines += ["", "Options (name=value; -m and a comma-separated list sweep over values):"]
    for name, default, help in options(ROOTS[root]):
        shown = "must be given" if default is MISSING else to_plain(default)
        lines.append(f"  {name} = {shown}\n      {help}")
    return "\n".join([*lines, "", "Hydra's own flags: --hydra-help.  The configuration as composed: --cfg job."])
