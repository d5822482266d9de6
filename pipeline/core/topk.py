"""Dense logits -> TopK by one of three kinds, and TopK -> log-probabilities.

In all three kinds the kept entries and the tail together are the target distribution, so a loss reads all of them
alike. `topk` is exact for the kept entries and for the mass of the tail; only how this mass is spread inside the tail
is lost. `sampled` and `hybrid` are unbiased estimates of the full distribution at T = 1. They have no tail: a token
that was not drawn has probability 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.seeds import seed_from_bytes
from pipeline.core.types import InputError, TopK

ROWS_IN_CACHE = 32  # positions processed at once on a CPU: their fp32 logits then stay in its cache
BLOCK_SIZE = 32  # entries of a block: the search for the k largest first looks only at each block's maximum


def top_k_and_entropy(logits_NV: Tensor, *, k: int, temperatures: tuple[float, ...]) -> tuple[TopK, Tensor, Tensor]:
    """The k largest logits with the tail of each temperature; log z and entropy of the full distribution at T = 1.

    log z = log sum exp(l - max l). Both are [N], fp32, nats. InputError if k is not within the vocabulary.
    """
    size = logits_NV.shape[1]
    if not 1 <= k <= size:
        raise InputError(f"k: expected 1 to {size} (the vocabulary), found {k}; choose a smaller capture.k")
    rows = ROWS_IN_CACHE if logits_NV.device.type == "cpu" else max(len(logits_NV), 1)
    parts = [_top_k_and_entropy(rows_NV, k, temperatures) for rows_NV in logits_NV.split(rows)]
    ids_NK, relative_NK, log_tail_NC, log_z_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
    top = TopK(ids_NK=ids_NK, relative_logits_NK=relative_NK.half(), log_tail_NC=log_tail_NC, temperatures=temperatures)
    return top, log_z_N, entropy_N


def _top_k_and_entropy(logits_NV: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Of N positions: ids [N, K], logits minus the largest [N, K], log tails [N, C], log z [N], entropy [N].

    softmax computes exp and sum in one fast pass on every device, so the tail's log-sum-exp comes from its result:
    log sum exp(tail) = t - log softmax(tail)[t], where t, the tail's largest logit, is the (k+1)st largest of all.
    entropy = log z - sum_K p (l - max) - P (m - max), with P the tail's mass and m its mean logit.
    """
    work_NV = logits_NV.to(torch.float32, copy=True)
    largest_NK, largest_ids_NK = largest_k(work_NV, min(k + 1, logits_NV.shape[1]))  # here K is k + 1
    ids_NK, relative_NK = largest_ids_NK[:, :k], largest_NK[:, :k] - largest_NK[:, :1]
    tail_max_N, tail_max_ids_N1 = largest_NK[:, -1], largest_ids_NK[:, -1:]
    lowest = torch.finfo(torch.float32).min  # not -inf: 0 * -inf would be NaN
    has_tail_N = (tail_max_N > lowest) & (largest_NK.shape[1] > k)
    work_NV.clamp_(min=lowest).scatter_(1, ids_NK, lowest)  # now the tail's logits alone

    def log_tail(p_NV: Tensor, T: float) -> Tensor:
        log_sum_N = (tail_max_N - largest_NK[:, 0]) / T - p_NV.gather(1, tail_max_ids_N1)[:, 0].log()
        return torch.where(has_tail_N, log_sum_N, -torch.inf)

    tails = {T: log_tail(torch.softmax(work_NV / T, dim=1), T) for T in temperatures if T != 1.0}
    p_NV = torch.softmax(work_NV, dim=1)
    tails[1.0] = log_tail(p_NV, 1.0)
    log_z_N = torch.logaddexp(torch.logsumexp(relative_NK, dim=1), tails[1.0])
    head_N = ((relative_NK - log_z_N[:, None]).exp() * relative_NK.clamp(min=lowest)).sum(dim=1)
    tail_mean_N = torch.where(has_tail_N, p_NV.mul_(work_NV).sum(dim=1) - largest_NK[:, 0], 0.0)
    entropy_N = log_z_N - head_N - (tails[1.0] - log_z_N).exp() * tail_mean_N
    return ids_NK, relative_NK, torch.stack([tails[T] for T in temperatures], dim=1), log_z_N, entropy_N


