"""From the log-probabilities of a record's choices to a prediction: the score of a choice, ties, credit.

No result here depends on the order of the choices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


def total(log_probs: Sequence[float], text: str) -> float:
    """log p(choice | prompt) = sum over its tokens of log p(token | all before it), nats: `acc` of the LM Evaluation
    Harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness)."""
    return sum(log_probs)


def per_byte(log_probs: Sequence[float], text: str) -> float:
    """log p(choice | prompt) / number of UTF-8 bytes of its text: `acc_bytes` of the harness.

    Its `acc_norm` divides by characters (`process_results` of lm_eval/api/task.py): the same number for ASCII text.
    Space before the choice is counted here; the harness does not count its `target_delimiter`.
    """
    return sum(log_probs) / len(text.encode())


def per_token(log_probs: Sequence[float], text: str) -> float:
    """log p(choice | prompt) / number of its tokens, the end token included if it is scored (Brown et al. 2020,
    arXiv 2005.14165, section 2.4)."""
    return sum(log_probs) / len(log_probs)


RULES: dict[str, Callable[[Sequence[float], str], float]] = {"": total, "_norm": per_byte, "_norm_tokens": per_token}
"""By the ending of their columns and scores: `predicted_norm`, `correct_norm`, `accuracy_norm`. The first decides."""


def best_choices(scores: Sequence[float]) -> tuple[int, ...]:
    """The indices of the highest score, ascending; more than one is a tie. None of no scores, or of NaN."""
    highest = max(scores, default=None)
    return tuple(index for index, score in enumerate(scores) if score == highest)


def credit(best: Sequence[int], answer: int) -> float:
    """1 / m where the answer is one of m best choices, else 0: the mean over all ways to break the tie."""
    return 1 / len(best) if answer in best else 0.0


def shared_fraction(best: Collection[int], other: Collection[int]) -> float:
    """Of the choices that are best for either of two models, the fraction that is best for both (Jaccard index).

    1 where both have the same best choices, tied or not; 1 / m where m are tied for one and the other's is among them.
    """
    return len({*best} & {*other}) / len({*best} | {*other})
