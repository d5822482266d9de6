"""What a run's pool is made of: read from the cache while it is there, and from the copy of a run after that."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.pools import is_made_from, keep_pool, kept_pool, settings_of

POOL = {
    "schema_version": 1,
    "pool": "logarithmic",
    "members": ["a" * 64, ["b" * 64, "c" * 64]],
    "weights": [1 / 3, 2 / 3],
    "temperature": 0.5,
    "tokenizer": "t",
    "targets": "next",
    "fit": {"records": 30},
}


def test_a_capture_is_a_member_alone_or_as_one_of_the_folds() -> None:
    assert is_made_from(POOL, "a" * 64)
    assert is_made_from(POOL, "c" * 64)
    assert not is_made_from(POOL, "d" * 64)
    assert not is_made_from(None, "a" * 64)


def test_the_settings_are_those_of_the_command_line_and_tell_members_apart() -> None:
    found = settings_of(POOL)
    assert {name: value for name, value in found.items() if name != "pool.members"} == {
        "pool.kind": "logarithmic",
        "pool.weights": "0.333/0.667",
        "pool.temperature": 0.5,
        "pool.round": 1,
    }
    assert settings_of(POOL | {"members": ["a" * 64, ["b" * 64]]})["pool.members"] != found["pool.members"]


def test_a_copy_of_a_run_knows_its_pool(tmp_path: Path) -> None:
    keep_pool(tmp_path, None)
    assert kept_pool(tmp_path) is None
    keep_pool(tmp_path, POOL)
    assert kept_pool(tmp_path) == POOL
