"""Which runs of a study's folder its report reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.cache.manifest import fingerprint
from pipeline.core.files import write_json
from pipeline.core.types import Manifest
from pipeline.report.pools import pool_of
from pipeline.study.driver import folders_of


def make_run(folder: Path, role: str, *, cache: Path | None = None) -> Path:
    folder.mkdir()
    read = "null" if cache is None else str(cache)
    (folder / "config.yaml").write_text(f"name: {role}\nrole: {role}\ncache: {read}\nan_option_of_yesterday: 3\n")
    fingerprint = {} if cache is None else {"cache": json.loads((cache / "manifest.json").read_text())["fingerprint"]}
    (folder / "identity.json").write_text(json.dumps(fingerprint))
    (folder / "result.json").write_text("{}")
    return folder


def test_the_report_is_of_one_teacher_and_one_ceiling_whatever_version_wrote_its_runs(tmp_path: Path) -> None:
    """An option that no longer exists does not end a study after all its runs."""
    names = ("teacher-a", "teacher-b", "gold_only-a", "ceiling-a", "ceiling-b")
    runs = {name: make_run(tmp_path / name, name[:-2]) for name in names}
    study: Any = SimpleNamespace(file=SimpleNamespace(runs_dir=str(tmp_path)))

    def found(*made: str) -> list[str]:
        return [folder.name for folder in folders_of(study, [runs[name] for name in made], None)]

    assert found("teacher-b") == ["ceiling-a", "ceiling-b", "gold_only-a", "teacher-b"]
    assert found("teacher-b", "ceiling-a") == ["ceiling-a", "gold_only-a", "teacher-b"]


def make_cache(folder: Path, made_of: dict[str, Any]) -> Path:
    manifest = Manifest(
        schema_version=1,
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        kind="topk",
        k=4,
        draws=0,
        draw_seed=0,
        temperatures=(1.0,),
        vocabulary_size=300,
        window=64,
        num_records=3,
        num_shards=1,
        records_per_shard=3,
    )
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", dataclasses.asdict(manifest))
    return folder


def test_the_report_has_the_students_of_the_capture_and_of_its_pools_and_no_members(tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    own, other = (make_cache(caches / name, {"weights": name}) for name in ("own", "other"))
    settings = {"weights": [0.5, 0.5], "temperature": 1.0}
    pools = {
        name: make_cache(
            caches / f"pool-{name}",
            {"pool": "logarithmic", "members": [fingerprint({"weights": name}), ["a", "b"]], **settings},
        )
        for name in ("own", "other", "gone")
    }
    runs = tmp_path / "runs"
    runs.mkdir()
    made = [make_run(runs / "combined-a", "combined", cache=own)]
    make_run(runs / "combined-b", "combined", cache=other)
    make_run(runs / "cross_fit-a", "member", cache=own)
    for name, pool in pools.items():
        make_run(runs / f"pooled-{name}", "combined", cache=pool)
    shutil.rmtree(pools["gone"])
    study: Any = SimpleNamespace(file=SimpleNamespace(runs_dir=str(runs)))
    assert [folder.name for folder in folders_of(study, made, str(own))] == ["combined-a", "pooled-own"]
    assert pool_of(str(own), fingerprint({"weights": "own"})) is None
    assert pool_of(str(pools["own"]), "of another cache that lay there") is None
