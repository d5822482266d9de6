"""Dense logits -> TopK by one of three kinds, and TopK -> log-probabilities.

In all three the kept entries and the tail are the target distribution, so a loss has one way to read them.
`topk` is exact on its head and biased nowhere but inside the tail, whose mass is exact. `sampled` and `hybrid`
are unbiased estimates of the whole distribution at T = 1, and know no tail: what was not drawn counts as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.seeds import seed_from_bytes
from pipeline.core.types import InputError, TopK

ROWS_IN_CACHE = 32  # positions handled at once on a CPU: their fp32 logits then stay in its cache
BLOCKS = 32  # entries of a block whose largest stands for it while the largest k are looked for


def top_k_and_entropy(logits_NV: Tensor, *, k: int, temperatures: tuple[float, ...]) -> tuple[TopK, Tensor, Tensor]:
    """`top_k`, and of the whole distribution at T = 1: log sum exp(l - max l) and the entropy, both [N], fp32 nats."""
    size = logits_NV.shape[1]
    if not 1 <= k <= size:
        raise InputError(f"k: expected 1 to {size} (the vocabulary), found {k}; choose a smaller capture.k")
    rows = ROWS_IN_CACHE if logits_NV.device.type == "cpu" else max(len(logits_NV), 1)
    parts = [_read_off(rows_NV, k, temperatures) for rows_NV in logits_NV.split(rows)]
    ids_NK, relative_NK, log_tail_NC, log_z_N, entropy_N = (torch.cat(part) for part in zip(*parts, strict=True))
    top = TopK(ids_NK=ids_NK, relative_logits_NK=relative_NK.half(), log_tail_NC=log_tail_NC, temperatures=temperatures)
    return top, log_z_N, entropy_N


def _read_off(logits_NV: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, ...]:
    """ids, logits relative to the largest, log tails, log z and entropy of some positions.

    softmax is the one kernel that takes exp and sum in a single fast pass on every device; the tail's log-sum-exp is
    read off it as t - log softmax(tail)[t] where t, its largest logit, is the k+1st of all. With P the tail's mass and
    <l> its mean logit: entropy = log z - sum_K p (l - max) - P (<l> - max).
    """
    work_NV = logits_NV.to(torch.float32, copy=True)
    found_NK, found_ids_NK = largest_k(work_NV, min(k + 1, logits_NV.shape[1]))
    ids_NK, relative_NK = found_ids_NK[:, :k], found_NK[:, :k] - found_NK[:, :1]
    tail_max_N, tail_max_ids_N1 = found_NK[:, -1], found_ids_NK[:, -1:]
    lowest = torch.finfo(torch.float32).min  # not -inf: 0 * -inf would be NaN
    has_tail_N = (tail_max_N > lowest) & (found_NK.shape[1] > k)
    work_NV.clamp_(min=lowest).scatter_(1, ids_NK, lowest)

    def log_tail(p_NV: Tensor, T: float) -> Tensor:
        log_sum_N = (tail_max_N - found_NK[:, 0]) / T - p_NV.gather(1, tail_max_ids_N1)[:, 0].log()
        return torch.where(has_tail_N, log_sum_N, -torch.inf)

    tails = {T: log_tail(torch.softmax(work_NV / T, dim=1), T) for T in temperatures if T != 1.0}
    p_NV = torch.softmax(work_NV, dim=1)  # of the tail alone
    tails[1.0] = log_tail(p_NV, 1.0)
    log_z_N = torch.logaddexp(torch.logsumexp(relative_NK, dim=1), tails[1.0])
    head_N = ((relative_NK - log_z_N[:, None]).exp() * relative_NK.clamp(min=lowest)).sum(dim=1)
    tail_mean_N = torch.where(has_tail_N, p_NV.mul_(work_NV).sum(dim=1) - found_NK[:, 0], 0.0)
    entropy_N = log_z_N - head_N - (tails[1.0] - log_z_N).exp() * tail_mean_N
    return ids_NK, relative_NK, torch.stack([tails[T] for T in temperatures], dim=1), log_z_N, entropy_N


def largest_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids, by falling value.

    The k largest lie in the k blocks with the largest maxima, so only those blocks are searched. Block j holds
    the ids j, j + W, j + 2W, ...: its maximum is then one vectorized pass.
    """
    size = logits_NV.shape[1]
    width = size // BLOCKS
    if width < 2 * k:
        return logits_NV.topk(k, dim=1)
    blocks_NBW = logits_NV[:, : BLOCKS * width].unflatten(1, (BLOCKS, width))
    best_NK = blocks_NBW.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates_NBK = blocks_NBW.gather(2, best_NK[:, None].expand(-1, BLOCKS, -1))
    rest_NR = logits_NV[:, BLOCKS * width :]
    values_NK, places_NK = torch.cat([candidates_NBK.flatten(1), rest_NR], dim=1).topk(k, dim=1)
    in_blocks_NK = places_NK.clamp(max=BLOCKS * k - 1)
    ids_NK = in_blocks_NK // k * width + best_NK.gather(1, in_blocks_NK % k)
    return values_NK, torch.where(places_NK < BLOCKS * k, ids_NK, places_NK - BLOCKS * k + BLOCKS * width)


