"""What is exported is what was trained, for transformers and for other people's tools."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from support.commands import ROOT, script, train_arguments
from support.export_worker import INPUT_IDS_BS
from support.tiny import CHAT_TEMPLATE, make_model


def test_plain_transformers_says_what_the_engine_said(tmp_path: Path) -> None:
    """ZeRO 0, 1 and 3 on two ranks, after two steps: logits equal bit for bit, in fp32 and in bf16.

    The base's way to generate comes along, though top_k without do_sample is what transformers would not save.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "support" / "export_worker.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    folders = sorted(tmp_path.glob("*-zero?"))
    assert len(folders) == 6
    seen = []
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").eval()
        assert str(model.dtype) == f"torch.{folder.name.split('-')[0]}"
        with torch.no_grad(), one_thread():
            found_BSV = model(input_ids=INPUT_IDS_BS).logits
        assert torch.equal(found_BSV, torch.load(folder / "logits.pt")), folder.name
        assert model.generation_config.top_k == 7
        assert transformers.AutoTokenizer.from_pretrained(folder / "model").chat_template == CHAT_TEMPLATE
        seen.append(found_BSV.float())
    assert not torch.equal(seen[0], seen[3])  # bf16 is not fp32: each was compared with its own


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As the worker has: bf16 sums come out otherwise on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------- EleutherAI's lm-evaluation-harness

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""


@pytest.mark.slow
def test_the_evaluation_harness_scores_as_we_do(tokenizer: Any, data: Path, cache: Path, tmp_path: Path) -> None:
    """A local task on the exported folder: the same log-likelihood of every choice, the same accuracies.

    The student has no more rows than there are tokens: the harness would count the padding's.
    """
    student = make_model(tmp_path / "student", tokenizer, seed=1, padding=0)
    script("train", *train_arguments(student, data, str(cache), steps=12, test__end_token=False), cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "ours.yaml").write_text(TASK.format(file=data / "test.jsonl"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={run / 'model'},dtype=float32", "--tasks", "ours", "--include_path"]
    command += [str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    ours = json.loads((run / "result.json").read_text())["test"]
    found = json.loads(results.read_text())["results"]["ours"]
    assert found["acc,none"] == pytest.approx(ours["accuracy"])
    assert found["acc_bytes,none"] == pytest.approx(ours["accuracy_norm"])
    assert found["acc_norm,none"] == pytest.approx(ours["accuracy_norm"])  # by characters: the text is ASCII
    (samples,) = (tmp_path / "out").rglob("samples_ours_*.jsonl")
    theirs = {
        row["doc"]["prompt"]: [float(choice[0][0]) for choice in row["resps"]]
        for row in map(json.loads, samples.open())
    }
    assert len(theirs) == ours["num_choice_records"]
    predictions = pl.read_parquet(run / "predictions-test.parquet")
    asked = [json.loads(line) for line in (data / "test.jsonl").open()]
    for row, found in zip(asked, predictions["choice_log_probs"], strict=True):
        assert theirs[row["prompt"]] == pytest.approx(list(found), abs=1e-4)
