"""The one command that a verdict prints: the study's own command with other options.

Most of them are a `grid=`, because it changes the combined students alone: those that they are compared with stay as
they are, and nothing that has been trained is trained again. What a grid set for the judged arm is set again, because
the study's own command knows nothing of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.analysis.curve_ends import num_steps
from pipeline.analysis.findings import Findings

ENOUGH_SEEDS = 5
"""More seeds narrow an interval little: the test records then decide its width."""
FEW_SEEDS = 3
"""The fewest seeds from which the noise between seeds is estimated with some confidence."""
INPUTS = ("gold", "gold_cache", "cache", "more_caches", "student", "dev", "dev_goal", "test", "few_shot", "pool")
"""What an arm was made of: the study's file gives it, no grid does."""
SHORT_NAMES = {"kd_weight": "loss.kd.weight"}
"""Of the options of a grid here."""
OF_POOLS = ("folds", "stop_after_pool", "pool.")
"""Options of a study's command that only the experiment pooled reads."""
POOL_OPTIONS = ("pool.kind", "pool.weights", "pool.temperature")
"""What tells two pools apart and is an option."""
LENGTH = {"epochs", "steps"}
"""One of them decides how long a training is; the other has to be null."""


def more_seeds(found: Findings) -> str:
    """Three seeds, then five; beyond that whatever is not yet known about the teacher."""
    seeds = _seeds(found)
    wanted = FEW_SEEDS if len(seeds) < FEW_SEEDS else ENOUGH_SEEDS
    if len(seeds) >= wanted:
        return _next_check(found)
    return _command(found, {"seeds": ",".join(map(str, _up_to(seeds, wanted)))})


def check_gain(found: Findings) -> str:
    """Of a good result: is it so with three seeds, is it the teacher's knowledge, is there a better weight."""
    return more_seeds(found) if len(_seeds(found)) < FEW_SEEDS else _next_check(found)


def _next_check(found: Findings) -> str:
    return shuffled_control(found) if found.over_shuffled is None else _both_sides(found)


def shuffled_control(found: Findings) -> str:
    """Does a teacher without knowledge do as well?"""
    return _command(found, {"controls": "[shuffled]"})


def lower_kd_weight(found: Findings) -> str:
    """A third, and down to a thirtieth of the KD weight or a third of the LM weight, whichever is less.

    With one term for the label and one for a teacher that is wrong, both of them nats a position, the larger weight
    decides in the end: only below the LM weight can the labels win.
    """
    if (weight := _kd_weight(found)) == 0:
        return _command(found, {"grid": "loss.hard.weight:0.1,0.3"})
    lm_weight = found.combined.arm.lm_weight if found.combined else 0.0
    least = min(weight / 30, lm_weight / 3) if lm_weight > 0 else weight / 30
    highest = weight / 3
    return _grid(found, "kd_weight", least, (least * highest) ** 0.5, highest)


def higher_kd_weight(found: Findings) -> str:
    """From the weight that was found better, or else from three times the present one, upward."""
    known = found.higher is not None and found.higher_over is not None and (found.higher_over.low or 0.0) > 0
    weight = found.higher.arm.kd_weight if known and found.higher else 3 * _kd_weight(found)
    return _grid(found, "kd_weight", weight, 3 * weight) if weight > 0 else _grid(found, "kd_weight", 0.3, 1.0)


def _both_sides(found: Findings) -> str:
    weight = _kd_weight(found)
    return _grid(found, "kd_weight", weight / 3, weight, 3 * weight) if weight > 0 else higher_kd_weight(found)


def confident_positions(found: Findings) -> str:
    """Leave out the positions at which the teacher is least sure."""
    return _command(found, {"grid": "loss.kd.gate.keep_fraction:0.5,0.8"})


def check_teacher(found: Findings) -> str:
    """The control, if it was not run; else whether the surest part of the teacher is worth anything."""
    if found.over_shuffled is None:
        return shuffled_control(found)
    return _command(found, {"grid": "loss.kd.gate.keep_fraction:0.1,0.3"})


def less_gold(found: Findings) -> str:
    """Fewer passes over gold: half and a quarter of its share of a batch."""
    fraction = found.combined.arm.gold_fraction if found.combined else 0.0
    return _grid(found, "gold_fraction", fraction / 4, fraction / 2)


