"""The maths of CoTAP: the continuous average-precision loss, assignments, the object-aware filter, cross-entropies of crops.

Source: "Semantic Concentration for Self-Supervised Dense Representations Learning" (arXiv:2509.09429). The authors' KID-7391/CoTAP could
not be had; golden vectors and readings come from a public copy, Mayao15/CoTAP@7aa0ca6 (losses/intra_sample.py, losses/inner_sample.py,
losses/loss_wrapper.py, losses/kernel_align.py, models/vit/vision_transformer_depth.py), whose equality with the original could not be
verified. Left out: the hinge, kernel-alignment and identity losses of that copy, which its configuration doesn't use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-5  # of the authors, in the loss's two quotients and in the norms of scores


# ---- continuous average precision ------------------------------------------------------------------------------------------------------


class ContinuousAP(NamedTuple):
    """The loss of a list and its parts, float32 or wider.

    Attributes:
        loss: Scalar in [0, 1).
        pn: (n,) how much smaller targets are predicted above each entry, or less than tau below it; >= 0.
        pp: (n,) entries whose target and prediction are both at least the entry's, itself among them; >= 1, without a gradient.
        weight: (n,) >= 0, without a gradient.
    """

    loss: Tensor
    pn: Tensor
    pp: Tensor
    weight: Tensor


def _beyond(keys: Tensor, moments: Tensor, thresholds: Tensor) -> Tensor:
    """Sums of the moments of those entries of a row whose key is above each threshold.

    Args:
        keys: (P, b), without a gradient.
        moments: (P, b, m).
        thresholds: (P, q), without a gradient.

    Returns:
        (P, q, m).
    """
    keys, order = keys.sort(-1)
    sums = F.pad(moments.gather(1, order[..., None].expand_as(moments)).cumsum(1), (0, 0, 1, 0))
    below = torch.searchsorted(keys, thresholds.contiguous(), right=True)
    return sums[:, -1:] - sums.gather(1, below[..., None].expand(*below.shape, moments.shape[-1]))


def _negatives_and_positives(t: Tensor, s: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """PN and PP of a list by divide and conquer over the targets, in float64: O(n log^2 n) operations, O(n log n) memory.

    In the order of the targets, each entry of the right half of a block has a larger target than those of the left half. The surrogate is a
    polynomial of s_i - s_j in two ranges of s_j, so what the left half adds to an entry of the right one follows from the sums of s^k and
    t s^k, k = 0, 1, 2, over these ranges: running sums in the order of s.
    """
    n = len(t)
    order = s.detach().argsort(stable=True)
    order = order[t[order].argsort(stable=True)]
    t, s = t[order], s[order]
    new = torch.ones(n, dtype=torch.bool, device=t.device)
    new[1:] = (t[1:] != t[:-1]) | (s[1:] != s[:-1]).detach()
    place = torch.arange(n, device=t.device)
    pp = 1.0 + (place - torch.where(new, place, 0).cummax(0).values)  # itself, and equal entries before it
    u = (s - s.detach().mean()) / tau  # only differences count: centred, the sums below keep their digits
    v = t - t.mean()
    powers = torch.stack([torch.ones_like(u), u, u * u], dim=1)
    moments = torch.cat([powers, v[:, None] * powers], dim=1)
    size = 1 << max(n - 1, 0).bit_length()
    keys = F.pad(s.detach(), (0, size - n), value=-torch.inf)
    u, v, moments = F.pad(u, (0, size - n)), F.pad(v, (0, size - n)), F.pad(moments, (0, 0, 0, size - n))
    pn, pp, half = 0 * u, F.pad(pp, (0, size - n)), 1
    while half < size:
        blocks = [part.unflatten(0, (-1, 2, half)) for part in (keys, u, v, moments, pp)]
        sides = zip(*(x.unbind(1) for x in blocks), strict=True)
        (left_keys, _, _, left_moments, left_pp), (right_keys, right_u, right_v, _, right_pp) = sides
        thresholds = torch.cat([right_keys, right_keys - tau], dim=1)
        sums = _beyond(left_keys, left_moments, thresholds).unflatten(1, (2, half))  # (pairs, 2, half, 6)
        above, reached = (right_v[..., None] * sums[:, k, :, :3] - sums[:, k, :, 3:] for k in (0, 1))  # sum of (t_i - t_j) u_j^k
        near, c = reached - above, 1 - right_u
        linear = (1 - 2 * right_u) * above[..., 0] + 2 * above[..., 1]
        square = c * c * near[..., 0] + 2 * c * near[..., 1] + near[..., 2]
        pn = pn + torch.stack([torch.zeros_like(linear), linear + square], dim=1).flatten()
        count = half - torch.searchsorted(right_keys.sort(-1).values, left_keys.contiguous())  # of the right half, s_j >= s_i
        pp = torch.stack([left_pp + count, right_pp], dim=1).flatten()
        half *= 2
    back = order.argsort()
    return pn[:n][back], pp[:n][back]


def continuous_ap_loss(
    teacher: Tensor,
    student: Tensor,
    is_match: Tensor | None = None,
    tau: float = 0.5,
    weight_threshold: float = -0.2,
    ap_mul: float = 1.0,
    unmatched_weight: float = 0.1,
) -> ContinuousAP:
    """Average precision for continuous targets: entries with a larger target shall be predicted above those with a smaller one.

    With targets t and predictions s of one list, PP_i counts the j with t_j >= t_i and s_j >= s_i, and

        PN_i = ap_mul * sum_j max(t_i - t_j, 0) l(s_i - s_j),   l(x) = (1 - min(x, tau) / tau)^2 for x >= 0, 1 - 2 x / tau for x < 0,
        r_i = PN_i / (1e-5 + PP_i),   w_i = max(t_i - weight_threshold, 0), times unmatched_weight where is_match isn't 1,
        loss = sum_i w_i r_i / (1 + r_i) / (1e-5 + sum_i w_i).

    With targets 0 and 1, r / (1 + r) = PN / (PN + PP) is 1 less the precision at i. Adding a constant to s changes nothing; s = t doesn't
    give 0, as predictions shall differ by tau. Computed in float64 and O(n log^2 n), without any matrix of pairs.

    Args:
        teacher: (n,) targets, floating point; no gradient flows into them.
        student: (n,) predictions in the same unit as ``tau``.
        is_match: (n,) 1 or True: a pair of matching images; None: all match.
        tau: Distance of predictions from which a pair costs nothing, > 0.
        weight_threshold: Target at which an entry begins to count.
        ap_mul: Factor of PN, >= 0.
        unmatched_weight: Factor of the weight of entries that don't match.

    Returns:
        Loss and parts; the loss of an empty list, or of one without weights, is 0.

    Raises:
        ValueError: The lists aren't flat and equally long, or ``tau`` isn't positive.
    """
    if teacher.ndim != 1 or teacher.shape != student.shape or (is_match is not None and is_match.shape != teacher.shape):
        shapes = ", ".join(str(tuple(part.shape)) for part in (teacher, student, is_match) if part is not None)
        raise ValueError(f"similarities are {shapes}, expected lists (n,) of one length: flatten all of a batch into one list")
    if not tau > 0:
        raise ValueError(f"tau is {tau}: give a distance of predictions above 0")
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        t, s = teacher.detach().double(), student.double()
        pn, pp = _negatives_and_positives(t, s, tau)
        weight = (t - weight_threshold).clamp(min=0)
        if is_match is not None:
            weight = torch.where(is_match == 1, weight, unmatched_weight * weight)
        pn = ap_mul * pn
        ratio = pn / (_EPS + pp)
        loss = (weight * ratio / (1 + ratio)).sum() / (_EPS + weight.sum())
        return ContinuousAP(*(part.to(wide) for part in (loss, pn, pp, weight)))


# ---- the list of similarities ----------------------------------------------------------------------------------------------------------


def strongest_patches(masks: Tensor, pool: int, top: int) -> Tensor:
    """Places of the patches with the largest mask, among all crops of an image together.

    Args:
        masks: (B, G, h, w) floating point, of G crops.
        pool: Side of the grid to which masks and maps are averaged.
        top: Patches to keep; at most all G * pool * pool.

    Returns:
        (B, k) int64 into the G * pool * pool pooled patches.
    """
    return F.adaptive_avg_pool2d(masks, pool).flatten(1).topk(min(top, masks.shape[1] * pool * pool), dim=1).indices


def pooled_rows(maps: Tensor, places: Tensor, pool: int) -> Tensor:
    """Chosen patches of averaged maps, with norm 1.

    Args:
        maps: (B, G, K, h, w) scores of G crops.
        places: (B, k) of :func:`strongest_patches`.
        pool: Side of the grid to which maps are averaged.

    Returns:
        (B, k, K), float32 or wider.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        rows = F.adaptive_avg_pool2d(maps.flatten(0, 1), pool).unflatten(0, maps.shape[:2]).permute(0, 1, 3, 4, 2).flatten(1, 3)
        return F.normalize(rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1])), dim=-1, eps=_EPS)