def sampled(logits_NV: Tensor, *, uniforms_ND: Tensor) -> TopK:
    """D draws with replacement from softmax(logits): weights count / D, unbiased (Anshumann et al. 2025, 2503.16870).

    `uniforms_ND` in [0, 1) decide the draws, by inversion of the cumulative distribution in fp64.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    ids_ND, counts_ND = _draw(p_NV, uniforms_ND)
    return _from_weights(ids_ND, counts_ND / uniforms_ND.shape[1])


def hybrid(logits_NV: Tensor, *, k: int, uniforms_ND: Tensor) -> TopK:
    """The k largest exactly, the remaining mass r spread over D draws from the rest, each worth r * count / D.

    Unbiased, sums to one, exact on the head.
    """
    p_NV = torch.softmax(logits_NV.double(), dim=1)
    head_NK, ids_NK = p_NV.topk(k, dim=1)
    rest_NV = p_NV.scatter(1, ids_NK, 0.0)
    rest_N1 = rest_NV.sum(dim=1, keepdim=True)
    drawn_ND, counts_ND = _draw(rest_NV, uniforms_ND)
    weights = torch.cat([head_NK, rest_N1 * counts_ND / uniforms_ND.shape[1]], dim=1)
    return _from_weights(torch.cat([ids_NK, drawn_ND], dim=1), weights)


def _draw(mass_NV: Tensor, uniforms_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Different ids drawn [N, D] and how often each was [N, D]; 0 times where there are fewer than D."""
    cumulative_NV = mass_NV.cumsum(dim=1)
    # side="right": an id without mass is never drawn
    wanted_ND = uniforms_ND.to(cumulative_NV) * cumulative_NV[:, -1:]
    drawn_ND = torch.searchsorted(cumulative_NV, wanted_ND, right=True).clamp(max=mass_NV.shape[1] - 1)
    drawn_ND = drawn_ND.sort(dim=1).values
    is_new_ND = torch.ones_like(drawn_ND, dtype=torch.bool)
    is_new_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]
    slot_ND = is_new_ND.cumsum(dim=1) - 1
    counts_ND = torch.zeros_like(drawn_ND).scatter_add(1, slot_ND, torch.ones_like(drawn_ND))
    return torch.zeros_like(drawn_ND).scatter(1, slot_ND, drawn_ND), counts_ND


