"""The fidelity of a cache for its size: the student's gradient from what is kept, compared with the full distribution.

The KD term's gradient on the weight of the head is the sum over positions of (q - p) h / T, with the distributions q of
the student and p of the teacher, and the last hidden state h. The angle to the gradient from the full distribution is
the error in the direction of a step; the ratio of the norms is the error in its length.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.bench.capture import CORPUS, MODEL
from pipeline.bench.timing import Results, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
from pipeline.capture.teacher import capture_positions
from pipeline.config.schema import Dtype, ModelConfig, Targets, TextConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.topk import uniform_draws
from pipeline.core.types import Manifest, TokenSequence, TopK
from pipeline.data.packing import collate_inputs
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.loading import open_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.objective.position_groups import kd_of_logits
from pipeline.objective.terms import TermOptions

WINDOW = 256
CHUNK = 256  # positions per chunk, which limits the memory of [N, V] tensors
NUM_TRIALS = 4  # repetitions with other random draws
REMOVED_LAYER = 15  # of the teacher's thirty layers; the student is the teacher without it


def unchanged(top: TopK) -> TopK:
    """What was kept, as it is."""
    return top


def renormalised(top: TopK) -> TopK:
    """Without the tail: the kept entries are scaled to sum to 1, as most other projects do."""
    return dataclasses.replace(top, log_tail_NC=torch.full_like(top.log_tail_NC, -torch.inf))


def tail_as_one_token(top: TopK) -> TopK:
    """The tail at T = 2, computed from its mass at T = 1 as if it were a single token, as some projects do."""
    at_one_N = top.log_tail_NC[:, top.temperatures.index(1.0)]
    return dataclasses.replace(top, log_tail_NC=torch.stack([at_one_N, at_one_N / 2], dim=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A scheme to store a distribution, and to compute with what was stored."""

    name: str
    kind: str = "topk"
    """topk, sampled or hybrid, as in a Manifest."""
    k: int = 0
    draws: int = 0
    read: Callable[[TopK], TopK] = unchanged
    """Applied to the stored values before the loss uses them."""
    temperature: float = 1.0