def other_images(number: int, batch_size: int, noise: Tensor) -> Tensor:
    """Permutations of a batch in which hardly an image is at its own place: where one would be, the next takes it.

    Args:
        number: R permutations.
        batch_size: B.
        noise: (R, B) whose order makes the permutations.

    Returns:
        (R, B) int64; an image may stand twice, as in the authors' code. With one image all are that image.
    """
    if noise.shape != (number, batch_size):
        raise ValueError(f"noise is {tuple(noise.shape)}, expected ({number}, {batch_size})")
    order, own = noise.argsort(1), torch.arange(batch_size, device=noise.device)
    return torch.where(order == own, order + 1, order) % max(batch_size, 1)


def similarity_list(rows: Tensor, positives: Tensor, permutations: Tensor) -> Tensor:
    """Cosines of each image's patches with those of its positive image, then of R other images' positives, in one list.

    Args:
        rows: (B, k, K) with norm 1.
        positives: (B, k, K) with norm 1.
        permutations: (R, B).

    Returns:
        (B * (1 + R) * k * k,), image by image; of an image's (1 + R) * k * k entries, the first k * k match.
    """
    with torch.autocast(rows.device.type, enabled=False):
        partners = torch.cat([positives[None], positives[permutations]])  # (1 + R, B, k, K)
        return torch.einsum("bxc,rbyc->brxy", rows, partners).flatten()