def largest_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids, both [N, K], by falling value.

    The k largest lie in the k blocks with the largest maxima, so only those blocks are searched. With W blocks, block j
    holds the ids j, j + W, j + 2W, ...: one vectorized pass then finds all maxima. The last V mod BLOCK_SIZE ids are in
    no block and are always searched.
    """
    size = logits_NV.shape[1]
    num_blocks = size // BLOCK_SIZE
    if num_blocks < 2 * k:
        return logits_NV.topk(k, dim=1)
    # in these names, B is an entry's row in its block and W the block. An example for the steps below: V = 10,
    # BLOCK_SIZE = 3, k = 1. The 3 blocks are the columns of [[0, 1, 2], [3, 4, 5], [6, 7, 8]]; id 9 is the rest
    blocked_NBW = logits_NV[:, : BLOCK_SIZE * num_blocks].unflatten(1, (BLOCK_SIZE, num_blocks))
    best_blocks_NK = blocked_NBW.amax(dim=1).topk(k, dim=1, sorted=False).indices  # for instance block 2: ids 2, 5, 8
    candidates_NBK = blocked_NBW.gather(2, best_blocks_NK[:, None].expand(-1, BLOCK_SIZE, -1))
    rest_NR = logits_NV[:, BLOCK_SIZE * num_blocks :]
    # places 0 to BLOCK_SIZE * k - 1 are candidates, row by row; the others are the rest: here ids 2, 5, 8, then 9
    values_NK, places_NK = torch.cat([candidates_NBK.flatten(1), rest_NR], dim=1).topk(k, dim=1)
    num_candidates = BLOCK_SIZE * k
    # a candidate's id is row * W + block: place 1 is row 1 // k = 1 of block best[1 % k] = 2, so id 1 * 3 + 2 = 5
    candidate_places_NK = places_NK.clamp(max=num_candidates - 1)
    candidate_ids_NK = candidate_places_NK // k * num_blocks + best_blocks_NK.gather(1, candidate_places_NK % k)
    # the rest begins at id BLOCK_SIZE * W: place 3 is id 3 - 3 + 9 = 9
    rest_ids_NK = places_NK - num_candidates + BLOCK_SIZE * num_blocks
    return values_NK, torch.where(places_NK < num_candidates, candidate_ids_NK, rest_ids_NK)


def kept_ids(top: TopK) -> Tensor:
    """int64 [N, K]: the kept tokens, -1 in place of padding."""
    return torch.where(top.relative_logits_NK > -torch.inf, top.ids_NK.long(), -1)


def keep_also(top: TopK, logits_NV: Tensor, also_NJ: Tensor) -> TopK:
    """The same distributions with further kept entries: the tokens `also_NJ`, without repetition; -1: none.

    What top keeps stays first and as it is; the added logits follow by falling value, K + J entries in all. The tails
    are those of all other tokens: log_tail(T) = log sum exp((l - max l) / T), computed from their logits.
    """
    rows = ROWS_IN_CACHE if logits_NV.device.type == "cpu" else max(len(logits_NV), 1)
    starts = range(0, len(logits_NV), rows)
    parts = [slice(start, start + rows) for start in starts]
    return TopK.cat([_keep_also(top.select(part), logits_NV[part], also_NJ[part]) for part in parts])


def _keep_also(top: TopK, logits_NV: Tensor, also_NJ: Tensor) -> TopK:
    rest_NV = logits_NV.to(torch.float32, copy=True)
    first_N1 = top.ids_NK[:, :1]
    rest_NV -= rest_NV.gather(1, first_N1)
    rest_NV.scatter_(1, top.ids_NK, -torch.inf)
    also_NJ = torch.where(also_NJ < 0, first_N1, also_NJ)  # of probability 0 now, as all that top keeps
    added_NJ, order_NJ = rest_NV.gather(1, also_NJ).sort(dim=1, descending=True, stable=True)
    rest_NV.scatter_(1, also_NJ, -torch.inf)
    added_ids_NJ = torch.where(added_NJ > -torch.inf, also_NJ.gather(1, order_NJ), first_N1)
    tails = [torch.logsumexp(rest_NV if T == 1.0 else rest_NV / T, dim=1) for T in top.temperatures]
    return TopK(
        ids_NK=torch.cat([top.ids_NK, added_ids_NJ], dim=1),
        relative_logits_NK=torch.cat([top.relative_logits_NK, added_NJ.half()], dim=1),
        log_tail_NC=torch.stack(tails, dim=1),
        temperatures=top.temperatures,
    )


def sampled(logits_NV: Tensor, *, uniforms_ND: Tensor) -> TopK:
    """D draws with replacement from softmax(logits): weights count / D, unbiased (Anshumann et al. 2025, 2503.16870).

    `uniforms_ND` in [0, 1) determine the draws, by inversion of the cumulative distribution in fp64.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    ids_ND, counts_ND = _draw(p_NV, uniforms_ND)
    return _from_weights(ids_ND, counts_ND / uniforms_ND.shape[1])


