"""The values that travel between the rooms of this package.

Dimension key, for the whole package: B sequences, S positions, N supervised positions, K kept entries,
V vocabulary, H hidden size, M positions with a captured distribution, C cached temperatures. A tensor's
name ends in its shape: `hidden_NH`. T is only ever the temperature.

The alignment law: position s has read tokens 0..s and predicts token s+1. The shift from tokens to
targets is done once, in `data/`, and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a wrong option should be refused before torch has loaded
    from torch import Tensor

UNKNOWN_TARGET = -100  # a supervised position whose true next token is not known: only the teacher's output is

V = TypeVar("V")


class InputError(ValueError):
    """What the user gave cannot be used: the message says what was expected, what was found and what to do."""


class RunFailed(RuntimeError):
    """A run ended without a result and not because it was asked to: a sweep goes on with its other runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of input as text, before it is tokenized."""

    record_id: int
    """0-based position of the record in its corpus, skipped records counted too."""
    prompt: str | None
    """What is read but never a target under `completion` and `next`; None for plain text."""
    completion: str | None
    """The text itself, or what follows the prompt; None where only a teacher can say it."""
    choices: tuple[str, ...]
    """Alternative completions to be scored by likelihood; empty where there are none."""
    answer: int | None
    """Index of the right choice."""
    templated: bool
    """A chat template has written the special tokens already; the tokenizer must not add its own."""
    where: str
    """File and line (or row), for messages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """One packed window: segments laid end to end, each blind to the others."""

    key: bytes
    """16 bytes, blake2b of ids, segment lengths and target positions: every join is by key."""
    input_ids_S: Tensor
    """int64."""
    segment_lengths: tuple[int, ...]
    """Tokens of each segment; they add up to S."""
    record_ids: tuple[int, ...]
    """The record behind each segment."""
    target_positions_N: Tensor
    """int64, ascending: the supervised positions."""
    target_ids_N: Tensor
    """int64: the token each supervised position should predict, or UNKNOWN_TARGET."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopK:
    """A teacher's distribution at N positions: its k largest logits and, exactly, the mass of all the rest.

    log z(T) = logaddexp(logsumexp_K(relative / T), log_tail(T));  log p_i(T) = relative_i / T - log z(T).
    """

    ids_NK: Tensor
    """Token ids by falling logit: int64, or int32 as a shard holds them until they are put into a batch."""
    relative_logits_NK: Tensor
    """float16: logit minus the position's largest, so the first is 0; -inf pads where fewer are kept."""
    log_tail_NC: Tensor
    """float32, nats: log of the sum of exp(relative logit / T) over all tokens not kept; -inf if none is left."""
    temperatures: tuple[float, ...]
    """The C temperatures that `log_tail_NC` holds, ascending; 1 is always among them."""

    def select(self, rows_N: Tensor | slice) -> TopK:
        """The distributions at some of the positions."""
        return map_tensors(self, lambda column: column[rows_N])

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """The positions of several, one after another, padded to the largest K; ids become int64."""
        import torch

        width = max(part.ids_NK.shape[1] for part in parts)
        parts = [part.pad_to_width(width) for part in parts]
        return TopK(
            ids_NK=torch.cat([part.ids_NK for part in parts]).long(),
            relative_logits_NK=torch.cat([part.relative_logits_NK for part in parts]),
            log_tail_NC=torch.cat([part.log_tail_NC for part in parts]),
            temperatures=parts[0].temperatures,
        )

    def pad_to_width(self, width: int) -> TopK:
        """The same distributions with `width` entries: -inf, with each position's first id, where fewer are kept."""
        from torch import cat
        from torch.nn import functional

        missing = width - self.ids_NK.shape[1]
        if missing == 0:
            return self
        return TopK(
            ids_NK=cat([self.ids_NK, self.ids_NK[:, :1].expand(-1, missing)], dim=1),
            relative_logits_NK=functional.pad(self.relative_logits_NK, (0, missing), value=float("-inf")),
            log_tail_NC=self.log_tail_NC,
            temperatures=self.temperatures,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """What stage one stores about the supervised positions of one sequence."""

    top: TopK
    next_log_prob_N: Tensor
    """float16, nats: the teacher's log-probability of the true target at T = 1; NaN where it is unknown."""
    entropy_N: Tensor
    """float16, nats: entropy of the teacher's full distribution at T = 1."""
    weak_ids_N: Tensor | None = None
    """int64: the token that the teacher generated there, or UNKNOWN_TARGET; None: this cache holds no completions."""

    def select(self, rows_N: Tensor | slice) -> Captured:
        """What is stored about some of the positions."""
        return map_tensors(self, lambda column: column[rows_N])

    def split(self, counts: Sequence[int]) -> list[Captured]:
        """The first counts[0] positions, the next counts[1], ..."""
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [self.select(slice(end - count, end)) for count, end in zip(counts, ends, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Captured]) -> Captured:
        """The positions of several, one after another; weak ids where all parts have them."""
        import torch

        columns: dict[str, Any] = {"top": TopK.cat([part.top for part in parts])}
        for name in (field.name for field in dataclasses.fields(Captured) if field.name != "top"):
            held = [getattr(part, name) for part in parts]
            columns[name] = None if any(column is None for column in held) else torch.cat(held)
        return Captured(**columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch, padded at the right; all supervised positions of its B sequences in one list of N."""

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    """Restart at 0 in every segment: that is what keeps segments apart."""
    flat_positions_N: Tensor
    """Supervised positions as indices into the flattened B * S."""
    target_ids_N: Tensor
    """int64, or UNKNOWN_TARGET."""
    gold_N: Tensor
    """bool: the position comes from the gold set (else from the corpus)."""
    weak_N: Tensor
    """bool: the position carries a captured distribution."""
    weak_ids_N: Tensor
    """int64: the token that the teacher said there when it completed the record, or UNKNOWN_TARGET."""
    teacher: TopK | None
    """The distributions of the M positions where `weak_N` holds, in order; None if M = 0."""
    entropy_M: Tensor | None
    """float32, nats: entropy of the teacher's full distribution there; NaN where an imported cache does not know it."""

    keys_B: Tensor
    """int64: the first 8 bytes of each sequence's key, to record what a step has read."""

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device))