def matches(batch_size: int, others: int, patches: int, device: torch.device | None = None) -> Tensor:
    """Which entries of :func:`similarity_list` are of matching images: (B * (1 + R) * k * k,) bool."""
    found = torch.zeros(batch_size, 1 + others, patches * patches, dtype=torch.bool, device=device)
    found[:, 0] = True
    return found.flatten()


# ---- assignments -----------------------------------------------------------------------------------------------------------------------


def sinkhorn(scores: Tensor, temperature: float = 0.05, iterations: int = 3, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Assignments of samples to prototypes in which all prototypes are used about equally.

    exp(scores / temperature) is scaled in turn so that all prototypes have the same sum over the samples and all samples the same sum, in
    logarithms, so that nothing overflows.

    Args:
        scores: (N, K).
        temperature: > 0; small: hard assignments.
        iterations: Rounds; 0: a softmax.
        gather: Rows of one process -> those of all, (r, K) -> (R, K), so that all processes' samples are balanced together; None: one.

    Returns:
        (N, K), float32 or wider; rows sum to 1; without a gradient.
    """
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        logs = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)) / temperature
        for _ in range(iterations):
            totals = logs.logsumexp(0, keepdim=True)
            logs = (logs - (totals if gather is None else gather(totals).logsumexp(0, keepdim=True))).log_softmax(1)
        return logs.softmax(1)


def enqueue(queue: Tensor, rows: Tensor) -> Tensor:
    """A queue of the same length with new rows in front; the oldest fall off its end.

    Args:
        queue: (L, ...).
        rows: (n, ...); of more than L the first L are taken.

    Returns:
        (L, ...).
    """
    return torch.cat([rows.to(queue.dtype), queue])[: len(queue)]


# ---- cross-entropies of crops ----------------------------------------------------------------------------------------------------------


def image_cross_entropy(
    teacher: Tensor, teacher_positive: Tensor, student: Tensor, student_positive: Tensor, temperature: float = 0.2
) -> Tensor:
    """Mean cross-entropy between an image's and its positive image's crops, all pairs of crops, both ways.

    Args:
        teacher: (B, G, K) assignments of the image's crops, rows sum to 1.
        teacher_positive: (B, G, K) of the positive image's.
        student: (B, G, K) scores of the image's crops, which shall tell the positive image's assignments.
        student_positive: (B, G, K) of the positive image's, which shall tell the image's.
        temperature: Of the scores.

    Returns:
        Scalar, float32 or wider.
    """
    with torch.autocast(student.device.type, enabled=False):
        targets = torch.cat([teacher_positive, teacher])
        scores = torch.cat([student, student_positive])
        logs = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature).log_softmax(-1)
        return -torch.einsum("bgk,bvk->bgv", targets.to(logs.dtype), logs).mean()


def crop_cross_entropy(assignments: Tensor, scores: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy between each of the first crops' assignments and all other crops' scores.

    Args:
        assignments: (B, G, K) of the teacher's G crops, rows sum to 1.
        scores: (B, V, K) of the student's V >= G crops, of which the first G are the same as the teacher's.
        temperature: Of the scores.

    Returns:
        Scalar: mean over the G (V - 1) pairs of different crops, float32 or wider.
    """
    with torch.autocast(scores.device.type, enabled=False):
        logs = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature).log_softmax(-1)
        pairs = -torch.einsum("bgk,bvk->gv", assignments.to(logs.dtype), logs) / max(len(scores), 1)
        given, crops = pairs.shape
        return torch.where(torch.eye(given, crops, dtype=torch.bool, device=pairs.device), 0.0, pairs).sum() / (given * max(crops - 1, 1))