def _from_weights(ids_NK: Tensor, weights_NK: Tensor) -> TopK:
    """Entries by falling weight; those of no weight become padding: -inf, with the first entry's id."""
    weights_NK, order_NK = weights_NK.sort(dim=1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    relative_NK = (weights_NK.log() - weights_NK[:, :1].log()).half()
    width = int((relative_NK > -torch.inf).sum(dim=1).max())
    return TopK(
        ids_NK=torch.where(relative_NK > -torch.inf, ids_NK, ids_NK[:, :1])[:, :width],
        relative_logits_NK=relative_NK[:, :width],
        log_tail_NC=torch.full((len(ids_NK), 1), -torch.inf, device=ids_NK.device),
        temperatures=(1.0,),
    )


def uniform_draws(key: bytes, count: int, *, draws: int, seed: int) -> Tensor:
    """fp64 [N, D] in [0, 1): a function of (seed, sequence key, position), so that a redone shard draws the same."""
    generator = torch.Generator().manual_seed(seed_from_bytes(seed.to_bytes(8, "little", signed=True) + key))
    return torch.rand(count, draws, generator=generator, dtype=torch.float64)


def from_log_probabilities(ids_NK: Tensor, log_p_NK: Tensor, *, has_tail: bool) -> TopK:
    """Entries that somebody else kept, in any order and -inf where there is none: at least one a position, T = 1.

    With `has_tail` the mass outside is 1 - sum p, in fp64, and 0 where the entries sum to more; else it is 0.
    """
    log_p_NK, order_NK = log_p_NK.double().sort(dim=1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    largest_N1 = log_p_NK[:, :1]
    log_rest_N1 = torch.log1p(-log_p_NK.exp().sum(dim=1, keepdim=True).clamp(max=1.0))
    relative_NK = (log_p_NK - largest_N1).half()
    width = int((relative_NK > -torch.inf).sum(dim=1).max())
    return TopK(
        ids_NK=torch.where(relative_NK > -torch.inf, ids_NK, ids_NK[:, :1])[:, :width],
        relative_logits_NK=relative_NK[:, :width],
        log_tail_NC=(log_rest_N1 - largest_N1 if has_tail else torch.full_like(largest_N1, -torch.inf)).float(),
        temperatures=(1.0,),
    )


def temperature_index(top_temperatures: tuple[float, ...], temperature: float) -> int:
    """Column of `log_tail_NC` for a temperature; refuses one that was not captured, whose tail nobody knows."""
    if temperature not in top_temperatures:
        raise InputError(
            f"temperature: expected one of the captured {list(top_temperatures)}, found {temperature}; "
            "choose one of them, or capture again with it in capture.temperatures"
        )
    return top_temperatures.index(temperature)


def log_probabilities(top: TopK, *, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept entries [N, K] and of the tail as a whole [N], in nats.

    They sum to one exactly, rounding of the stored logits included, because z is made of what is stored.
    """
    scaled_NK = top.relative_logits_NK.to(dtype) / temperature
    log_tail_N = top.log_tail_NC[:, temperature_index(top.temperatures, temperature)].to(dtype)
    log_z_N = torch.logaddexp(torch.logsumexp(scaled_NK, dim=1), log_tail_N)
    return scaled_NK - log_z_N[:, None], log_tail_N - log_z_N


def label_smoothed(top: TopK, entropy_N: Tensor, *, vocabulary_size: int) -> TopK:
    """Label smoothing of equal entropy in the teacher's place: its likeliest token, and all others alike.

    p = (1 - e) onehot + e / V with e such that H(p) is the teacher's; how much of distillation is that is the question
    of Yuan et al. 2020 (arXiv 1909.11723). A control: what the teacher knows beyond its first choice is gone.
    """
    if not entropy_N.isfinite().all():
        raise InputError(
            "loss.kd.control=smoothed: expected the teacher's entropy at every position, found a cache that does not "
            "know it (an imported one); capture with this project"
        )
    V, low_N = vocabulary_size, torch.zeros(len(entropy_N), dtype=torch.float64)
    high_N = torch.ones_like(low_N)
    for _ in range(60):
        e_N = (low_N + high_N) / 2
        first_N, other_N = 1 - e_N + e_N / V, e_N / V
        too_sure_N = torch.special.entr(first_N) + (V - 1) * torch.special.entr(other_N) < entropy_N
        low_N, high_N = torch.where(too_sure_N, e_N, low_N), torch.where(too_sure_N, high_N, e_N)
    relative_N1 = (other_N / first_N).log().clamp(min=-700.0)[:, None]
    is_kept_NK = top.relative_logits_NK > -torch.inf
    likeliest_N1 = top.relative_logits_NK.argmax(dim=1, keepdim=True)
    relative_NK = torch.where(is_kept_NK, relative_N1, -torch.inf).scatter(1, likeliest_N1, 0.0)
    num_rest_N1 = (V - is_kept_NK.sum(dim=1, keepdim=True)).double()
    return TopK(
        ids_NK=top.ids_NK,
        relative_logits_NK=relative_NK.float(),
        log_tail_NC=torch.cat([num_rest_N1.log() + relative_N1 / T for T in top.temperatures], dim=1).float(),
        temperatures=top.temperatures,
    )


def narrow(top: TopK, *, k: int) -> TopK:
    """The same distribution seen with fewer kept entries: the dropped ones fold into the tail, exactly."""
    held = top.ids_NK.shape[1]
    if not 1 <= k <= held:
        raise InputError(f"k: expected 1 to the captured {held}, found {k}; choose a smaller k or capture again")
    dropped_NK = top.relative_logits_NK[:, k:].float()
    columns = [
        torch.logaddexp(top.log_tail_NC[:, c], torch.logsumexp(dropped_NK / T, dim=1))
        for c, T in enumerate(top.temperatures)
    ]
    return TopK(
        ids_NK=top.ids_NK[:, :k],
        relative_logits_NK=top.relative_logits_NK[:, :k],
        log_tail_NC=torch.stack(columns, dim=1) if k < held else top.log_tail_NC,
        temperatures=top.temperatures,
    )