def map_tensors(value: V, change: Callable[[Tensor], Tensor]) -> V:
    """The same value with every tensor in it changed; a value inside it (a TopK) is changed alike."""
    from torch import Tensor

    changed: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]  # V is one of the dataclasses above
        held = getattr(value, field.name)
        if isinstance(held, Tensor):
            changed[field.name] = change(held)
        elif dataclasses.is_dataclass(held):
            changed[field.name] = map_tensors(held, change)
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All that a run has to remember besides parameters and optimizer state: the order of the data is pure."""

    step: int = 0
    """Optimizer steps done."""
    kd_factor: float = 1.0
    """What is left of the KD weight since the student began to overtake the teacher."""
    thresholds: tuple[float, ...] = ()
    """Of the classes among which `confidence` hardens the student's prediction."""
    best_score: float | None = None
    """The best score on dev so far, more is better; None before the first evaluation."""
    best_step: int = 0
    """The step after which it was found."""
    evaluations_since_best: int = 0
    """Evaluations that brought nothing better since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a cache promises; stage two knows of stage one only this and the shards."""

    schema_version: int
    fingerprint: str
    """sha256 of `made_of`."""
    made_of: dict[str, Any]
    """All that changes the content of a shard, and nothing else."""
    kind: str
    """What the kept entries are: topk, sampled or hybrid."""
    k: int
    """Entries kept by size; 0 where all are drawn."""
    draws: int
    """Draws at each position; 0 where none are."""
    draw_seed: int
    temperatures: tuple[float, ...]
    vocabulary_size: int
    window: int
    """Longest sequence, tokens."""
    num_records: int
    num_shards: int
    records_per_shard: int
    """The plan: shard i holds the records [i * records_per_shard, (i + 1) * records_per_shard)."""
    num_skipped: int | None = None
    """Malformed records counted and left out; None until every shard is committed."""
    tail: str = "exact"
    """What is known of the mass outside the kept entries. exact: all of it, our own caches. Of imported ones,
    remainder: 1 - sum p, exact as well; renormalised: lost, the kept entries sum to 1; approximate: 1 - sum p of
    values that were stored with loss, at least 0."""

    @property
    def has_kept_counts(self) -> bool:
        """The number of kept entries may differ between positions, so shards hold it in a column."""
        return self.kind != "topk" or self.tail != "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What lies in one shard; its file exists only if the shard is whole."""

    index: int
    file: str
    """Name of the Parquet file beside this ShardInfo; in an object store it holds a part of the content's hash."""
    rows: int
    """Sequences."""
    row_groups: tuple[int, ...]
    """Sequences of each row group."""
    targets: int
    """Supervised positions."""
    bytes: int
    sha256: str
    num_skipped: int
    """Malformed records of this shard that were counted and left out."""
    retained_mass_histogram: tuple[int, ...]
    """Positions by the probability that the kept entries hold at T = 1, in ten equal bins from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How a model did on one held-out text."""

    num_records: int
    num_targets: int
    nll: float | None
    """Mean negative log-likelihood a known target, nats."""
    perplexity: float | None
    """exp(nll)."""
    num_choice_records: int
    accuracy: float | None
    """Fraction of the records with choices whose most likely choice is the answer."""
    num_free_records: int
    """Records whose completion the model was asked to say."""
    exact_match: float | None
    """Fraction of these that it said, letter by letter but for the spaces around it."""
    agreement: float | None
    """Fraction of the records with choices on which the teacher's most likely choice is the same."""
