"""The values that the packages pass to each other.

Tensor names end in their shape. The letters, for all packages: B sequences, S positions (tokens) of a sequence,
N supervised positions (positions with a target), K kept entries, V vocabulary, H hidden size, M positions with a
captured distribution, C captured temperatures. Example: `hidden_NH` has shape [N, H]. T is always the temperature.

Alignment: at position s the model has read tokens 0..s and predicts token s+1. Targets are shifted by one where a
sequence is made (`data/`, and `importers/` for foreign caches) and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # not at run time: a wrong option is rejected before torch, which takes seconds, is imported
    from torch import Tensor

UNKNOWN_TARGET = -100  # the target id of a supervised position whose true next token is unknown

V = TypeVar("V")


class InputError(ValueError):
    """An option or an input file cannot be used. The message has three parts: expected, found, and what to do."""


class RunFailed(RuntimeError):
    """A run ended without a result, and no stop was requested. A sweep continues with its other runs."""


class Busy(RunFailed):
    """Another process holds the run's folder, and this one does not wait for it (launcher.if_busy=skip)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line (or row) of an input file, before it is tokenized."""

    record_id: int
    """Index of the record in its corpus, from 0; skipped records are counted too."""
    prompt: str | None
    """The text before the completion; its tokens are targets only with `targets=all`. None for plain text."""
    completion: str | None
    """The text after the prompt, or the complete plain text; None if the record has a prompt only."""
    choices: tuple[str, ...]
    """Alternative completions, of which the model scores the likelihood; empty if the record has none."""
    answer: int | None
    """Index of the correct choice; None if it is not given."""
    templated: bool
    """True if a chat template has already added the special tokens; the tokenizer must then add none."""
    where: str
    """File and line (or row), for error messages."""
    choice_turns: tuple[str, ...] = ()
    """Of a chat: the choices as the template writes them, each with its end of turn; else empty."""
    prompt_spans: tuple[tuple[int, int], ...] = ()
    """The characters of supervised turns in the prompt of a chat, as (start, end), ascending."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """One packed window: several segments in a row. Attention does not cross from one segment to another."""

    key: bytes
    """16 bytes: blake2b of ids, segment lengths and target positions. Sequences are matched by key, not by order."""
    input_ids_S: Tensor
    """int64: the tokens."""
    segment_lengths: tuple[int, ...]
    """The number of tokens of each segment; the sum is S."""
    record_ids: tuple[int, ...]
    """The `record_id` of each segment."""
    target_positions_N: Tensor
    """int64, ascending: the supervised positions, as indices into the S tokens."""
    target_ids_N: Tensor
    """int64: the true next token at each supervised position, or UNKNOWN_TARGET."""
    depths_N: Tensor | None = None
    """int64: with `targets=choices`, the number of tokens of choices that the position has read. None: all 0."""

    def depths_or_zeros(self) -> Tensor:
        """`depths_N`, or that many zeros."""
        return self.target_ids_N.new_zeros(len(self.target_ids_N)) if self.depths_N is None else self.depths_N


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopK:
    """A teacher's next-token distributions at N positions: the kept logits, and the exact mass of all other tokens.

    log z(T) = logaddexp(logsumexp_K(relative / T), log_tail(T));  log p_i(T) = relative_i / T - log z(T).
    """

    ids_NK: Tensor
    """Ids of the kept tokens, the largest logit first. int64 in a batch; int32 as read from a shard."""
    relative_logits_NK: Tensor
    """float16: logit minus the largest logit of the position, so the first is 0. Unused entries are -inf."""
    log_tail_NC: Tensor
    """float32, nats: log of the sum of exp(relative logit / T) over all tokens that are not kept; -inf if it is 0."""
    temperatures: tuple[float, ...]
    """The temperatures T of the C columns of `log_tail_NC`, ascending; 1.0 is always one of them."""

    def select(self, rows_N: Tensor | slice) -> TopK:
        """The distributions at the given positions: row indices, a bool mask or a slice."""
        return map_tensors(self, lambda column: column[rows_N])

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """Concatenate along N, after padding to the largest K; ids become int64."""
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
        """The same distributions with K = width. An added entry has logit -inf and the first id of its position."""
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
    """What stage one records at the supervised positions of one sequence."""

    top: TopK
    next_log_prob_N: Tensor
    """float16, nats: the teacher's log-probability of the true target at T = 1; NaN where the target is unknown."""
    entropy_N: Tensor
    """float16, nats: entropy of the teacher's full distribution at T = 1; NaN in imports and pools that lack it."""
    weak_ids_N: Tensor | None = None
    """int64: the token that the teacher generated, or UNKNOWN_TARGET. None if the cache holds no completions."""
    weights_N: Tensor | None = None
    """float32, 0 to 1: the teacher's probability of the tokens of choices that the position has read. None: all 1."""

    def select(self, rows_N: Tensor | slice) -> Captured:
        """The values at the given positions: row indices, a bool mask or a slice."""
        return map_tensors(self, lambda column: column[rows_N])

    def weights_or_ones(self) -> Tensor:
        """`weights_N`, or that many ones."""
        return self.entropy_N.float().new_ones(len(self.entropy_N)) if self.weights_N is None else self.weights_N

    def split(self, counts: Sequence[int]) -> list[Captured]:
        """Split along N: the first counts[0] positions, the next counts[1] positions, and so on."""
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]  # counts 3, 2 -> ends 3, 5: slices 0:3 and 3:5
        return [self.select(slice(end - count, end)) for count, end in zip(counts, ends, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Captured]) -> Captured:
        """Concatenate along N. `weak_ids_N` is None if one of the parts has none; missing weights are 1."""
        import torch

        columns: dict[str, Any] = {"top": TopK.cat([part.top for part in parts])}
        if any(part.weights_N is not None for part in parts):
            parts = [dataclasses.replace(part, weights_N=part.weights_or_ones()) for part in parts]
        for name in (field.name for field in dataclasses.fields(Captured) if field.name != "top"):
            tensors = [getattr(part, name) for part in parts]
            columns[name] = None if any(tensor is None for tensor in tensors) else torch.cat(tensors)
        return Captured(**columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch: B sequences, padded at the right. N counts the supervised positions of all of them."""

    input_ids_BS: Tensor
    """int64: the tokens."""
    position_ids_BS: Tensor
    """int64, always on the host: positions, from 0 in every segment. Attention finds the segments by these restarts."""
    flat_positions_N: Tensor
    """int64: the supervised positions as indices b * S + s; with S = 8, position 3 of sequence 2 is 19."""
    target_ids_N: Tensor
    """int64: the true next tokens, or UNKNOWN_TARGET."""
    gold_N: Tensor
    """bool: True for a position of the gold set, False for a position of the corpus."""
    weak_N: Tensor
    """bool: True where the teacher's distribution was captured."""
    weak_ids_N: Tensor
    """int64: the token that the teacher generated when it completed the record, or UNKNOWN_TARGET."""
    weights_N: Tensor
    """float32: the weight of the position in the terms that read the teacher: see `Captured`, elsewhere 1; times trust
    in the teacher there, where a run weights positions by it (`objective/trust.py`)."""
    depths_N: Tensor
    """int64: the tokens of choices that the position has read: see `TokenSequence`; elsewhere 0."""
    teacher: TopK | None
    """The teacher's distributions at the M positions where `weak_N` is True, in the same order; None if M = 0."""
    entropy_M: Tensor | None
    """float32, nats: entropy of the teacher's full distribution at T = 1; NaN in imports and pools that lack it."""
    keys_B: Tensor
    """int64: the first 8 bytes of the key of each sequence. A step logs their sum, to show what it read."""

    def to(self, device: Any) -> Batch:
        """Copy the batch to another device, but for the position ids."""
        moved = map_tensors(self, lambda tensor: tensor.to(device))
        return dataclasses.replace(moved, position_ids_BS=self.position_ids_BS)


def map_tensors(value: V, change: Callable[[Tensor], Tensor]) -> V:
    """A copy of a dataclass with `change` applied to each of its tensors, and to those of a dataclass inside it."""
    from torch import Tensor

    changed: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]  # V is one of the dataclasses above
        content = getattr(value, field.name)
        if isinstance(content, Tensor):
            changed[field.name] = change(content)
        elif dataclasses.is_dataclass(content):
            changed[field.name] = map_tensors(content, change)
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The description of a cache. Stage two gets only the manifest and the shards from stage one."""

    schema_version: int
    fingerprint: str
    """sha256 (hex) of `made_of`."""
    made_of: dict[str, Any]
    """Every option and input hash that changes the content of a shard, and no others."""
    kind: str
    """Which entries are kept. topk: the `k` largest; sampled: random draws; hybrid: both."""
    k: int
    """Number of largest entries kept per position; 0 for sampled."""
    draws: int
    """Number of random draws per position; 0 for topk."""
    draw_seed: int
    temperatures: tuple[float, ...]
    """The temperatures at which the log tail mass is stored, ascending; 1.0 is always one of them."""
    vocabulary_size: int
    """Length of the teacher's tokenizer. The output of a model may be wider: those entries are padding."""
    window: int
    """Maximum length of a sequence, in tokens."""
    num_records: int
    """Number of records of the corpus, skipped ones included."""
    num_shards: int
    records_per_shard: int
    """Shard i holds records i * records_per_shard up to, but not including, (i + 1) * records_per_shard."""
    num_skipped: int | None = None
    """Number of malformed records that were skipped; None until every shard is committed."""
    tail: str = "exact"
    """How the mass outside the kept entries is known: exact, or otherwise in imported caches (docs/cache-format.md)."""
    skipped: dict[str, Any] | None = None
    """Number of skipped records by reason, with a hash; None if none was skipped, or in older caches."""
    tokenizer: dict[str, Any] | None = None
    """The teacher's added tokens, and a hash of each other part of its tokenizer; None if they are not recorded."""

    @property
    def has_kept_counts(self) -> bool:
        """Whether the number of kept entries may differ between positions; shards then store it per position."""
        return self.kind != "topk" or self.tail != "exact" or "also_ids" in self.made_of

    @property
    def most_kept(self) -> int:
        """The largest number of entries that a position can keep."""
        also: dict[str, Any] = self.made_of.get("also_ids", {})
        return self.k + self.draws + int(also.get("most_kept", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """The description of one shard. It is written last: its file exists only if the shard is complete."""

    index: int
    file: str
    """Name of the Parquet file, in the same folder. In an object store the name contains a part of the sha256."""
    rows: int
    """Number of sequences."""
    row_groups: tuple[int, ...]
    """Number of sequences of each row group."""
    targets: int
    """Number of supervised positions."""
    bytes: int
    """Size of the Parquet file."""
    sha256: str
    """sha256 (hex) of the Parquet file."""
    num_skipped: int
    """Number of malformed records of this shard that were skipped."""
    retained_mass_histogram: tuple[int, ...]
    """Number of positions per retained mass (sum of p over the kept entries at T = 1): ten equal bins from 0 to 1."""
    part_ends: tuple[int, ...] = ()
    """Where each row group ends in the file, and the footer behind them (`cache/shard_parts.py`); empty: unknown."""
    part_hashes: tuple[str, ...] = ()
    """First digits of the sha256 (hex) of each of these parts, so that a reader checks what it reads alone."""
