"""Hidden states of the untrained student at supervised positions, computed once and kept beside the caches.

    <caches_dir>/features-<fingerprint12>/features.json, features.safetensors

features.json names what they were made of. Of a cache in an object store they lie in the study's runs_dir.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.core.files import atomic_folder, content_hash, write_json
from pipeline.core.progress import Progress, log
from pipeline.core.runtime import compute_device, to_device
from pipeline.core.types import InputError, TokenSequence
from pipeline.data.packing import collate_inputs
from pipeline.models.forward import HEAD_POSITIONS, Model, hidden_states, layer_states
from pipeline.models.head_float32 import logits_float32
from pipeline.models.loading import load_config, open_model, resolve_dtype
from pipeline.models.model_files import weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.prepack import prepack

LARGEST = torch.finfo(torch.float16).max
TEACHER_GOLD = "teacher_gold"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How models read the texts of a preview."""

    student: ModelConfig
    teacher: ModelConfig
    depths: tuple[float, ...]
    vocabulary_size: int
    batch_sequences: int
    log_every_seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """What a sidecar holds."""

    states: Mapping[str, Tensor]
    """float16 [N, F] by text: hidden states of all layers side by side, at the text's positions in order."""
    teacher_gold_GC: Tensor
    """float64, nats: the teacher's log-probabilities of the outcomes at gold; the last column is all other tokens."""
    folder: Path
    layers: tuple[int, ...]


def open_features(
    reading: Reading,
    texts: Mapping[str, Sequence[TokenSequence]],
    outcome_ids: Tensor,
    *,
    cache_fingerprint: str,
    place: Path,
) -> Features:
    """The features of texts, read from the sidecar in `place`, or computed and kept there."""
    reading = dataclasses.replace(reading, student=resolve_dtype(reading.student))
    layers = layers_of(reading)
    made_of = _made_of(reading, layers, texts, outcome_ids, cache_fingerprint)
    folder = place / f"features-{content_hash(made_of)[:12]}"
    file = folder / "features.safetensors"
    if not file.exists():
        found = compute(reading, layers, texts, outcome_ids)
        place.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as unfinished:
            unfinished.mkdir()
            save_file(found, unfinished / file.name)
            write_json(unfinished / "features.json", made_of)
    else:
        log.info("%s: features of an earlier preview", folder)
    found = load_file(file)
    states = {name: values for name, values in found.items() if name != TEACHER_GOLD}
    return Features(states=states, teacher_gold_GC=found[TEACHER_GOLD], folder=folder, layers=layers)


def layers_of(reading: Reading) -> tuple[int, ...]:
    """The student's layers at the given depths, from 1; a depth of 0.47 of 30 layers is layer 14."""
    student = reading.student
    folder = model_folder(student.path, revision=student.revision, with_code=student.trust_remote_code)
    config = load_config(folder, num_layers=student.num_layers, trust_remote_code=student.trust_remote_code)
    return tuple(sorted({max(round(depth * config.num_hidden_layers), 1) for depth in reading.depths}))


def _made_of(
    reading: Reading,
    layers: Sequence[int],
    texts: Mapping[str, Sequence[TokenSequence]],
    outcome_ids: Tensor,
    cache_fingerprint: str,
) -> dict[str, Any]:
    """All that changes the content of a sidecar; a text by the keys of its sequences: their tokens and positions."""
    student = reading.student
    folder = model_folder(student.path, revision=student.revision, with_code=student.trust_remote_code)
    keys = {name: hashlib.sha256(b"".join(one.key for one in text)).hexdigest() for name, text in texts.items()}
    return {
        "version": 1,
        "cache": cache_fingerprint,
        "student_weights": weights_hash(folder),
        "student_num_layers": student.num_layers,
        "student_dtype": student.dtype.name,
        "layers": list(layers),
        "texts": keys,
        "outcomes": outcome_ids.tolist(),
    }


# ------------------------------------------------------------------------------------------- forwards


def compute(
    reading: Reading, layers: Sequence[int], texts: Mapping[str, Sequence[TokenSequence]], outcome_ids: Tensor
) -> dict[str, Tensor]:
    """The teacher's log-probabilities of the outcomes at gold, and the student's hidden states on each text."""
    found = {TEACHER_GOLD: _teacher_on_gold(reading, texts["gold"], outcome_ids)}
    device = compute_device()
    student = prepack(open_model(reading.student, device))

    def states(input_ids_BS: Tensor, position_ids_BS: Tensor, flat_N: Tensor) -> Tensor:
        return _as_float16(layer_states(student, input_ids_BS, position_ids_BS, layers).flatten(0, 1)[flat_N])

    for name, text in texts.items():
        found[name] = _forwards(reading, text, f"features of {name}", device, states)
    return found


def _teacher_on_gold(reading: Reading, gold: Sequence[TokenSequence], outcome_ids: Tensor) -> Tensor:
    """A model of its own, which is gone before the student is loaded."""
    device = compute_device()
    teacher = prepack(open_model(reading.teacher, device))

    def log_probs(input_ids_BS: Tensor, position_ids_BS: Tensor, flat_N: Tensor) -> Tensor:
        hidden_NH = hidden_states(teacher, input_ids_BS, position_ids_BS).flatten(0, 1)[flat_N]
        parts = hidden_NH.split(HEAD_POSITIONS)
        return torch.cat([_outcomes(teacher, part, outcome_ids, reading.vocabulary_size) for part in parts])

    return _forwards(reading, gold, "teacher on gold", device, log_probs)


@torch.inference_mode()
def _forwards(
    reading: Reading,
    sequences: Sequence[TokenSequence],
    title: str,
    device: torch.device,
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """What `read` finds at the supervised positions, on the host and in order."""
    parts, size = [], reading.batch_sequences
    progress = Progress(title, total=len(sequences), unit=" sequences", log_every_seconds=reading.log_every_seconds)
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
        parts.append(read(to_device(input_ids_BS, device), position_ids_BS, to_device(flat_N, device)).cpu())
        progress.advance(len(batch))
    progress.close()
    return torch.cat(parts).clone()


def _outcomes(teacher: Model, hidden_NH: Tensor, outcome_ids: Tensor, vocabulary_size: int) -> Tensor:
    """float64 [N, C], nats."""
    log_p_NV = logits_float32(teacher, hidden_NH, vocabulary_size).double().log_softmax(dim=1)
    ids = outcome_ids.to(log_p_NV.device)
    others_NV = log_p_NV.index_fill(1, ids, -torch.inf)
    return torch.cat([log_p_NV[:, ids], others_NV.logsumexp(dim=1, keepdim=True)], dim=1)


def _as_float16(states_NF: Tensor) -> Tensor:
    """InputError where a state does not fit."""
    largest = float(states_NF.abs().max()) if states_NF.numel() else 0.0
    if not largest <= LARGEST:
        raise InputError(
            f"depths: expected hidden states up to {LARGEST:g}, which float16 holds, found {largest:g}; choose other "
            "layers"
        )
    return states_NF.half()
