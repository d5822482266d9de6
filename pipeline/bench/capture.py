"""Stage one against the bare forward it cannot be faster than, and against the script one would write instead."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.bench.timing import Figure, Findings, figure, in_turn, ratios, seconds, shown, table
from pipeline.cache import manifest as manifests
from pipeline.cache.sequence_files import open_sequence_file, sequence_file
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.capture.worker import run_worker
from pipeline.config.schema import CaptureConfig, ModelConfig, Targets, TextConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import TokenSequence
from pipeline.data.packing import collate_inputs
from pipeline.models import loading as models
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL, CORPUS = ROOT / "data/demo/smollm2-135m", ROOT / "data/demo/corpus.jsonl"
K, WINDOW, BATCH = 64, 64, 16


def run(quick: bool) -> Findings:
    """tokens/s of capture over those of `model(...)` alone and of a plain script, in turn; k = 64, the demo's corpus.

    Every token is a target here, as in plain text: the demo's one target a record would let capture skip nine tenths
    of the head, and beat the forward that it is compared with.
    """
    keep_allocator_memory()
    teacher = models.resolve_dtype(ModelConfig(path=str(MODEL), attention="eager"))
    model = models.open_model(teacher, compute_device())
    prepared = prepack(models.open_model(teacher, compute_device()))  # as a capture opens it
    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        lines = CORPUS.read_text().splitlines(keepends=True)
        corpus.write_text("".join(lines[:450] if quick else lines))
        config = options(teacher, corpus, folder / "caches", Targets.all)
        one_target = options(teacher, corpus, folder / "caches", Targets.next)
        request = plan_folder(config)
        make_plan(config, request)
        sequences = list(open_sequence_file(sequence_file(request.sequences, 0)))
        num_tokens = sum(len(sequence.input_ids_S) for sequence in sequences)
        prompts = [json.loads(line)["prompt"] for line in corpus.read_text().splitlines()]
        things = {
            "forward": lambda: num_tokens / seconds(lambda: forward(model, sequences)),
            "capture": lambda: num_tokens / seconds(lambda: capture(prepared, config)),
            "capture, one target a record": lambda: num_tokens / seconds(lambda: capture(prepared, one_target)),
            "plain script": lambda: num_tokens / seconds(lambda: plain_script(model, tokenizer, prompts, folder)),
        }
        found = in_turn(things, runs=3 if quick else 5)
        share = top_k_seconds(model, sequences) * figure(found["capture"]).median / num_tokens
        workers = None if quick else two_workers(config, folder)
    findings: Findings = {
        "capture.tokens_per_second": figure(found["capture"]),
        "capture.forward_tokens_per_second": figure(found["forward"]),
        "capture.ratio_to_forward": ratios(found["capture"], found["forward"]),
        "capture.ratio_to_plain_script": ratios(found["capture"], found["plain script"]),
        "capture.top_k_fraction": figure([share]),
    }
    rows = [["", "tokens/s", "over the forward"]]
    rows += [[name, shown(figure(v), ".0f"), shown(ratios(v, found["forward"]))] for name, v in found.items()]
    title = f"capture: SmolLM2-135M in {teacher.dtype.name}, {num_tokens} tokens, window {WINDOW}, k {K}"
    print(table(title, rows))
    print(f"  capture over the plain script: {shown(ratios(found['capture'], found['plain script']))}")
    print(f"  top-k, tail and entropy: {share:.1%} of capture's time")
    if workers is not None:
        findings["capture.two_workers_ratio"] = workers
        print(f"  two workers over one, whole command, model loading included: {shown(workers)}")
    return findings


def options(teacher: ModelConfig, corpus: Path, caches_dir: Path, targets: Targets) -> CaptureConfig:
    """A capture of every token."""
    return CaptureConfig(
        name="bench",
        caches_dir=str(caches_dir),
        teacher=teacher,
        corpus=TextConfig(files=[str(corpus)], targets=targets),
        window=WINDOW,
        k=K,
        batch_sequences=BATCH,
        log_every_seconds=1e9,
    )


@torch.inference_mode()
def forward(model: Model, sequences: Sequence[TokenSequence]) -> None:
    """The same packed batches through the model's own forward; its logits are thrown away."""
    for first in range(0, len(sequences), BATCH):
        input_ids_BS, position_ids_BS, _ = collate_inputs(sequences[first : first + BATCH])
        logits_BSV = model(
            input_ids=input_ids_BS.to(model.device), position_ids=position_ids_BS.to(model.device), use_cache=False
        ).logits
        logits_BSV[0, 0, 0].item()  # a GPU has answered when a number is here


def capture(model: Model, config: CaptureConfig) -> None:
    """From text to committed shards, in a new folder: tokenize, pack, forward, top-k, write, fsync."""
    shutil.rmtree(config.caches_dir, ignore_errors=True)
    request = plan_folder(config)
    manifest = make_plan(config, request)
    cache = Path(config.caches_dir) / "cache"
    manifests.create_cache(cache, manifest)
    run_worker(config, cache, request.sequences, range(manifest.num_shards), teacher=model)
    manifests.finalize_cache(cache, manifest, stale_seconds=config.lease_seconds)


@torch.inference_mode()
def plain_script(model: Model, tokenizer: object, prompts: Sequence[str], folder: Path) -> None:
    """What one writes in ten lines: padded batches, a full fp32 log-softmax, topk, torch.save."""
    assert callable(tokenizer)
    for number, first in enumerate(range(0, len(prompts), BATCH)):
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts[first : first + BATCH]]
        longest = max(map(len, encoded))
        input_ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded], device=model.device)
        mask_BS = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in encoded], device=model.device)
        logits_BSV = model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False).logits
        top = torch.log_softmax(logits_BSV.float(), dim=-1).topk(K, dim=-1)
        torch.save({"ids": top.indices.cpu(), "log_p": top.values.cpu()}, folder / f"plain-{number}.pt")


@torch.inference_mode()
def top_k_seconds(model: Model, sequences: Sequence[TokenSequence]) -> float:
    """What top-k, tail and entropy take of a capture, measured by themselves on one batch of real logits."""
    batch = sequences[:BATCH]
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = hidden_states(model, input_ids_BS.to(model.device), position_ids_BS.to(model.device))
    hidden_NH = hidden_BSH.flatten(0, 1)[flat_N.to(model.device)][:512]
    logits_NV = logits(model, hidden_NH, model.config.vocab_size)
    times = [seconds(functools.partial(top_k_and_entropy, logits_NV, k=K, temperatures=(1.0,))) for _ in range(5)]
    return figure(times).median / len(logits_NV) * sum(len(sequence.target_ids_N) for sequence in sequences)


def two_workers(config: CaptureConfig, folder: Path) -> Figure:
    """Seconds of one worker over seconds of two, each with its share of the cores, of the whole command."""

    def command(num_workers: int) -> float:
        caches = folder / f"workers-{num_workers}"
        shutil.rmtree(caches, ignore_errors=True)
        arguments = {
            "name": "bench",
            "caches_dir": caches,
            "teacher.path": MODEL,
            "corpus.files": f"[{config.corpus.files[0]}]",
            "corpus.targets": "all",
            "records_per_shard": 30,
            "num_workers": num_workers,
        }
        words = [sys.executable, str(ROOT / "scripts/capture.py"), *(f"{n}={v}" for n, v in arguments.items())]
        started = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        return time.perf_counter() - started

    found = in_turn({"one": lambda: command(1), "two": lambda: command(2)}, runs=3, warm_up=False)
    return ratios(found["one"], found["two"])