def aligned_cross_entropy(
    assignments: Tensor,
    scores: Tensor,
    local_scores: Tensor,
    masks: Tensor,
    boxes: Tensor,
    temperature: float = 0.1,
    size: int = 6,
    mean_count: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy between assignments of patches in one crop and the student's scores at the same places in another one.

    Both are averaged onto a grid over the overlap of the two crops (RoI align). Places count where the mask is 1 all around.

    Args:
        assignments: (B, G, K, h, w) of the teacher's crops.
        scores: (B, G, K, h, w) of the student's, for the same crops.
        local_scores: (B, L, K, h', w') of further crops of the student; L may be 0.
        masks: (B, G, h, w) 1 where a patch counts.
        boxes: (B, G, G + L, 2, 4) the overlap of crop g and crop v, in patches (x0, y0, x1, y1), first as g sees it and then as v does.
        temperature: Of the scores.
        size: Side of the grid over the overlap.
        mean_count: Number of places of a process -> their mean over the processes, for (G, G + L - 1) pairs; None: one process.

    Returns:
        Scalar: mean over the pairs of different crops, float32 or wider.
    """
    from torchvision.ops import roi_align

    batch_size, given = assignments.shape[:2]
    crops = given + local_scores.shape[1]
    with torch.autocast(scores.device.type, enabled=False):
        wide = torch.promote_types(scores.dtype, torch.float32)
        assignments, scores, local_scores, masks, boxes = (x.to(wide) for x in (assignments, scores, local_scores, masks, boxes))

        def aligned(maps: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
            rois = torch.cat([numbers.expand(places.shape[:-1]).reshape(-1, 1).to(wide), places.reshape(-1, 4)], dim=1)
            return roi_align(maps.flatten(0, 1), rois, size, aligned=True).unflatten(0, places.shape[:-1])

        image = torch.arange(batch_size, device=scores.device)[:, None, None]
        crop = torch.arange(given, device=scores.device)
        number = image * given + crop[:, None]  # (B, G, 1) of the crop with the assignments
        targets = aligned(assignments, number, boxes[:, :, :, 0])  # (B, G, V, K, size, size)
        keep = aligned(masks[:, :, None], number, boxes[:, :, :, 0])[:, :, :, 0] >= 1 - 1e-4
        told = aligned(scores, image * given + crop, boxes[:, :, :given, 1])
        if crops > given:
            local = torch.arange(crops - given, device=scores.device)
            told = torch.cat([told, aligned(local_scores, image * (crops - given) + local, boxes[:, :, given:, 1])], dim=2)
        entropies = -(targets * (told / temperature).log_softmax(3)).sum(3)  # (B, G, V, size, size)
        keep = (keep & ~torch.eye(given, crops, dtype=torch.bool, device=keep.device)[:, :, None, None]).to(wide)
        counts = keep.sum((0, 3, 4))
        counts = counts.clamp(min=1) if mean_count is None else mean_count(counts)
        return ((entropies * keep).sum((0, 3, 4)) / counts).sum() / (given * max(crops - 1, 1))


# ---- the object-aware filter -----------------------------------------------------------------------------------------------------------


def _heads(linear: nn.Module, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values: three of (..., heads, width of a head)."""
    return linear(x).unflatten(-1, (3, heads, -1)).unbind(-3)


def cls_attention(tokens: Tensor, block: nn.Module) -> Tensor:
    """How much a block's class token attends to each patch: (B, 1 + N, d) -> (B, heads, N), softmax over all 1 + N tokens."""
    attention: Any = block.attn
    query, key, _ = _heads(attention.qkv, block.norm1(tokens), attention.num_heads)  # type: ignore[operator]
    query, key = attention.q_norm(query[:, 0]), attention.k_norm(key)
    return (torch.einsum("bhd,bnhd->bhn", query, key) * attention.scale).softmax(-1)[..., 1:]


def object_filter(
    tokens: Tensor,
    prototypes: Tensor,
    block: nn.Module,
    norm_prototypes: nn.Module,
    norm_patches: nn.Module,
    norm_cls: nn.Module,
    grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """A block of a vision transformer, then attention of its tokens to object prototypes by the weights of the same block.

    A patch asks with its 3 x 3 neighbourhood (zeros outside): the logit of prototype m is the sum over the places of the neighbourhood of
    query times key, times M^-0.5 (not the head's width^-0.5), and its value is the mean over its places. The class token asks means of
    keys. Both then go through the block's MLP. What comes out is LN([block's token, filtered token]).

    Args:
        tokens: (B, 1 + N, d), the class token first.
        prototypes: (M, d, k, k), k odd.
        block: A timm ``Block``.
        norm_prototypes: Norm of the prototypes over d.
        norm_patches: Norm over 2 d of the patches' result.
        norm_cls: The same for the class token.
        grid: Rows and columns, N = rows * columns; None: a square.

    Returns:
        (B, 1 + N, 2 d) tokens; (B, heads, N, M) attention of the patches to the prototypes.

    Raises:
        ValueError: N patches don't fill the grid.
    """
    patches = tokens.shape[1] - 1
    rows, columns = grid if grid is not None else (round(patches**0.5),) * 2
    if rows * columns != patches:
        raise ValueError(f"{patches} patches don't fill a grid of {rows} x {columns}: give grid=(rows, columns)")
    parts: Any = block
    tokens = parts(tokens)
    attention, heads, scale = parts.attn, parts.attn.num_heads, len(prototypes) ** -0.5
    query = attention.q_norm(_heads(attention.qkv, parts.norm1(tokens), heads)[0])  # (B, 1 + N, heads, e)
    _, key, value = _heads(attention.qkv, norm_prototypes(prototypes.permute(0, 2, 3, 1)), heads)  # (M, k, k, heads, e)
    key, value = attention.k_norm(key), value.mean((1, 2))
    maps = query[:, 1:].permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (rows, columns))
    kernels = key.permute(3, 0, 4, 1, 2).flatten(0, 1).to(maps.dtype)  # (heads * M, e, k, k)
    logits = F.conv2d(maps, kernels, padding=prototypes.shape[-1] // 2, groups=heads).unflatten(1, (heads, -1)).flatten(3)
    shares = (scale * logits).softmax(2)  # (B, heads, M, N)
    cls_logits = torch.einsum("bhe,mhe->bhm", query[:, 0], key.mean((1, 2)))
    cls_shares = (scale * cls_logits).softmax(-1)
    shares_of_all = torch.cat([cls_shares[..., None], shares], dim=-1)
    answer = torch.einsum("bhmn,mhe->bnhe", shares_of_all, value.to(shares_of_all.dtype)).flatten(2)
    filtered = tokens + parts.drop_path1(parts.ls1(attention.proj_drop(attention.proj(answer))))
    filtered = filtered + parts.drop_path2(parts.ls2(parts.mlp(parts.norm2(filtered))))
    both = torch.cat([tokens, filtered], dim=-1)
    return torch.cat([norm_cls(both[:, :1]), norm_patches(both[:, 1:])], dim=1), shares.transpose(2, 3)


def foreground(attention: Tensor, mass: float = 0.6, sigma: float = 0.6) -> Tensor:
    """Patches that hold most of the class token's attention.

    Args:
        attention: (B, heads, h, w) of the class token to the patches.
        mass: Share of the attention, blurred and averaged over the heads, that the kept patches hold at least.
        sigma: Of the Gaussian blur over 7 x 7 patches (fewer on smaller grids), in patches.

    Returns:
        (B, h, w) float32, 1 or 0.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    side = min(7, 2 * min(attention.shape[-2:]) - 1)
    blurred = gaussian_blur(attention.float().mean(1, keepdim=True), [side, side], [sigma, sigma]).flatten(1)
    shares, order = (blurred / blurred.sum(1, keepdim=True)).sort(1, descending=True)
    kept = (shares.cumsum(1) - shares < mass).float()
    return torch.zeros_like(kept).scatter(1, order, kept).unflatten(1, attention.shape[-2:])


def prototype_entropy(prototypes: Tensor, samples: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean entropy of the prototypes' choice among samples, by cosine: small where each prototype stands for few samples.

    Args:
        prototypes: (M, ...).
        samples: (N, ...) of the same trailing shape.
        temperature: Of the cosines.

    Returns:
        Scalar in nats, float32 or wider.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        wide = torch.promote_types(prototypes.dtype, torch.float32)
        unit, bank = (F.normalize(part.to(wide).flatten(1), dim=1) for part in (prototypes, samples))
        logs = (unit @ bank.T / temperature).log_softmax(1)
        return -(logs.exp() * logs).sum(1).mean()


def spherical_kmeans(samples: Tensor, centres: int, generator: torch.Generator, iterations: int = 3000) -> Tensor:
    """Centres of samples on the sphere; it ends where no sample changes its centre.

    Args:
        samples: (N, ...), N >= 1.
        centres: M. With M > N some samples are centres more than once.
        generator: Of the samples that are first centres, and of those that take the place of a centre without samples; on the CPU.
        iterations: Most rounds.

    Returns:
        (M, ...) whose flattened rows have norm 1, float32 or wider.
    """
    unit = F.normalize(samples.to(torch.promote_types(samples.dtype, torch.float32)).flatten(1), dim=1)
    number = len(unit)

    def drawn() -> Tensor:
        order = torch.randperm(number, generator=generator).to(unit.device)
        return unit[order[torch.arange(centres, device=unit.device) % number]]

    found, chosen = drawn(), torch.full((number,), -1, device=unit.device)
    for _ in range(iterations):
        nearest = (unit @ found.T).argmax(1)
        if torch.equal(nearest, chosen):  # waits for the device; this runs once in a training
            break
        chosen = nearest
        sums = torch.zeros_like(found).index_add_(0, chosen, unit)
        used = torch.bincount(chosen, minlength=centres) > 0
        found = F.normalize(torch.where(used[:, None], sums, drawn()), dim=1)
    return found.unflatten(1, samples.shape[1:])


__all__ = [
    "ContinuousAP", "aligned_cross_entropy", "cls_attention", "continuous_ap_loss", "crop_cross_entropy", "enqueue", "foreground",
    "image_cross_entropy", "object_filter", "other_images", "pooled_rows", "prototype_entropy", "similarity_list", "sinkhorn",
    "spherical_kmeans", "strongest_patches",
]  # fmt: skip
