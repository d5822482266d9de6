"""How true a cache is for its size: the gradient a student gets from what is kept, against the full distribution's.

The gradient of the KD term on the head's weight is the sum of (q - p) h over positions. Its angle to the full
distribution's says how far a step goes astray, its norm ratio how long the step is.
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
from pipeline.bench.timing import Findings, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
from pipeline.capture.teacher import capture_positions
from pipeline.config.schema import Dtype, ModelConfig, Targets, TextConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.topk import uniform_draws
from pipeline.core.types import Captured, Manifest, TokenSequence, TopK
from pipeline.data.packing import collate_inputs
from pipeline.data.records import open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.models import loading as models
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.tokenizer import load_tokenizer
from pipeline.objective.position_groups import kd_of_logits
from pipeline.objective.terms import TermOptions

WINDOW = 256
POSITIONS = 256  # positions at once: bounds [N, V]
TRIALS = 4  # repeats of the draws
LEFT_OUT = 15  # the layer that the student lacks


def same(top: TopK) -> TopK:
    """As it was kept."""
    return top


def renormalised(top: TopK) -> TopK:
    """What most peers do: the kept entries are taken for all there is."""
    return dataclasses.replace(top, log_tail_NC=torch.full_like(top.log_tail_NC, -torch.inf))


def tail_as_one_token(top: TopK) -> TopK:
    """What others do at T = 2: the tail's mass at T = 1 is softened as if it were one token's."""
    at_one_N = top.log_tail_NC[:, top.temperatures.index(1.0)]
    return dataclasses.replace(top, log_tail_NC=torch.stack([at_one_N, at_one_N / 2], dim=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to keep a distribution, and to read what was kept."""

    name: str
    kind: str = "topk"
    k: int = 0
    draws: int = 0
    read: Callable[[TopK], TopK] = same
    temperature: float = 1.0