def train_longer(found: Findings) -> str:
    """Twice and four times as long."""
    epochs = found.study.counts.get("epochs")
    if epochs:
        return _command(found, {"grid": f"epochs:{2 * epochs:g},{4 * epochs:g}"})
    steps = num_steps(found.study, found.combined) if found.combined else None
    assert steps is not None, "a loss that still falls was read off a curve"
    return _command(found, {**_alone(found), "epochs": "null", "steps": str(2 * steps)})


def missing_runs(found: Findings) -> str:
    """The study as it is declared trains what is missing."""
    return _written(found, {})


# --------------------------------------------------------------------------------------- the command


def _alone(found: Findings) -> dict[str, str]:
    """Options for every student then reach the judged one and its controls alone; of a pool also what makes it."""
    return _of_pool(found) or {"experiments": "[combined]"}


def _of_pool(found: Findings) -> dict[str, str]:
    """The options that ask for the judged arm's pool: those that tell it from others; none where it reads none."""
    if found.combined is None or not found.combined.arm.is_pool:
        return {}
    differing = found.combined.arm.differing
    values = {name: _text(differing[name]) for name in POOL_OPTIONS if name in differing}
    if "pool.weights" in values:  # 0.3/0.7
        values["pool.weights"] = f"[{values['pool.weights'].replace('/', ',')}]"
    return {"experiments": "[pooled]", **values}


def _kd_weight(found: Findings) -> float:
    return found.combined.arm.kd_weight if found.combined else 0.0


def _seeds(found: Findings) -> tuple[int, ...]:
    return found.combined.arm.seeds if found.combined else ()


def _up_to(seeds: tuple[int, ...], number: int) -> tuple[int, ...]:
    """These seeds and the smallest others, `number` in all."""
    others = [seed for seed in range(1, number + len(seeds) + 1) if seed not in seeds]
    return (*seeds, *others[: max(number - len(seeds), 0)])


def _grid(found: Findings, name: str, *values: float) -> str:
    """Values rounded to one digit."""
    return _command(found, {"grid": f"{name}:{','.join(format(float(format(value, '.1g')), 'g') for value in values)}"})


def _command(found: Findings, options: Mapping[str, str]) -> str:
    """The study's command with these options, for the settings of the judged arm.

    Where combined is repeated, by a grid or with more seeds, its settings are further axes of the grid, so that other
    students stay as they are; else they are options of combined and its controls, which are then trained alone.
    """
    chosen = dict(_settings(found, options))
    is_repeated = "grid" in options or "seeds" in options
    if is_repeated:  # a grid is of combined, unless only the pool's students are asked for
        options = {**_of_pool(found), **options}
    if not chosen:
        return _written(found, options)
    if is_repeated:
        axes = [options["grid"]] if "grid" in options else []
        return _written(found, {**options, "grid": ";".join([*axes, *(f"{n}:{value}" for n, value in chosen.items())])})
    return _written(found, {**_alone(found), **options, **chosen}, without=("grid",))


def _settings(found: Findings, options: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What tells the judged arm from others of combined, as options; without those that `options` set.

    Without inputs, too, and without lists and absent values, which a grid cannot set.
    """
    axis = options.get("grid", "").partition(":")[0]
    given = {SHORT_NAMES.get(axis, axis), *options}
    if given & LENGTH:
        given |= LENGTH
    for name, value in found.combined.arm.differing.items() if found.combined else ():
        is_plain = isinstance(value, (int, float, str)) or (value is None and name in LENGTH)
        if is_plain and name not in given and name.partition(".")[0] not in INPUTS:
            yield name, _text(value)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _written(found: Findings, options: Mapping[str, str], without: tuple[str, ...] = ()) -> str:
    """The study's command with these options in place of its own, and with the seeds that the study has.

    Options of the training stay: other students of the study have them too, and a grid replaces them for its own.
    """
    own, seeds = shlex.split(found.study.command), _seeds(found)
    if seeds not in ((), (1,)) and not any(_name(part) == "seeds" for part in own):
        options = {"seeds": ",".join(map(str, seeds)), **options}
    kept = [part for part in own if _name(part) not in (*options, *without)]
    asked = options.get("experiments") or next((part for part in own if _name(part) == "experiments"), "")
    if "pooled" not in asked:
        kept = [part for part in kept if not _name(part).startswith(OF_POOLS)]
    return shlex.join([*kept, *(f"{name}={value}" for name, value in options.items())])


def _name(part: str) -> str:
    """The name of the option in a word of a command line."""
    return part.partition("=")[0] if "=" in part else ""