def hybrid(logits_NV: Tensor, *, k: int, uniforms_ND: Tensor) -> TopK:
    """The k largest probabilities exactly, and D draws from the other tokens: weights r * count / D.

    r is the mass outside the k largest. Unbiased, sums to one, exact for the k largest.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    head_NK, ids_NK = p_NV.topk(k, dim=1)
    rest_NV = p_NV.scatter(1, ids_NK, 0.0)
    rest_N1 = rest_NV.sum(dim=1, keepdim=True)
    drawn_ND, counts_ND = _draw(rest_NV, uniforms_ND)
    weights = torch.cat([head_NK, rest_N1 * counts_ND / uniforms_ND.shape[1]], dim=1)
    return _from_weights(torch.cat([ids_NK, drawn_ND], dim=1), weights)


def _draw(mass_NV: Tensor, uniforms_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids among D draws [N, D] and how often each was drawn [N, D].

    Where fewer than D ids are distinct, the columns left over hold id 0 with count 0.
    """
    # an example of one position: mass [0.5, 0, 0.3, 0.2] and uniforms [0.9, 0.1, 0.4]
    cumulative_NV = mass_NV.cumsum(dim=1)  # [0.5, 0.5, 0.8, 1.0]
    thresholds_ND = uniforms_ND.to(cumulative_NV) * cumulative_NV[:, -1:]
    # right=True: an id without mass is never drawn
    drawn_ND = torch.searchsorted(cumulative_NV, thresholds_ND, right=True).clamp(max=mass_NV.shape[1] - 1)  # [3, 0, 0]
    drawn_ND = drawn_ND.sort(dim=1).values  # [0, 0, 3]
    is_new_ND = torch.ones_like(drawn_ND, dtype=torch.bool)
    is_new_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]  # [True, False, True]
    columns_ND = is_new_ND.cumsum(dim=1) - 1  # each draw's column in the result: [0, 0, 1]
    counts_ND = torch.zeros_like(drawn_ND).scatter_add(1, columns_ND, torch.ones_like(drawn_ND))  # [2, 1, 0]
    ids_ND = torch.zeros_like(drawn_ND).scatter(1, columns_ND, drawn_ND)  # [0, 3, 0]
    return ids_ND, counts_ND


def _from_weights(ids_NK: Tensor, weights_NK: Tensor) -> TopK:
    """TopK of probabilities without a tail: entries by falling weight, relative logit log(weight / largest weight).

    Entries of weight 0 become padding, and columns that are padding at every position are cut off.
    """
    weights_NK, order_NK = weights_NK.sort(dim=1, descending=True, stable=True)
    relative_NK = (weights_NK.log() - weights_NK[:, :1].log()).half()
    ids_NK, relative_NK = _cut_padding(ids_NK.gather(1, order_NK), relative_NK)
    log_tail_N1 = torch.full((len(ids_NK), 1), -torch.inf, device=ids_NK.device)
    return TopK(ids_NK=ids_NK, relative_logits_NK=relative_NK, log_tail_NC=log_tail_N1, temperatures=(1.0,))


