"""A capture of choices as a tree, against brute force: each node by a forward of its own, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cache.shards import ShardReader
from pipeline.capture import driver
from pipeline.config.schema import Targets, TextConfig
from pipeline.core.types import UNKNOWN_TARGET, Batch, Captured, TokenSequence
from pipeline.data.mixture import collate
from pipeline.models.forward import hidden_states
from pipeline.models.loading import load_model
from pipeline.models.tokenizer import vocabulary_size
from pipeline.objective.fused_head import combined_loss, sum_names
from pipeline.objective.terms import StepInputs, TermOptions, count_positions
from support.commands import config_of
from support.tiny import prompts, write_lines

CHOICES = [" one", " two", " tail", " stream", " string"]
CORPUS = ("corpus",)
NUM_RECORDS = 6
Rows = list[tuple[TokenSequence, Captured]]


def captured(folder: Path, teacher: Path, rows: list[dict[str, Any]], **settings: Any) -> Rows:
    """The sequences of a capture whose k is the vocabulary, in the order of the cache."""
    corpus = write_lines(folder / "corpus.jsonl", rows)
    text = TextConfig(files=[str(corpus)], **{"targets": Targets.choices, "end_token": False, **settings})
    config = config_of(teacher, corpus, folder, corpus=text, k=300, temperatures=[1.0], batch_sequences=2)
    driver.run(dataclasses.replace(config, name="c"))
    (cache,) = folder.glob("c-*")
    reader = ShardReader(cache)
    return [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Rows:
    """Unlabeled prompts, whose choices are those of the text."""
    folder = tmp_path_factory.mktemp("choices")
    return captured(folder, teacher, prompts(NUM_RECORDS, labeled=False), choices=CHOICES)


def model_of(folder: Path) -> Any:
    return load_model(folder, dtype="float32", device=torch.device("cpu"))


class Exact:
    """A model one sequence at a time, in float64."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.model, self.vocabulary = model_of(folder).double(), vocabulary

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0, -1, : self.vocabulary].log_softmax(0)


@dataclasses.dataclass(kw_only=True)
class Tree:
    """The nodes of one record: what teacher and student say there, and the teacher's probability of getting there."""

    choices: list[tuple[int, ...]]
    log_p: dict[tuple[int, ...], Tensor]
    log_q: dict[tuple[int, ...], Tensor]

    def reach(self, node: tuple[int, ...]) -> float:
        return math.exp(sum(float(self.log_p[node[:i]][token]) for i, token in enumerate(node)))

    def kl_over_nodes(self) -> float:
        return sum(self.reach(n) * float((p.exp() * (p - self.log_q[n])).sum()) for n, p in self.log_p.items())

    def kl_over_sequences(self) -> float:
        """Every way to leave the tree is an outcome: at the end of a choice, or by a token that no choice has there."""
        total = 0.0
        inside = {choice[:i] for choice in self.choices for i in range(len(choice))}
        for node in self.log_p:
            for token in range(len(self.log_p[node])):
                path = (*node, token)
                if path in inside:
                    continue
                log_p = sum(float(self.log_p[path[:i]][t]) for i, t in enumerate(path))
                log_q = sum(float(self.log_q[path[:i]][t]) for i, t in enumerate(path))
                total += math.exp(log_p) * (log_p - log_q)
        return total


@pytest.fixture(scope="module")
def trees(teacher: Path, student: Path, tokenizer: Any) -> list[Tree]:
    size = vocabulary_size(tokenizer)
    weak, strong = Exact(teacher, size), Exact(student, size)
    choices = [tuple(tokenizer(choice)["input_ids"]) for choice in CHOICES]
    nodes = sorted({choice[:i] for choice in choices for i in range(len(choice))})
    found = []
    for row in prompts(NUM_RECORDS, labeled=False):
        ids = tokenizer(row["prompt"])["input_ids"]
        log_p, log_q = ({n: model.log_probs([*ids, *n]) for n in nodes} for model in (weak, strong))
        found.append(Tree(choices=choices, log_p=log_p, log_q=log_q))
    return found


def nodes_of(sequence: TokenSequence) -> list[tuple[int, tuple[int, ...]]]:
    """Of each target its record and its node."""
    depths = sequence.depths_or_zeros().tolist()
    ends = list(itertools.accumulate(sequence.segment_lengths))
    found = []
    for s, depth in zip(sequence.target_positions_N.tolist(), depths, strict=True):
        segment = next(i for i, end in enumerate(ends) if s < end)
        found.append((sequence.record_ids[segment], tuple(sequence.input_ids_S[s - depth + 1 : s + 1].tolist())))
    return found


def loss_of(
    model: Any, batches: list[Batch], terms: dict[str, TermOptions], *, fused: bool = True
) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
    """Sums, counts and gradients of a global batch, computed as a step does: the counts come first."""
    counts = torch.stack([count_positions(batch, terms) for batch in batches]).sum(0).tolist()
    coefficients = {name: 1.0 / count for name, count in zip(terms, counts, strict=True)}
    classes = max((len(options.class_ids) for options in terms.values()), default=0)
    model.zero_grad()
    total = torch.zeros(len(sum_names(terms)), dtype=torch.float64)
    for batch in batches:
        hidden_NH = hidden_states(model, batch.input_ids_BS, batch.position_ids_BS).flatten(0, 1)[
            batch.flat_positions_N
        ]
        step = StepInputs(coefficients=coefficients, thresholds=(0.0,) * classes)
        loss, sums = combined_loss(model, hidden_NH, batch, terms, step, vocabulary_size=300, fused=fused)
        loss.backward()
        total += sums
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return dict(zip(sum_names(terms), total.tolist(), strict=True)), dict(zip(terms, counts, strict=True)), gradients


