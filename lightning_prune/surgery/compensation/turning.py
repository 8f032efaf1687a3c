"""Turning: queries and keys are mixed so that the channels that are kept tell most of their products."""

from collections import defaultdict

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.heads import Head, HeadMoments
from lightning_prune.surgery.compensation.work import Turn, Work
from lightning_prune.surgery.compensation_report import LayerError

__all__ = ["mixes", "turn"]

_RANK = 1e-11  # of the greatest variance: directions with less are those of rounding
_PLENTY = 16  # samples for each channel, from which on they are not few
_RIDGE = 1e-3  # of the mean variance, where they are
_COMPUTED = "something is computed with its outputs before they are multiplied as queries and keys"
_ELSEWHERE = "more is computed with its outputs than a softmax of products of queries and keys"


@torch.no_grad()
def turn(work: Work, seen: HeadMoments) -> None:
    """Give the kept queries and keys of each head the values with which their products are nearest to those before.

    Args:
        work: What the compensation works with.
        seen: The heads of the network before the prune.
    """
    narrower = seen.heads(lambda head: _narrowed(work, head) is not None)
    used_once = seen.found.used_once(narrower)
    errors: dict[str, list[Tensor]] = defaultdict(list)
    for head in narrower:
        kept = _narrowed(work, head)
        total = head.of_queries.sum() + head.of_keys.sum()
        if kept is None or not bool(total.isfinite()):
            continue
        if head in used_once:
            name = head.rows[0].weight
            errors[name].append(_turn_head(work, head, kept))
            continue
        for one in head.rows:
            work.report.not_compensated[one.weight] = _ELSEWHERE
    for name, of_heads in errors.items():
        total = torch.stack(of_heads).sum(0)
        tiny = torch.finfo(torch.float64).tiny
        whole = total[2].clamp_min(tiny)
        shares = total / whole
        before, after, _ = shares.tolist()
        work.report.scores[name] = LayerError(before, after)
    for reason, widths in ((_ELSEWHERE, seen.found.other), (_COMPUTED, seen.found.unknown)):
        for name, width in widths.items():
            if _loses_width(work, name, width):
                work.report.not_compensated[name] = reason


def _narrowed(work: Work, head: Head) -> Tensor | None:
    """Return which of the channels of a head are kept: (width,) bool; None if it is kept whole or pruned whole."""
    kept = [work.is_kept(one.weight, one.rows) for one in head.rows]
    first = kept[0]
    for one in kept:
        if not torch.equal(one, first):
            return None
    is_narrower = bool(first.any()) and not bool(first.all())
    return first if is_narrower else None


def _loses_width(work: Work, name: str, width: int) -> bool:
    """Tell whether rows of a weight are pruned otherwise than by heads of a width."""
    kept = work.kept.get(name, {}).get(0)
    if kept is None:
        return False
    head = kept.div(width, rounding_mode="floor")
    _, counts = head.unique(return_counts=True)
    return bool((counts < width).any())


def _turn_head(work: Work, head: Head, kept: Tensor) -> Tensor:
    """Turn the queries and keys of one head.

    Args:
        work: What the compensation works with.
        head: The head.
        kept: (width,) bool, which of its channels are kept.

    Returns:
        (3,) squared errors of the scores: as they were, turned, and without any.
    """
    of_queries = _regular(head.of_queries, head.count)
    of_keys = _regular(head.of_keys, head.count)
    query_mix, key_mix = mixes(of_queries, of_keys, kept)
    for one in head.rows:
        mix = key_mix if one is head.keys else query_mix
        rows = torch.tensor(one.rows, device=kept.device)
        for name, shift in ((one.weight, 0), (one.bias, one.shift)):
            if name:
                turned = rows + shift
                along = work.kept_along(name, 0)
                places = torch.searchsorted(along, turned[kept])
                work.turn(name, Turn(turned, places, mix))
    every = torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    plain = every[:, kept]
    as_it_was = plain @ plain.T
    turned_scores = query_mix @ key_mix.T
    return torch.stack(
        [
            _error(head, as_it_was - every),
            _error(head, turned_scores - every),
            _error(head, every),
        ]
    )


def _error(head: Head, missing: Tensor) -> Tensor:
    """Return the sum of squared products of queries and keys, with a matrix between them."""
    of_queries = missing.T @ head.of_queries @ missing
    return (of_queries * head.of_keys).sum()


def _regular(moments: Tensor, count: int) -> Tensor:
    """Return moments that few samples do not tell too much by."""
    regular = moments.clone()
    if count < _PLENTY * len(moments):
        mean = moments.diagonal().mean()
        regular.diagonal().add_(_RIDGE * mean)
    return regular


def mixes(of_queries: Tensor, of_keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return how the kept queries and keys are to be mixed of all of a head.

    Of all products of as few channels, these are nearest to those of all channels, if which queries there are does not
    depend on which keys: the first singular vectors of what queries and keys with uncorrelated channels are multiplied
    by. That leaves open how these are mixed with each other; they are brought near to the channels that are kept, so
    that averages of weights, which are turned on their own, stay averages.

    Args:
        of_queries: (width, width) second moments of the queries, float64.
        of_keys: (width, width) second moments of the keys, float64.
        kept: (width,) bool, which channels are kept.

    Returns:
        (width, kept) for queries and for keys.
    """
    query_root, query_inverse = _roots(of_queries)
    key_root, key_inverse = _roots(of_keys)
    left, shares, right = torch.linalg.svd(query_root @ key_root)
    width = int(kept.sum())
    balance = shares[:width].sqrt()
    query_mix = query_inverse @ left[:, :width]
    query_mix = query_mix * balance
    key_mix = key_inverse @ right[:width].T
    key_mix = key_mix * balance
    of_kept = query_mix[kept] + key_mix[kept]
    first, _, second = torch.linalg.svd(of_kept)
    nearest = second.T @ first.T
    return query_mix @ nearest, key_mix @ nearest


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of a symmetric matrix, and the inverse of it where there is one."""
    variances, directions = torch.linalg.eigh(moments)
    is_there = variances > _RANK * variances[-1]
    roots = variances.clamp_min(0).sqrt()
    inverse = torch.where(is_there, 1 / roots, 0)
    roots = torch.where(is_there, roots, 0)
    root = directions * roots
    inverse_root = directions * inverse
    return root @ directions.T, inverse_root @ directions.T
