"""The identity of a cache: a key for each thing that changes its tokens, and only where it does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.verify import findings
from pipeline.cache import manifest as manifests
from pipeline.capture.driver import run
from pipeline.config.schema import (
    ChatConfig,
    CompletionConfig,
    CompletionMode,
    MalformedPolicy,
    Supervise,
    Targets,
    TextConfig,
    TooLongPolicy,
)
from pipeline.core.types import InputError, Manifest
from support.commands import config_of
from support.tiny import make_model, make_tokenizer, prompts, write_lines

CHAT = {"messages": [{"role": "user", "content": "the weak"}, {"role": "assistant", "content": "a shard"}]}


def captured(teacher: Path, folder: Path, rows: list[Any], suffix: str = ".jsonl", **settings: Any) -> Manifest:
    folder.mkdir(exist_ok=True)
    path = write_lines(folder / f"a{suffix}", rows)
    complete = settings.pop("complete", CompletionConfig())
    corpus = TextConfig(files=[str(path)], **settings)
    return manifests.load_manifest(run(config_of(teacher, path, folder, corpus=corpus, complete=complete)))


def keys_of(manifest: Manifest, usual: Manifest) -> set[str]:
    return set(manifest.made_of) - set(usual.made_of)


@pytest.fixture
def usual(teacher: Path, tmp_path: Path) -> Manifest:
    return captured(teacher, tmp_path / "usual", [{"text": "the weak model"}])


CHANGES: dict[str, tuple[list[Any], dict[str, Any], set[str]]] = {
    "lines of JSON": ([{"text": "the weak model"}], {}, set()),
    "lines of text": (["the weak model"], {"suffix": ".txt"}, {"file_suffixes"}),
    "another shape": ([{"instruction": "a", "output": "b"}], {}, {"shape"}),
    "a policy for long prompts": ([{"text": "the weak"}], {"too_long": TooLongPolicy.skip}, {"too_long"}),
    "windows that begin": ([{"text": "the weak"}], {"window_begin_token": True}, {"window_begin_token"}),
    "choices of the text": (prompts(2, labeled=False), {"choices": [" one", " two"]}, {"choices"}),
    "all turns": ([CHAT], {"chat": ChatConfig(supervise=Supervise.all_turns)}, {"chat"}),
    "plain chat": ([CHAT], {}, set()),  # its template ends a turn with its text
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_only_where_it_changes_tokens(name: str, teacher: Path, usual: Manifest, tmp_path: Path) -> None:
    rows, settings, keys = CHANGES[name]
    assert keys_of(captured(teacher, tmp_path / "other", rows, **settings), usual) == keys


def test_records_that_were_tokenized_otherwise_before(data: Path, usual: Manifest, tmp_path: Path) -> None:
    """A template that writes a line break after the end of turn, which was supervised before."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["</>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</>", "</>\n")
    teacher = make_model(tmp_path / "teacher", tokenizer, seed=1)
    assert keys_of(captured(teacher, tmp_path / "chat", [CHAT]), usual) == {"tokenization"}
    assert keys_of(captured(teacher, tmp_path / "text", [{"text": "the weak"}]), usual) == set()


def test_the_date_of_templates_that_read_the_clock(data: Path, usual: Manifest, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    teacher = make_model(tmp_path / "teacher", tokenizer, seed=1)
    first = captured(teacher, tmp_path / "a", [CHAT])
    assert keys_of(first, usual) == {"chat_date"}
    second = captured(teacher, tmp_path / "b", [CHAT], chat=ChatConfig(date="2025-01-01"))
    assert first.fingerprint != second.fingerprint


def test_the_ends_of_completions(teacher: Path, usual: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    make_model(folder, make_tokenizer(), seed=1)
    completing = {
        "complete": CompletionConfig(how=CompletionMode.greedy, max_new_tokens=3),
        "targets": Targets.completion,
    }
    one = captured(folder, tmp_path / "a", [{"prompt": "the weak"}], **completing)
    assert keys_of(one, usual) == {"complete"}
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [1, 40]}))
    other = captured(folder, tmp_path / "b", [{"prompt": "the weak"}], **completing)
    assert other.made_of["end_token_ids"] == [1, 40]


def test_skipped_records_are_in_the_manifest_by_reason(teacher: Path, tmp_path: Path) -> None:
    rows = [{"text": "the weak"}, {"text": 5}, {"text": ""}, "{"]
    path = write_lines(tmp_path / "a.jsonl", rows)
    corpus = TextConfig(files=[str(path)], malformed=MalformedPolicy.skip)
    cache = run(config_of(teacher, path, tmp_path, corpus=corpus))
    manifest = manifests.load_manifest(cache)
    assert manifest.num_skipped == 3
    assert manifest.skipped is not None
    reasons = {reason: count for reason, count in manifest.skipped.items() if reason != "sha256"}
    assert reasons == {"column 'text': expected text": 2, "expected a JSON object": 1}
    assert isinstance(cache, Path)
    assert findings(cache) == []
    changed = dataclasses.replace(manifest, skipped={**manifest.skipped, "expected a JSON object": 2})
    (cache / "manifest.json").write_text(json.dumps(manifests.to_plain(changed), indent=2) + "\n")
    with pytest.raises(InputError, match="skipped: not what was recorded"):
        manifests.load_manifest(cache)