SCHEMES = (
    *(Scheme(name=f"topk {k}", k=k) for k in (8, 10, 16, 28, 32, 64, 128)),
    Scheme(name="sampled 50", kind="sampled", draws=50),
    Scheme(name="hybrid 8 + 16", kind="hybrid", k=8, draws=16),
    Scheme(name="hybrid 16 + 32", kind="hybrid", k=16, draws=32),
    *(Scheme(name=f"peers: top {k} renormalised", k=k, read=renormalised) for k in (12, 64)),
    Scheme(name="topk 64 at T = 2", k=64, temperature=2.0),
    Scheme(name="peers: top 64, tail as one token, T = 2", k=64, read=tail_as_one_token, temperature=2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """What student and teacher compute at all targets of a text."""

    sequences: list[TokenSequence]
    targets_N: Tensor
    """int64: the targets of all sequences, one after another."""
    hidden_NH: Tensor
    """The student's last hidden states."""
    student_NV: Tensor
    """The student's logits."""
    teacher_NV: Tensor
    """The teacher's logits."""


def run(quick: bool) -> Results:
    """Angle, norm ratio, bias and deviation of the head's gradient, and bytes per token on disk, for each scheme.

    Teacher: SmolLM2-135M. Student: the same model without one of its thirty layers. Text: titles and descriptions of
    Wikipedia's vital articles; every token is a target.
    """
    keep_allocator_memory()
    outputs = run_models(num_sequences=2 if quick else 16)
    temperatures = sorted({scheme.temperature for scheme in SCHEMES})
    full_gradients = {T: head_gradient(outputs, full_logit_gradients(outputs, T)) for T in temperatures}
    rows = [measure(scheme, outputs, full_gradients[scheme.temperature]) for scheme in SCHEMES]
    header = ["scheme", "bytes per token", "angle, degrees", "norm ratio", "bias", "deviation"]
    cells = [[str(value) for value in row.values()] for row in rows]
    title = f"fidelity: the head's gradient against the full distribution's, {len(outputs.targets_N)} tokens"
    print(table(title, [header, *cells]))
    print("  bias and deviation (between sets of random draws) of the gradient are fractions of its norm")
    return {"fidelity": rows}


def measure(scheme: Scheme, outputs: Outputs, full_VH: Tensor) -> dict[str, str | float]:
    """Compare the gradients g of NUM_TRIALS sets of draws (one if there are no draws) with the full gradient f.

    With t trials, the variance is v = (mean |g|^2 - |mean g|^2) t / (t - 1) and the deviation sqrt(v). The squared
    distance |mean g - f|^2 is the squared bias plus v / t, which is therefore subtracted.
    """
    trials = 1 if scheme.kind == "topk" else NUM_TRIALS
    norm = float(full_VH.norm())
    mean_VH, mean_square, angles, norm_ratios = torch.zeros_like(full_VH), 0.0, [], []
    for trial in range(trials):
        gradient_VH = head_gradient(outputs, kept_logit_gradients(outputs, scheme, trial))
        mean_VH += gradient_VH / trials
        mean_square += float(gradient_VH.norm() ** 2) / trials
        # from the chord between the unit vectors: near 0 degrees acos(cosine) would lose all digits
        chord = float((gradient_VH / gradient_VH.norm() - full_VH / norm).double().norm())
        angles.append(math.degrees(2 * math.asin(min(chord / 2, 1.0))))
        norm_ratios.append(float(gradient_VH.norm()) / norm)
    variance = max(mean_square - float(mean_VH.norm() ** 2), 0.0) * trials / max(trials - 1, 1)
    square_distance = float((mean_VH - full_VH).norm() ** 2)
    return {
        "kind": scheme.name,
        "bytes_per_token": round(bytes_per_token(outputs, scheme), 1),
        "angle_degrees": round(sum(angles) / trials, 2),
        "norm_ratio": round(sum(norm_ratios) / trials, 4),
        "bias_fraction": round(math.sqrt(max(square_distance - variance / trials, 0.0)) / norm, 4),
        "deviation_fraction": round(math.sqrt(variance) / norm, 4),
    }


# ------------------------------------------------------------------------------------------- the models


def run_models(*, num_sequences: int) -> Outputs:
    """Run the teacher, and the student that is the teacher without one layer, on the text of the demo."""
    options = ModelConfig(path=str(MODEL), attention="eager", dtype=Dtype.float32)
    tokenizer = load_tokenizer(MODEL)
    teacher, student = (open_model(options, compute_device()) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        prompts = [json.loads(line)["prompt"].removesuffix("\nTopic:") for line in CORPUS.open()]
        texts = ["\n".join(prompts[i : i + 10]) for i in range(0, len(prompts), 10)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        text = open_text(TextConfig(files=[str(path)], targets=Targets.all), "text")
        sequences = load_labeled_sequences(text, tokenizer, window=WINDOW)[:num_sequences]
    hidden_NH, student_NV = hidden_and_logits(remove_layer(student), sequences, len(tokenizer))
    _, teacher_NV = hidden_and_logits(teacher, sequences, len(tokenizer))
    return Outputs(
        sequences=sequences,
        targets_N=torch.cat([sequence.target_ids_N for sequence in sequences]),
        hidden_NH=hidden_NH,
        student_NV=student_NV,
        teacher_NV=teacher_NV,
    )


def remove_layer(model: Model) -> Model:
    """Remove one layer: the model then predicts almost the same, and is wrong about many tokens."""
    del model.get_decoder().layers[REMOVED_LAYER]
    model.config.num_hidden_layers -= 1
    return model


@torch.inference_mode()
def hidden_and_logits(model: Model, sequences: list[TokenSequence], vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, H] and logits [N, V] at all targets."""
    hidden, logit_parts = [], []
    for sequence in sequences:
        input_ids_BS, position_ids_BS, flat_N = collate_inputs([sequence])
        hidden_NH = hidden_states(model, input_ids_BS, position_ids_BS).flatten(0, 1)[flat_N]
        hidden.append(hidden_NH)
        logit_parts.append(logits(model, hidden_NH, vocabulary_size))
    return torch.cat(hidden), torch.cat(logit_parts)


# ------------------------------------------------------------------------------------------- gradients


def head_gradient(outputs: Outputs, logit_gradients: Iterator[Tensor]) -> Tensor:
    """The gradient [V, H] on the weight of the head from those on the logits, CHUNK positions at a time."""
    gradient_VH = torch.zeros(outputs.student_NV.shape[1], outputs.hidden_NH.shape[1])
    for hidden_NH, gradient_NV in zip(outputs.hidden_NH.split(CHUNK), logit_gradients, strict=True):
        gradient_VH += gradient_NV.T @ hidden_NH
    return gradient_VH


def full_logit_gradients(outputs: Outputs, temperature: float) -> Iterator[Tensor]:
    """(q - p) / T of the full distributions, CHUNK positions at a time."""
    chunks = zip(outputs.student_NV.split(CHUNK), outputs.teacher_NV.split(CHUNK), strict=True)
    for student_NV, teacher_NV in chunks:
        q_NV = torch.softmax(student_NV / temperature, dim=1)
        p_NV = torch.softmax(teacher_NV / temperature, dim=1)
        yield (q_NV - p_NV) / temperature


def kept_logit_gradients(outputs: Outputs, scheme: Scheme, trial: int) -> Iterator[Tensor]:
    """The gradient of the KD term on the logits, from what the scheme keeps, CHUNK positions at a time."""
    draws_ND = _draws(outputs, scheme, trial)
    chunks = zip(outputs.student_NV.split(CHUNK), outputs.teacher_NV.split(CHUNK), draws_ND.split(CHUNK), strict=True)
    for student_NV, teacher_NV, chunk_draws_ND in chunks:
        any_target_N = torch.zeros(len(teacher_NV), dtype=torch.int64)  # the KD term does not use targets
        captured = capture_positions(teacher_NV, any_target_N, chunk_draws_ND, _manifest(scheme, outputs))
        top = scheme.read(captured.top)
        logits_NV = student_NV.clone().requires_grad_()
        options = TermOptions(on=(), temperature=scheme.temperature, temperature_squared=False)
        (gradient_NV,) = torch.autograd.grad(kd_of_logits(logits_NV, top, options), logits_NV)
        yield gradient_NV


def _draws(outputs: Outputs, scheme: Scheme, trial: int) -> Tensor:
    draws = [
        uniform_draws(sequence.key, len(sequence.target_ids_N), draws=scheme.draws, seed=trial)
        for sequence in outputs.sequences
    ]
    return torch.cat(draws)


def _manifest(scheme: Scheme, outputs: Outputs) -> Manifest:
    made_of = {"scheme": scheme.name}
    return Manifest(
        schema_version=1,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind=scheme.kind,
        k=scheme.k,
        draws=scheme.draws,
        draw_seed=0,
        temperatures=(1.0,) if scheme.temperature == 1.0 else (1.0, scheme.temperature),
        vocabulary_size=outputs.teacher_NV.shape[1],
        window=WINDOW,
        num_records=len(outputs.sequences),
        num_shards=1,
        records_per_shard=len(outputs.sequences),
    )


def bytes_per_token(outputs: Outputs, scheme: Scheme) -> float:
    """Size on disk of a real shard with all its columns (input ids, targets, entropy, ...), per target."""
    manifest, draws_ND = _manifest(scheme, outputs), _draws(outputs, scheme, 0)
    counts = [len(sequence.target_ids_N) for sequence in outputs.sequences]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        manifests.create_cache(cache, manifest)
        with shard_writer(cache, manifest, 0) as writer:
            starts = itertools.accumulate(counts[:-1], initial=0)  # counts 3, 2, 4 -> starts 0, 3, 5
            for sequence, first, count in zip(outputs.sequences, starts, counts, strict=True):
                rows = slice(first, first + count)
                teacher_NV, targets_N = outputs.teacher_NV[rows], outputs.targets_N[rows]
                writer.write(sequence, capture_positions(teacher_NV, targets_N, draws_ND[rows], manifest))
            writer.commit(num_skipped=0)
        return manifests.shard_path(cache, 0).stat().st_size / sum(counts)