def batch_of(rows: Rows) -> Batch:
    return collate(rows, [False] * len(rows))


def test_each_node_is_captured_once_with_the_probability_of_reaching_it(rows: Rows, trees: list[Tree]) -> None:
    found = [pair for sequence, _ in rows for pair in nodes_of(sequence)]
    assert sorted(found) == sorted((record, node) for record, tree in enumerate(trees) for node in tree.log_p)
    for sequence, one in rows:
        assert one.weights_N is not None
        for n, (record, node) in enumerate(nodes_of(sequence)):
            assert float(one.weights_N[n]) == pytest.approx(trees[record].reach(node), rel=1e-4)
            assert node or one.weights_N[n] == 1.0
            likeliest = int(trees[record].log_p[node].argmax())
            assert int(one.top.ids_NK[n, 0]) == likeliest


def test_kd_is_the_divergence_over_choices_as_sequences(rows: Rows, trees: list[Tree], student: Path) -> None:
    """Forward KL at T = 1; the tolerance is the rounding of the stored logits to float16."""
    sums, counts, _ = loss_of(model_of(student), [batch_of(rows)], {"kd": TermOptions(on=CORPUS)})
    over_nodes = sum(tree.kl_over_nodes() for tree in trees)
    assert sums["kd"] == pytest.approx(over_nodes, rel=1e-3)
    assert over_nodes == pytest.approx(sum(tree.kl_over_sequences() for tree in trees), rel=1e-9)
    assert counts["kd"] == pytest.approx(sum(tree.reach(n) for tree in trees for n in tree.log_p), rel=1e-5)
    unweighted = sum(float((p.exp() * (p - tree.log_q[n])).sum()) for tree in trees for n, p in tree.log_p.items())
    assert abs(unweighted / over_nodes - 1) > 0.5  # the weights matter


def test_gradients_do_not_depend_on_micro_batches_nor_on_the_head(rows: Rows, student: Path) -> None:
    first_tokens = (288, 259, 282)
    terms = {
        "kd": TermOptions(on=CORPUS),
        "hard": TermOptions(on=CORPUS, take="likeliest"),
        "confidence": TermOptions(on=CORPUS, class_ids=first_tokens),
    }
    model = model_of(student)
    sums, counts, expected = loss_of(model, [batch_of(rows)], terms)
    assert len(rows) > 2
    assert len(set(counts.values())) == 1  # all three are weighted alike
    for batches, fused in (([batch_of([row]) for row in rows], True), ([batch_of(rows)], False)):
        other_sums, other_counts, found = loss_of(model, batches, terms, fused=fused)
        assert other_counts == pytest.approx(counts, rel=1e-12)
        assert other_sums == pytest.approx(sums, rel=1e-5, abs=1e-5)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    # the student is hardened to a class right after each prompt, and there alone
    assert sum(sums[f"student_class_{token}"] for token in first_tokens) == NUM_RECORDS
    assert sum(sums[f"teacher_class_{token}"] for token in first_tokens) == pytest.approx(NUM_RECORDS, rel=1e-3)


def test_choices_of_one_token_are_targets_next(tmp_path: Path, teacher: Path, student: Path) -> None:
    """The same sequences and distributions, and bit by bit the same loss and gradients."""
    lines, single = prompts(NUM_RECORDS, labeled=False), [" one", " of", " the"]
    as_choices = captured(tmp_path / "choices", teacher, lines, choices=single)
    as_next = captured(tmp_path / "next", teacher, lines, targets=Targets.next)
    for (sequence, one), (other_sequence, other) in zip(as_choices, as_next, strict=True):
        assert sequence.key == other_sequence.key
        assert torch.equal(one.top.relative_logits_NK, other.top.relative_logits_NK)
        assert one.weights_N is not None
        assert (one.weights_N == 1).all()
        assert other.weights_N is None
    terms, model = {"kd": TermOptions(on=CORPUS), "confidence": TermOptions(on=CORPUS)}, model_of(student)
    sums, counts, gradients = loss_of(model, [batch_of(as_choices)], terms)
    other_sums, other_counts, other_gradients = loss_of(model, [batch_of(as_next)], terms)
    assert (sums, counts) == (other_sums, other_counts)
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_lm_reads_each_token_of_the_answer_once(tmp_path: Path, teacher: Path, student: Path, tokenizer: Any) -> None:
    lines = [row | {"answer": i % 5} for i, row in enumerate(prompts(NUM_RECORDS, labeled=False))]
    rows = captured(tmp_path, teacher, lines, choices=CHOICES)
    exact, answers = Exact(student, vocabulary_size(tokenizer)), [tokenizer(choice)["input_ids"] for choice in CHOICES]
    expected, num_tokens = 0.0, 0
    for row in lines:
        ids = tokenizer(row["prompt"])["input_ids"]
        for token in answers[row["answer"]]:
            expected -= float(exact.log_probs(ids)[token])
            ids, num_tokens = [*ids, token], num_tokens + 1
    batch = batch_of(rows)
    assert int((batch.target_ids_N != UNKNOWN_TARGET).sum()) == num_tokens < len(batch.target_ids_N)
    sums, counts, _ = loss_of(model_of(student), [batch], {"lm": TermOptions(on=CORPUS)})
    assert counts["lm"] == num_tokens
    assert sums["lm"] == pytest.approx(expected, rel=1e-5)