def _cut_padding(ids_NK: Tensor, relative_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Give padding (-inf) the first entry's id, and keep as many columns as the position with the most entries has."""
    is_kept_NK = relative_NK > -torch.inf
    width = int(is_kept_NK.sum(dim=1).max())
    return torch.where(is_kept_NK, ids_NK, ids_NK[:, :1])[:, :width], relative_NK[:, :width]


def uniform_draws(key: bytes, count: int, *, draws: int, seed: int) -> Tensor:
    """fp64 [N, D] in [0, 1): a function of (seed, sequence key, position), so a shard captured again is the same."""
    generator = torch.Generator().manual_seed(seed_from_bytes(seed.to_bytes(8, "little", signed=True) + key))
    return torch.rand(count, draws, generator=generator, dtype=torch.float64)


def from_log_probabilities(ids_NK: Tensor, log_p_NK: Tensor, *, has_tail: bool) -> TopK:
    """TopK at T = 1 of log-probabilities in any order, -inf where there is none; each position has at least one entry.

    With `has_tail` the tail's mass is 1 - sum p, computed in fp64, and 0 where the entries sum to more than 1. Without,
    it is 0.
    """
    log_p_NK, order_NK = log_p_NK.double().sort(dim=1, descending=True, stable=True)
    largest_N1 = log_p_NK[:, :1]
    log_rest_N1 = torch.log1p(-log_p_NK.exp().sum(dim=1, keepdim=True).clamp(max=1.0))
    log_tail_N1 = log_rest_N1 - largest_N1 if has_tail else torch.full_like(largest_N1, -torch.inf)
    ids_NK, relative_NK = _cut_padding(ids_NK.gather(1, order_NK), (log_p_NK - largest_N1).half())
    return TopK(ids_NK=ids_NK, relative_logits_NK=relative_NK, log_tail_NC=log_tail_N1.float(), temperatures=(1.0,))


def temperature_index(top_temperatures: tuple[float, ...], temperature: float) -> int:
    """The column of `log_tail_NC` for a temperature; InputError if it was not captured, since its tail is unknown."""
    if temperature not in top_temperatures:
        raise InputError(
            f"temperature: expected one of the captured {list(top_temperatures)}, found {temperature}; "
            "choose one of them, or capture again with it in capture.temperatures"
        )
    return top_temperatures.index(temperature)


def log_probabilities(top: TopK, *, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept entries [N, K] and of the tail [N], in nats.

    Their probabilities sum to one even though the stored logits are rounded, because z is computed from these logits.
    """
    scaled_NK = top.relative_logits_NK.to(dtype) / temperature
    log_tail_N = top.log_tail_NC[:, temperature_index(top.temperatures, temperature)].to(dtype)
    log_z_N = torch.logaddexp(torch.logsumexp(scaled_NK, dim=1), log_tail_N)
    return scaled_NK - log_z_N[:, None], log_tail_N - log_z_N


def label_smoothed(top: TopK, entropy_N: Tensor, *, vocabulary_size: int) -> TopK:
    """Replace the teacher's distribution by label smoothing of its most likely token, with the same entropy.

    p = (1 - e) onehot + e / V, with e such that H(p) is the teacher's entropy. A control: it removes all that the
    teacher knows beyond its first choice, to measure how much of distillation is label smoothing (Yuan et al. 2020,
    arXiv 1909.11723). InputError if an entropy is not finite.
    """
    if not entropy_N.isfinite().all():
        raise InputError(
            "loss.kd.control=smoothed: expected the teacher's entropy at every position, found a cache without it (an "
            "import or a pool); capture with this project"
        )
    V, low_N = vocabulary_size, torch.zeros(len(entropy_N), dtype=torch.float64)
    high_N = torch.ones_like(low_N)
    for _ in range(60):  # bisection: the entropy grows with e
        e_N = (low_N + high_N) / 2
        first_N, other_N = 1 - e_N + e_N / V, e_N / V
        is_too_low_N = torch.special.entr(first_N) + (V - 1) * torch.special.entr(other_N) < entropy_N
        low_N, high_N = torch.where(is_too_low_N, e_N, low_N), torch.where(is_too_low_N, high_N, e_N)
    relative_N1 = (other_N / first_N).log().clamp(min=-700.0)[:, None]
    is_kept_NK = top.relative_logits_NK > -torch.inf
    most_likely_N1 = top.relative_logits_NK.argmax(dim=1, keepdim=True)
    relative_NK = torch.where(is_kept_NK, relative_N1, -torch.inf).scatter(1, most_likely_N1, 0.0)
    num_rest_N1 = (V - is_kept_NK.sum(dim=1, keepdim=True)).double()
    return TopK(
        ids_NK=top.ids_NK,
        relative_logits_NK=relative_NK.float(),
        log_tail_NC=torch.cat([num_rest_N1.log() + relative_N1 / T for T in top.temperatures], dim=1).float(),
        temperatures=top.temperatures,
    )


def narrow(top: TopK, *, k: int) -> TopK:
    """The same distribution with only its k largest entries; the mass of the others is added to the tail, exactly."""
    num_kept = top.ids_NK.shape[1]
    if not 1 <= k <= num_kept:
        raise InputError(f"k: expected 1 to the captured {num_kept}, found {k}; choose a smaller k or capture again")
    dropped_NK = top.relative_logits_NK[:, k:].float()
    log_tails = [
        torch.logaddexp(top.log_tail_NC[:, c], torch.logsumexp(dropped_NK / T, dim=1))
        for c, T in enumerate(top.temperatures)
    ]
    return TopK(
        ids_NK=top.ids_NK[:, :k],
        relative_logits_NK=top.relative_logits_NK[:, :k],
        log_tail_NC=torch.stack(log_tails, dim=1) if k < num_kept else top.log_tail_NC,
        temperatures=top.temperatures,
    )
