"""The group layout of group-wise training: rows, positions, attention mask, conditional drop (DESIGN section 2).

Every anchor t of a sequence carries masks d = 1..M. Rows are (depth d, anchor t), depth-major; d = 0 is the real row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions(document: Tensor) -> Tensor:
    """Position of each token within its own document: document [..., n] -> [..., n].

    Documents are numbered runs: `[0, 0, 0, 1, 1, -1]` -> `[0, 1, 2, 0, 1, 0]` (-1 is padding).
    """
    n = document.shape[-1]
    index = torch.arange(n, device=document.device).expand_as(document)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[..., 1:] = document[..., 1:] != document[..., :-1]
    return index - torch.where(starts, index, 0).cummax(-1).values


def causal_mask(document: Tensor) -> Tensor:
    """Causal attention inside each document: document [B, n] -> bool [B, 1, n, n], True = may attend.

    Padding (-1) sees padding only, so no row is without a key.
    """
    n = document.shape[-1]
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(n, n, dtype=torch.bool, device=document.device).tril())[:, None]


def layout(n: int, masks: int) -> tuple[Tensor, Tensor]:
    """All rows of n anchors with `masks` masks each: (depth, anchor), each [n * (masks + 1)], depth-major.

    n = 2, masks = 1: depth [0, 0, 1, 1], anchor [0, 1, 0, 1].
    """
    depth = torch.arange(masks + 1).repeat_interleave(n)
    return depth, torch.arange(n).repeat(masks + 1)


def drop(n: int, masks: int, keep: float, keep_min: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The rows that conditional drop keeps (COD: PARD, P-EAGLE): (depth, anchor), depth-major, anchors sorted.

    Depth d keeps max(keep^d, keep_min) of the n anchors, drawn from those that depth d - 1 kept, so that the chain
    (1, t) .. (d, t) of a kept row is complete. Depth 0 is kept whole. keep = 1 is `layout`.
    """
    kept = torch.arange(n)
    depths, anchors = [torch.zeros(n, dtype=torch.long)], [kept]
    for d in range(1, masks + 1):
        count = min(len(kept), max(1, round(max(keep**d, keep_min) * n)))
        kept = kept[torch.randperm(len(kept), generator=generator)[:count]].sort().values
        depths.append(torch.full((count,), d))
        anchors.append(kept)
    return torch.cat(depths), torch.cat(anchors)


def mask(depth: Tensor, anchor: Tensor, document: Tensor) -> Tensor:
    """The group mask: depth, anchor [R], document [B, n] -> bool [B, 1, R, R], True = may attend.

    Row (d, t) sees row (0, s) for s <= t of its document, and row (j, t) for 1 <= j <= d; nothing of another group.
    n = 3, one mask: rows and columns (0,0) (0,1) (0,2) | (1,0) (1,1) (1,2):

        (0,0)  1 0 0 | 0 0 0        (1,0)  1 0 0 | 1 0 0
        (0,1)  1 1 0 | 0 0 0        (1,1)  1 1 0 | 0 1 0
        (0,2)  1 1 1 | 0 0 0        (1,2)  1 1 1 | 0 0 1

    Source: ParallelSpec, group-wise training; DESIGN section 2.
    """
    context = (depth[None, :] == 0) & (anchor[None, :] <= anchor[:, None])
    own = (depth[None, :] >= 1) & (anchor[None, :] == anchor[:, None]) & (depth[None, :] <= depth[:, None])
    of = document[:, anchor]
    return ((context | own) & (of[:, :, None] == of[:, None, :]))[:, None]
