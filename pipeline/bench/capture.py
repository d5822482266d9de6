"""The speed of stage one, compared with the model's forward pass alone (an upper bound) and with a simple script."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.bench.timing import (
    Figure,
    Results,
    format_figure,
    ratios,
    run_in_turns,
    seconds,
    summarize,
    table,
)
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
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL, CORPUS = ROOT / "data/demo/smollm2-135m", ROOT / "data/demo/corpus.jsonl"
K, WINDOW, BATCH = 64, 64, 16
QUICK_RECORDS = 700  # the plan takes about 0.8 s whatever their number: of 450 a fifth where bfloat16 is fast


def run(quick: bool) -> Results:
    """Tokens per second of capture, of `model(...)` alone and of a simple script, on the demo's corpus with k = 64.

    Every token is a target, as in plain text. With the demo's own setting, one target per record, capture computes the
    head at a tenth of the positions only, and would be faster than the forward pass that it is compared with.
    """
    keep_allocator_memory()
    teacher = resolve_dtype(ModelConfig(path=str(MODEL), attention="eager"))
    model = open_model(teacher, compute_device())
    prepared = prepack(open_model(teacher, compute_device()))  # capture prepares its model like this
    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        lines = CORPUS.read_text().splitlines(keepends=True)
        corpus.write_text("".join(lines[:QUICK_RECORDS] if quick else lines))
        config = options(teacher, corpus, folder / "caches", Targets.all)
        one_target_config = options(teacher, corpus, folder / "caches", Targets.next)
        request = plan_folder(config)
        make_plan(config, request)
        sequences = list(open_sequence_file(sequence_file(request.sequences, 0)))
        num_tokens = sum(len(sequence.input_ids_S) for sequence in sequences)
        prompts = [json.loads(line)["prompt"] for line in corpus.read_text().splitlines()]
        variants: dict[str, Callable[[], None]] = {
            "forward": lambda: forward(model, sequences),
            "capture": lambda: capture(prepared, config),
            "capture, one target per record": lambda: capture(prepared, one_target_config),
            "plain script": lambda: plain_script(model, tokenizer, prompts, folder),
        }
        measurements = {name: functools.partial(speed_of, num_tokens, call) for name, call in variants.items()}
        speeds = run_in_turns(measurements, runs=3 if quick else 5)
        top_k_fraction = top_k_seconds(model, sequences) * summarize(speeds["capture"]).median / num_tokens
        two_workers_ratio = None if quick else compare_two_workers(config, folder)
    to_plain_script = ratios(speeds["capture"], speeds["plain script"])
    results: Results = {
        "capture.tokens_per_second": summarize(speeds["capture"]),
        "capture.forward_tokens_per_second": summarize(speeds["forward"]),
        "capture.ratio_to_forward": ratios(speeds["capture"], speeds["forward"]),
        "capture.ratio_to_plain_script": to_plain_script,
        "capture.top_k_fraction": summarize([top_k_fraction]),
    }
    rows = [["", "tokens/s", "ratio to forward"]]
    for name, values in speeds.items():
        ratio = ratios(values, speeds["forward"])
        rows.append([name, format_figure(summarize(values), ".0f"), format_figure(ratio)])
    title = f"capture: SmolLM2-135M in {teacher.dtype.name}, {num_tokens} tokens, window {WINDOW}, k {K}"
    print(table(title, rows))
    print(f"  capture, ratio to the plain script: {format_figure(to_plain_script)}")
    print(f"  top-k, tail and entropy: {top_k_fraction:.1%} of capture's time")
    if two_workers_ratio is not None:
        results["capture.two_workers_ratio"] = two_workers_ratio
        print(f"  speed of two workers, ratio to one (command with model loading): {format_figure(two_workers_ratio)}")
    return results


def speed_of(num_tokens: int, call: Callable[[], None]) -> float:
    """Tokens per second of one call that processes all tokens."""
    return num_tokens / seconds(call)


def options(teacher: ModelConfig, corpus: Path, caches_dir: Path, targets: Targets) -> CaptureConfig:
    """The options of a capture of this corpus, in the shapes of this benchmark."""
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
    """Run the model's own forward on the same packed batches; the logits are discarded."""
    for first in range(0, len(sequences), BATCH):
        input_ids_BS, position_ids_BS, _ = collate_inputs(sequences[first : first + BATCH])
        logits_BSV = model(
            input_ids=input_ids_BS.to(model.device), position_ids=position_ids_BS.to(model.device), use_cache=False
        ).logits
        logits_BSV[0, 0, 0].item()  # copying one number to the CPU waits until the GPU has finished


def capture(model: Model, config: CaptureConfig) -> None:
    """Capture from text to committed shards in a new folder: tokenize, pack, forward, top-k, write, fsync."""
    shutil.rmtree(config.caches_dir, ignore_errors=True)
    request = plan_folder(config)
    manifest = make_plan(config, request)
    cache = Path(config.caches_dir) / "cache"
    manifests.create_cache(cache, manifest)
    run_worker(config, cache, request.sequences, range(manifest.num_shards), teacher=model)
    manifests.finalize_cache(cache, manifest, stale_seconds=config.lease_seconds)


@torch.inference_mode()
def plain_script(model: Model, tokenizer: object, prompts: Sequence[str], folder: Path) -> None:
    """The same in ten lines, as many scripts do it: padded batches, a full fp32 log-softmax, topk, torch.save."""
    assert callable(tokenizer)
    for number, first in enumerate(range(0, len(prompts), BATCH)):
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts[first : first + BATCH]]
        longest = max(map(len, encoded))
        input_ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded], device=model.device)
        mask_BS = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded], device=model.device)
        logits_BSV = model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False).logits
        top = torch.log_softmax(logits_BSV.float(), dim=-1).topk(K, dim=-1)
        torch.save({"ids": top.indices.cpu(), "log_p": top.values.cpu()}, folder / f"plain-{number}.pt")


@torch.inference_mode()
def top_k_seconds(model: Model, sequences: Sequence[TokenSequence]) -> float:
    """Seconds of top-k, tail and entropy for all targets, extrapolated from up to 512 positions of real logits."""
    batch = sequences[:BATCH]
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = hidden_states(model, input_ids_BS.to(model.device), position_ids_BS)
    hidden_NH = hidden_BSH.flatten(0, 1)[flat_N.to(model.device)][:512]
    logits_NV = logits(model, hidden_NH, model.config.vocab_size)
    times = [seconds(functools.partial(top_k_and_entropy, logits_NV, k=K, temperatures=(1.0,))) for _ in range(5)]
    return summarize(times).median / len(logits_NV) * sum(len(sequence.target_ids_N) for sequence in sequences)


def compare_two_workers(config: CaptureConfig, folder: Path) -> Figure:
    """Seconds of the complete command with one worker / with two workers, which share the cores."""

    def command_seconds(num_workers: int) -> float:
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
        overrides = [f"{name}={value}" for name, value in arguments.items()]
        command = [sys.executable, str(ROOT / "scripts/capture.py"), *overrides]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))

    measurements = {"one": lambda: command_seconds(1), "two": lambda: command_seconds(2)}
    times = run_in_turns(measurements, runs=3, warm_up=False)
    return ratios(times["one"], times["two"])
