"""What `--help` prints: the options with the values that the same command would use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.commands import ROOTS, StudyCommand
from pipeline.config.compose import SECTION, chosen_groups, config_dir, register, study_arguments, take_study
from pipeline.config.groups import CONF_DIR, groups
from pipeline.config.options import choices_of, option_types, options, sections, to_plain
from pipeline.config.overrides import FLAGS_WITH_VALUE, completed_overrides
from pipeline.config.synonyms import SYNONYMS, nearest_options
from pipeline.core.types import InputError

FLAGS = ("--help", "-h")
MUST = "must be given"
AT = "A name with @ is a place: {0} takes the file own.yaml of conf/{1} for the options below {2}."
FOOT = (
    "--help WORD ... shows only the options that have one of the words.  Hydra's own flags: --hydra-help.  The "
    "configuration as YAML: --cfg job."
)


def help_words(arguments: Sequence[str]) -> list[str] | None:
    """The words that `--help WORD ...` or `help=WORD` asks for, empty for all options; None if no help is asked for."""
    asked = [argument.removeprefix("help=") for argument in arguments if argument.startswith("help=")]
    if not asked and not {*FLAGS} & {*arguments}:
        return None
    first = min((arguments.index(flag) for flag in FLAGS if flag in arguments), default=len(arguments))
    words, before = list[str](), ""
    for word in arguments[first:]:
        if not word.startswith("-") and "=" not in word and before not in FLAGS_WITH_VALUE:
            words.append(word)
        before = word
    return asked + words


def help_text(root: str, story: str, arguments: Sequence[str] = ()) -> str:
    """The story of a script, its groups with their choices, and every option with its value and its sentence.

    The values are those of the command with the same arguments, among them study= and experiment=. With words after
    --help, only the options that have one of them in their name, else in their sentence.
    """
    values, chosen, note = _effective(root, arguments)
    words = help_words(arguments) or []
    entries = _entries(root, values, words)
    if words:
        return "\n".join(entries or [_nothing(root, words)])
    places = _places(chosen, groups(config_dir([*arguments])), arguments)
    head = [story.strip(), ""]
    if values is not None:
        head += ["Groups (name=choice takes a file of conf/):", *places, *_explained(chosen), ""]
    head += ["Options (name=value; -m and a comma-separated list sweep over values):", *([note] if note else [])]
    return "\n".join([*head, *entries, "", FOOT])


# --------------------------------------------------------------------------------- effective values


def _effective(root: str, arguments: Sequence[str]) -> tuple[DictConfig | None, dict[str, Any], str]:
    """The composed configuration, the choice of each group, and why there is none where that is so."""
    given = [word for word in arguments if "=" in word and not word.startswith(("-", "help="))]
    own_folder = config_dir([*arguments])
    try:
        study, rest = take_study([*given, *(["--config-dir", own_folder] if own_folder else [])])
        rest = study_arguments(rest, ROOTS[root]) if issubclass(ROOTS[root], StudyCommand) else rest
        register(study, chosen=chosen_groups(rest), roots=[root])
        completed, _ = completed_overrides(root, rest)
        overrides = [_first_of_sweep(word) for word in completed if "=" in word and not word.startswith("-")]
        if own_folder:
            overrides.insert(0, f"hydra.searchpath=[file://{own_folder}]")
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose(root, overrides=overrides, return_hydra_config=True)
    except (InputError, HydraException, OmegaConfBaseException) as error:
        return None, {}, f"(declared defaults, because these options do not compose: {str(error).splitlines()[0]})"
    chosen = {name: choice for name, choice in composed.hydra.runtime.choices.items() if "/" not in name}
    return composed, {name: choice for name, choice in chosen.items() if not name.startswith(f"{SECTION}@")}, ""


def _first_of_sweep(word: str) -> str:
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{word.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"


def _value(values: DictConfig | None, name: str, default: Any) -> str:
    """The value of an option as it is written on the command line."""
    node: Any = values
    *parents, last = name.split(".")
    for depth, part in enumerate(parents, start=1):
        node = None if node is None or OmegaConf.is_missing(node, part) else node[part]
        if node is None and default is MISSING and values is not None:
            return f"{MUST} where {'.'.join(parents[:depth])} is used"
    if node is None:  # below a section that is null: what it would be there
        return _written(default)
    return MUST if OmegaConf.is_missing(node, last) else _written(node[last])


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, enum_to_str=True)
    value = to_plain(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return MUST if value == MISSING else str(value)


# ------------------------------------------------------------------------------------------ entries


def _entries(root: str, values: DictConfig | None, words: Sequence[str]) -> list[str]:
    """Two lines for each option: name and value, with the names of an enum; the sentence."""
    types = option_types(ROOTS[root])
    shown = _matching(root, words) if words else set(types)
    empty = [name for name, may_be_null, _ in sections(ROOTS[root]) if may_be_null and _is_null(values, name)]
    lines: list[str] = []
    for name, default, sentence in options(ROOTS[root]):
        if name not in shown:
            continue
        above = [section for section in empty if name.startswith(f"{section}.")]
        for section in above:
            lines.append(f"  {section} = null   (any of the next options turns it on)")
            empty.remove(section)
        choices = f"   ({' | '.join(choices_of(types[name]))})" if choices_of(types[name]) else ""
        lines.append(f"  {name} = {_value(values, name, default)}{choices}\n      {sentence}")
    return lines


def _is_null(values: DictConfig | None, name: str) -> bool:
    """Whether a section is null; without a configuration those that may be null are."""
    if values is None:
        return True
    return functools.reduce(lambda node, part: None if node is None else node[part], name.split("."), values) is None


def _matching(root: str, words: Sequence[str]) -> set[str]:
    """The options with one of the words in their name, or called so by other tools; else in their sentence."""
    found = set[str]()
    sentences = {name: sentence for name, _, sentence in options(ROOTS[root])}
    for word in words:
        by_name = {name for name in sentences if word.lower() in name}
        by_name |= sentences.keys() & SYNONYMS.get(word.lower(), ())
        by_sentence = {name for name, sentence in sentences.items() if word.lower() in sentence.lower()}
        found |= by_name or by_sentence or set(nearest_options(word, [*sentences]))
    return found


def _nothing(root: str, words: Sequence[str]) -> str:
    return f"No option of {root} has {' or '.join(words)} in its name or its sentence; --help alone lists all."


def _explained(chosen: dict[str, Any]) -> list[str]:
    """What @ in the name of a place means, on the last place of this script."""
    place = max((name for name in chosen if "@" in name), default=None)
    return [] if place is None else [AT.format(f"{place}=own", *place.split("@"))]


def _places(chosen: dict[str, Any], known: dict[str, list[str]], arguments: Sequence[str]) -> list[str]:
    """One line for each place of a group that the script has: what is chosen there, and what can be."""
    study = next((word.partition("=")[2] for word in arguments if word.startswith("study=")), None)
    lines = []
    for place, choice in sorted((chosen | {"study": study}).items()):
        lines.append(f"  {place} = {_written(choice)}   ({' | '.join(known.get(place.split('@')[0], []))})")
    return lines