WAYS = (
    *(Way(name=f"topk {k}", k=k) for k in (8, 10, 16, 28, 32, 64, 128)),
    Way(name="sampled 50", kind="sampled", draws=50),
    Way(name="hybrid 8 + 16", kind="hybrid", k=8, draws=16),
    Way(name="hybrid 16 + 32", kind="hybrid", k=16, draws=32),
    *(Way(name=f"peers: top {k} renormalised", k=k, read=renormalised) for k in (12, 64)),
    Way(name="topk 64 at T = 2", k=64, temperature=2.0),
    Way(name="peers: top 64, tail as one token, T = 2", k=64, read=tail_as_one_token, temperature=2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """Some real text as teacher and student see it."""

    sequences: list[TokenSequence]
    targets_N: Tensor
    hidden_NH: Tensor
    """The student's last hidden states."""
    student_NV: Tensor
    teacher_NV: Tensor


def run(quick: bool) -> Findings:
    """Angle, norm ratio, bias and deviation of the head's gradient, and bytes a token on disk, by way of keeping.

    Teacher: SmolLM2-135M. Student: the same with one of its thirty layers left out. Text: titles and descriptions of
    Wikipedia's vital articles, every token a target.
    """
    keep_allocator_memory()
    scene = set_scene(num_sequences=2 if quick else 16)
    full = {T: gradient(scene, iter(full_differences(scene, T))) for T in sorted({way.temperature for way in WAYS})}
    rows = [row_of(way, scene, full[way.temperature]) for way in WAYS]
    head = ["way", "bytes a token", "angle, degrees", "norm ratio", "bias", "deviation"]
    cells = [[str(value) for value in row.values()] for row in rows]
    title = f"fidelity: the head's gradient against the full distribution's, {len(scene.targets_N)} tokens"
    print(table(title, [head, *cells]))
    print("  bias and deviation of the gradient, as fractions of its norm; deviation: from one set of draws to another")
    return {"fidelity": rows}


def row_of(way: Way, scene: Scene, full_VH: Tensor) -> dict[str, str | float]:
    """What there is to say of one way; of t trials the mean's distance holds 1/t of the variance: off the bias."""
    trials = 1 if way.kind == "topk" else TRIALS
    norm = float(full_VH.norm())
    mean_VH, squares, angles, ratios = torch.zeros_like(full_VH), 0.0, [], []
    for trial in range(trials):
        found_VH = gradient(scene, differences(scene, way, trial))
        mean_VH += found_VH / trials
        squares += float(found_VH.norm() ** 2) / trials
        chord = float((found_VH / found_VH.norm() - full_VH / norm).double().norm())  # acos has no digits near 0
        angles.append(math.degrees(2 * math.asin(min(chord / 2, 1.0))))
        ratios.append(float(found_VH.norm()) / norm)
    variance = max(squares - float(mean_VH.norm() ** 2), 0.0) * trials / max(trials - 1, 1)
    distance = float((mean_VH - full_VH).norm() ** 2)
    return {
        "kind": way.name,
        "bytes_per_token": round(bytes_a_token(scene, way), 1),
        "angle_degrees": round(sum(angles) / trials, 2),
        "norm_ratio": round(sum(ratios) / trials, 4),
        "bias_fraction": round(math.sqrt(max(distance - variance / trials, 0.0)) / norm, 4),
        "deviation_fraction": round(math.sqrt(variance) / norm, 4),
    }


# -------------------------------------------------------------------------------------------- the scene


def set_scene(*, num_sequences: int) -> Scene:
    """Run the teacher and a student that is near over some text."""
    options = ModelConfig(path=str(MODEL), attention="eager", dtype=Dtype.float32)
    tokenizer = load_tokenizer(MODEL)
    teacher, student = (models.open_model(options, compute_device()) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        prompts = [json.loads(line)["prompt"].removesuffix("\nTopic:") for line in CORPUS.open()]
        texts = ["\n".join(prompts[i : i + 10]) for i in range(0, len(prompts), 10)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        text = open_text(TextConfig(files=[str(path)], targets=Targets.all), "text")
        held = load_labeled_sequences(text, tokenizer, window=WINDOW)[:num_sequences]
    hidden_NH, student_NV = read(near(student), held, len(tokenizer))
    _, teacher_NV = read(teacher, held, len(tokenizer))
    targets_N = torch.cat([sequence.target_ids_N for sequence in held])
    return Scene(sequences=held, targets_N=targets_N, hidden_NH=hidden_NH, student_NV=student_NV, teacher_NV=teacher_NV)


def near(student: Model) -> Model:
    """The same model with one of its layers left out: near, and wrong about many tokens."""
    del student.get_decoder().layers[LEFT_OUT]
    student.config.num_hidden_layers -= 1
    return student


@torch.inference_mode()
def read(model: Model, sequences: list[TokenSequence], vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits at every target."""
    found = []
    for sequence in sequences:
        input_ids_BS, position_ids_BS, flat_N = collate_inputs([sequence])
        hidden_NH = hidden_states(model, input_ids_BS, position_ids_BS).flatten(0, 1)[flat_N]
        found.append((hidden_NH, logits(model, hidden_NH, vocabulary_size)))
    return torch.cat([hidden for hidden, _ in found]), torch.cat([logits for _, logits in found])


# ------------------------------------------------------------------------------------------- gradients


def gradient(scene: Scene, parts: Iterator[Tensor]) -> Tensor:
    """The head's gradient [V, H] from the gradients on the logits, POSITIONS at a time."""
    found_VH = torch.zeros(scene.student_NV.shape[1], scene.hidden_NH.shape[1])
    for hidden_NH, part_NV in zip(scene.hidden_NH.split(POSITIONS), parts, strict=True):
        found_VH += part_NV.T @ hidden_NH
    return found_VH


def full_differences(scene: Scene, temperature: float) -> Iterator[Tensor]:
    """(q - p) / T of the full distributions."""
    for q_NV, p_NV in zip(scene.student_NV.split(POSITIONS), scene.teacher_NV.split(POSITIONS), strict=True):
        yield (torch.softmax(q_NV / temperature, dim=1) - torch.softmax(p_NV / temperature, dim=1)) / temperature


def differences(scene: Scene, way: Way, trial: int) -> Iterator[Tensor]:
    """The gradient of the KD term on the logits, from what a way keeps."""
    draws_ND = _draws(scene, way, trial)
    parts = zip(*(x.split(POSITIONS) for x in (scene.student_NV, scene.teacher_NV, draws_ND)), strict=True)
    for student_NV, teacher_NV, drawn_ND in parts:
        unknown_N = torch.zeros(len(teacher_NV), dtype=torch.int64)
        top = way.read(capture_positions(teacher_NV, unknown_N, drawn_ND, _manifest(way, scene)).top)
        logits_NV = student_NV.clone().requires_grad_()
        options = TermOptions(on=(), temperature=way.temperature, temperature_squared=False)
        (found_NV,) = torch.autograd.grad(kd_of_logits(logits_NV, top, options), logits_NV)
        yield found_NV


def _draws(scene: Scene, way: Way, trial: int) -> Tensor:
    return torch.cat([uniform_draws(s.key, len(s.target_ids_N), draws=way.draws, seed=trial) for s in scene.sequences])


def _manifest(way: Way, scene: Scene) -> Manifest:
    made_of = {"way": way.name}
    return Manifest(
        schema_version=1,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind=way.kind,
        k=way.k,
        draws=way.draws,
        draw_seed=0,
        temperatures=(1.0,) if way.temperature == 1.0 else (1.0, way.temperature),
        vocabulary_size=scene.teacher_NV.shape[1],
        window=WINDOW,
        num_records=len(scene.sequences),
        num_shards=1,
        records_per_shard=len(scene.sequences),
    )


def bytes_a_token(scene: Scene, way: Way) -> float:
    """Size on disk over tokens, all columns of a real shard included: input ids, targets, entropy and the rest."""
    manifest, draws_ND = _manifest(way, scene), _draws(scene, way, 0)
    counts = [len(sequence.target_ids_N) for sequence in scene.sequences]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        manifests.create_cache(cache, manifest)
        with shard_writer(cache, manifest, 0) as writer:
            starts = itertools.accumulate(counts, initial=0)
            for sequence, first, count in zip(scene.sequences, starts, counts, strict=False):
                rows = slice(first, first + count)
                said = capture_positions(scene.teacher_NV[rows], scene.targets_N[rows], draws_ND[rows], manifest)
                captured = Captured(top=said.top, next_log_prob_N=said.next_log_prob_N, entropy_N=said.entropy_N)
                writer.write(sequence, captured)
            writer.commit(num_skipped=0)
        return manifests.shard_path(cache, 0).stat().st_size / sum(counts)
