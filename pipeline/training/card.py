"""The model card of an exported student: what it was made of, how it was trained, its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from pipeline.core.files import is_hub_name

EXPORTED = {"last": "the last", "best": "the best of those evaluated on dev"}
LIBRARIES = ("torch", "transformers", "deepspeed")


def card(*, base: str, identity: dict[str, Any], result: dict[str, Any]) -> str:
    """README.md of an exported model, as the hub reads it: front matter, then text.

    `identity` and `result` are identity.json and result.json of its run. No path of the machine is in it: of a local
    `base` only the folder's name, which the hub could not resolve, stands in the text.
    """
    options = identity["options"]
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- weak-to-strong",
        "- distillation",
    ]
    if is_hub_name(base):
        front.insert(0, f"base_model: {base}")
    else:
        base = base.rstrip("/").rsplit("/", 1)[-1]
    lines = ["---", *front, "---", "", f"# {result['name']}, seed {result['seed']}", ""]
    lines += [
        _summary(base, options["student"]["adapter"]),
        "",
        "## Scores",
        "",
        *_table(["split", "records", "accuracy", "exact match", "nll a target"], _scores(result)),
        "",
        "## Made of",
        "",
        *_table(["what", "sha256"], _inputs(identity, result)),
        "",
        "## Objective",
        "",
        *_table(["term", "weight", "on"], _terms(options["loss"])),
        "",
        _training(options, result),
        "",
        "All options:",
        "",
        "```json",
        json.dumps(options, indent=1, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _summary(base: str, adapter: dict[str, Any] | None) -> str:
    text = f"`{base}`, trained on a weak teacher's captured logits and a trusted gold set under one objective."
    if adapter is None:
        return text
    layers = ", ".join(adapter["targets"] or ["all linear layers but the head"])
    text += f" A {'DoRA' if adapter['dora'] else 'LoRA'} adapter of rank {adapter['rank']} and alpha {adapter['alpha']}"
    text += f" on {layers} was trained, and is merged into these weights."
    full = " and ".join(name for name in ("embeddings", "head") if adapter[f"train_{name}"])
    return f"{text} Also fully trained: {full}." if full else text


def _training(options: dict[str, Any], result: dict[str, Any]) -> str:
    text = f"The weights of step {result['exported_step']}, {EXPORTED[options['export']['what']]}. "
    text += f"{result['steps']} steps of {options['global_batch']} sequences, "
    text += f"gold fraction {options['gold_fraction']}, peak learning rate {options['optimizer']['learning_rate']}"
    text += "; " if options["gold"] is None else f", window {options['window']}; "  # that of a cache is the capture's
    return text + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _held_out(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = {split: result[split] for split in ("dev", "test") if result.get(split)}
    yield from (entries | result.get("more", {})).items()


def _scores(result: dict[str, Any]) -> Iterator[list[str]]:
    for name, scores in _held_out(result):
        accuracy = _fraction(scores["accuracy"], scores["num_choice_records"])
        exact_match = _fraction(scores["exact_match"], scores["num_free_records"])
        nll = "" if scores["nll"] is None else f"{scores['nll']:.4f}"
        domain = " (out of domain)" if scores.get("out_of_domain") else ""
        yield [name + domain, str(scores["num_records"]), accuracy, exact_match, nll]


def _fraction(value: float | None, count: int) -> str:
    return "" if value is None else f"{value:.4f} ± {math.sqrt(value * (1 - value) / count):.4f}"


def _inputs(identity: dict[str, Any], result: dict[str, Any]) -> Iterator[list[str]]:
    yield ["student's weights, before", identity["student"][0]]
    yield ["tokenizer", identity["student"][1]]
    known = {"cache": "cache of the teacher's logits", "more_caches": "mixed with it", "gold_cache": "cache of gold"}
    for name, what in (known | {"gold": "gold"}).items():
        hashes = identity.get(name, [])
        yield from ([what, sha256] for sha256 in (hashes if isinstance(hashes, list) else [hashes]))
    yield from ([f"{name}, as it is read", scores["text"]] for name, scores in _held_out(result))


def _terms(loss: dict[str, Any]) -> Iterator[list[str]]:
    for name, term in loss.items():
        if isinstance(term, dict) and term.get("weight", 0) > 0:
            what = f"{name} ({term['divergence']}, T {term['temperature']})" if "divergence" in term else name
            yield [what, f"{term['weight']} ({term['ramp']['shape']})", ", ".join(term["on"])]


def _table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
