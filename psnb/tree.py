"""Draft trees: which nodes to draft and how they hang together. Tensors of fixed size, no model inside.

Rows of a verification pass: row 0 is the root (the last known token), row i + 1 is node i. A parent stands before its
children, and siblings stand in the order in which they are tried. `parent` holds rows, `depth` counts from 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psnb.errors import UserError
from psnb.profile import nearest

KINDS = ("chain", "static", "best_first", "dynamic")
FEW = 4096  # to be put in order by counting
REACH = 32  # nodes of a tree whose contenders are enough for one of twice the size
# Rank paths in the order in which Medusa's calibration added them (mc_sim_7b_63 of FasterDecoding/Medusa): the first N
# are its tree of N nodes.
MEDUSA = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)
# EAGLE-1's 25 nodes (SafeAILab/EAGLE, choices.py).
EAGLE = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"


class Candidates(NamedTuple):
    """What r rows of the drafter propose, W tokens each."""

    tokens: Tensor  # [r, W], in the order in which they are tried
    scores: Tensor  # [r, W], descending: log of what a token is worth to the verifier; with `pairs` these tell it
    q: Tensor | None  # [r, V]: the distribution that the tokens were drawn from without replacement; None: not drawn
    pairs: Tensor | None = None  # [r, W, W]: scores after each candidate of the row before; None: whichever that was


class Shape(NamedTuple):
    """A tree without its tokens: N nodes. In a batch of trees a leading B stands before what differs among them."""

    parent: Tensor  # [N] row of the parent
    depth: Tensor  # [N] 1, 2, ...
    rank: Tensor  # [N] which candidate of its parent's row (or slot) a node is; with `pairs` of a fixed shape, by them
    mask: Tensor  # bool [N + 1, N + 1]: a row sees itself and its ancestors


class Tree(NamedTuple):
    """A draft: N nodes with their tokens."""

    tokens: Tensor  # [N]
    shape: Shape
    q: Tensor | None  # [Q, V], see Candidates
    draw: Tensor  # [N] the row of q that a node was drawn from


def ancestry(parent: Tensor, depth: int) -> Tensor:
    """parent [..., N] -> bool [..., N + 1, N + 1], True where a row sees a row: itself and its ancestors.

    depth: of the deepest node.

    parent [0, 0, 1] (two children of the root, one of the first):

        root  1 0 0 0
        0     1 1 0 0
        1     1 0 1 0
        2     1 1 0 1
    """
    rows = parent.shape[-1] + 1
    sees = torch.eye(rows, device=parent.device)
    if parent.ndim > 1:
        sees = sees.repeat(*parent.shape[:-1], 1, 1)
    sees[..., 1:, :].scatter_(-1, parent[..., None], 1.0)
    for _ in range((depth - 1).bit_length()):  # squares: 1, 2, 4, ... steps up
        sees = (sees @ sees).clamp_(max=1.0)
    return sees > 0


def paths(kind: str, k: int, nodes: int) -> list[tuple[int, ...]]:
    """Rank paths of a tree whose shape is known beforehand: a chain of k, or a published static tree.

    `static` with 25 nodes is EAGLE-1's tree, with N <= 63 nodes the first N of Medusa's; 64 adds the path 00000.
    Raises `UserError` for sizes that are not there, and for trees deeper than k.
    """
    if kind == "chain":
        return [(0,) * (d + 1) for d in range(k)]
    words = EAGLE.split() if nodes == 25 else [*MEDUSA.split(), "00000"][:nodes]
    if not 1 <= nodes <= 64:
        raise UserError(f"a static tree has 1 to 64 nodes, not {nodes}: choose nodes in that range")
    deepest = max(map(len, words))
    if deepest > k:
        raise UserError(f"the static tree of {nodes} nodes is {deepest} deep, the draft {k}: raise k or lower nodes")
    return [tuple(map(int, word)) for word in words]


def fixed(ranks: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> Shape:
    """The shape with the given rank paths: (0,), (1,), (0, 0) is a root with two children, the first of which has one.

    Nodes stand level by level. Raises `UserError` where a node lacks its parent or an earlier sibling.
    """
    order = sorted(set(ranks), key=lambda path: (len(path), path))
    row = {(): 0, **{path: i + 1 for i, path in enumerate(order)}}
    for path in order:
        before = path[:-1] + (path[-1] - 1,)
        if path[:-1] not in row or (path[-1] and before not in row):
            raise UserError(f"tree path {path} lacks its parent or an earlier sibling: add them")
    parent = torch.tensor([row[path[:-1]] for path in order], device=device)
    depth = torch.tensor([len(path) for path in order], device=device)
    rank = torch.tensor([path[-1] for path in order], device=device)
    return Shape(parent, depth, rank, ancestry(parent, max(map(len, order))))


def _contenders(k: int, nodes: int, width: int) -> list[tuple[int, ...]]:
    """Rank paths that can be among the N best, level by level: a parent before its children, siblings in order.

    With candidates in descending order a path is worth no more than any path of smaller or equal ranks, nor than the
    same cut short: sum over l of the product over i <= l of (r_i + 1) paths, itself included. Those with more than N
    are out. k = 2, N = 3: 0 1 2 00 01 (10 is worth no more than 0 1 00, so it is out).
    """
    found, level = [], [((), 1, 0)]
    for _ in range(k):
        grown = []
        for path, product, total in level:
            for rank in range(width):
                if total + product * (rank + 1) > nodes:
                    break
                grown.append(((*path, rank), product * (rank + 1), total + product * (rank + 1)))
        found += [path for path, _, _ in grown]
        level = grown
    return found


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for whoever comes next: a tensor of another kind would be compiled for anew
def _tables(k: int, nodes: int, width: int) -> tuple[Tensor, ...]:
    """Of each contender [S]: its slots' scores' places [S, k], itself and its ancestors [S, k], parent, depth, rank.

    Shorter paths are filled up with a score of 0 and with the root, which has the number S. Made once for all drafts.
    """
    found = _contenders(k, nodes, width)
    number, root = {path: i for i, path in enumerate(found)}, len(found)
    slots, seen = torch.full((root, k), k * width), torch.full((root, k), root)
    for i, path in enumerate(found):
        slots[i, : len(path)] = torch.tensor([slot * width + rank for slot, rank in enumerate(path)])
        seen[i, : len(path)] = torch.tensor([number[path[: d + 1]] for d in range(len(path))])
    above = torch.tensor([number.get(path[:-1], root) for path in found])
    return slots, seen, above, torch.tensor([len(path) for path in found]), torch.tensor([path[-1] for path in found])


def ranked(x: Tensor, count: int, by_counting: bool | None = None) -> tuple[Tensor, Tensor]:
    """x [..., n] -> which are its `count` largest [..., count], in descending order, and the place of each [..., n].

    Of equals the first stands before the others. x 1 3 2: largest 1 2 0, places 2 0 1.
    by_counting (None: few on a GPU): n^2 comparisons tell how many stand before each, count * n who has so many before
    it. That is two kernels, where a sort is several longer ones.
    """
    number = torch.arange(x.shape[-1], device=x.device)
    if x.is_cuda and len(number) <= FEW if by_counting is None else by_counting:
        one, other = x[..., :, None], x[..., None, :]
        place = ((other > one) | (other == one) & (number < number[:, None])).sum(-1, dtype=torch.int32).long()
        return torch.where(place[..., None, :] == number[:count, None], number, 0).sum(-1), place
    order = x.argsort(descending=True, stable=True)
    return order[..., :count], torch.empty_like(order).scatter_(-1, order, number.expand_as(order))


def _linked(pairs: Tensor, ranks: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
    """Paths along candidates that are ranked anew after each of the slot before: pairs [..., k, W, W], ranks [S, k].

    Which candidate stands at each slot of a path, and its score: [..., S, k]. k = 2, W = 2, pairs of slot 1 [-1 -2]
    after candidate 0 and [-4 -3] after 1: path 0 0 ends with candidate 0 if 0 is slot 0's best, with 1 if 1 is.
    first: no path has a rank but 0.
    """
    order = pairs.argmax(-1, keepdim=True) if first else ranked(pairs, pairs.shape[-1])[0]
    width, values, order = order.shape[-1], pairs.gather(-1, order).flatten(-2), order.flatten(-2)
    row, places, scores = torch.zeros_like(ranks[:, 0]).expand(*pairs.shape[:-3], -1), [], []
    for slot, rank in enumerate(ranks.T):
        at = row * width + rank
        row = order[..., slot, :].gather(-1, at)
        places.append(row)
        scores.append(values[..., slot, :].gather(-1, at))
    return torch.stack(places, -1), torch.stack(scores, -1)


class BestFirst:
    """The best tree of N nodes from k slots that do not depend on each other: known after one pass of the drafter.

    A node is worth the product of its path's slot scores; no tree of N nodes holds more in sum. All paths that may be
    among the N best are known beforehand (`_contenders`), so few operations find them. Among equals the earlier
    contender wins: parents stand before children, and siblings in order.

    linked: for `pairs`, with which the contenders are not all that may be among the N best in any case. Of a large tree
    those of one of half the size (but `REACH`) do as well, and are a quarter as many: on code, 6 x 63, 40 prompts, the
    drafters of profile `embedded`, 4.19 and 3.58 tokens per step at T = 0 and 0.7 for 4.18 and 3.58; 8 x 32 3.98 and
    3.26 for 3.99 and 3.25, but 5 x 8 3.13 and 2.66 for 3.36 and 2.73.
    """

    def __init__(
        self, k: int, nodes: int, width: int, device: torch.device | str = "cpu", linked: bool = False
    ) -> None:
        self.k, self.nodes = k, nodes
        tables = _tables(k, max(nodes // 2, min(REACH, nodes)) if linked else nodes, width)
        if linked and len(tables[0]) < nodes:
            tables = _tables(k, nodes, width)
        if (count := len(tables[0])) < nodes:
            raise UserError(f"a tree of {nodes} nodes needs a larger k or vocabulary: {count} nodes there are")
        self.slots, self.seen, self.above, self.depth, self.rank = (table.to(device) for table in tables)
        self.ranks, self.there = self.slots % width, self.slots < k * width  # along the path of a contender
        self.rows = torch.arange(nodes + 1, device=device)

    def __call__(self, scores: Tensor, pairs: Tensor | None = None) -> Shape:
        """scores [..., k, W] of the slots' candidates, at most 0, descending -> the shape of the N best nodes.

        With `pairs` [..., k, W, W] these count instead. Children are then ranked by what they are worth after their
        parent, so that a contender may be worth more than one of smaller ranks: the N best of the contenders are taken.
        What rounding brought above 0 is cut, or a child could stand before its parent.
        """
        lead, nodes = scores.shape[:-2], self.nodes
        if pairs is None:
            place, worth = None, F.pad(scores.clamp(max=0).flatten(-2), (0, 1))[..., self.slots].sum(-1)
        else:
            place, worth = _linked(pairs, self.ranks)
            worth = torch.where(self.there, worth.clamp(max=0), 0).sum(-1)
        chosen, order = ranked(worth, nodes)
        row = F.pad(torch.where(order < nodes, order + 1, 0), (0, 1))  # the last: the root's, 0
        seen = row.gather(-1, self.seen[chosen].flatten(-2)).unflatten(-1, (nodes, -1))
        root = (self.rows == 0).expand(*lead, 1, -1)
        mask = torch.cat([root, (seen[..., None] == self.rows).any(-2) | root], -2)
        depth, rank = self.depth[chosen], self.rank[chosen]
        if place is not None:
            last = (depth - 1)[..., None]
            rank = place.gather(-2, chosen[..., None].expand(*chosen.shape, self.k)).gather(-1, last)[..., 0]
        return Shape(row.gather(-1, self.above[chosen]), depth, rank, mask)


def most(k: int, beam: int = 8) -> int:
    """Nodes of a dynamic tree of k levels, at most: `beam` below the root, then `beam` each of as many."""
    return beam * (1 + (k - 1) * beam)


class Plan:
    """How a draft is laid out, made once a generation: `plan(candidates)` builds the tree of a one-pass drafter.

    `chain`: k nodes in a row. `static`: published rank paths. `best_first`: the N best nodes of k slots. `dynamic`:
    what an autoregressive drafter grows, EAGLE-2's way: at each of k levels the `beam` best nodes are expanded by
    their `beam` best tokens, and the N best of all stay. width: candidates of a linked slot, at least (0: no links).
    """

    def __init__(
        self,
        kind: str,
        k: int,
        nodes: int,
        vocab: int,
        beam: int = 8,
        device: torch.device | str = "cpu",
        width: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"unknown tree {kind!r}; {nearest(kind, KINDS)}")
        if kind != "chain" and nodes < 1:
            raise UserError(f"a {kind} tree needs its number of nodes: set nodes to 1 or more")
        self.kind, self.k = kind, k
        self.beam = min(beam, vocab)
        self.shape: Shape | None = None
        if kind in ("chain", "static"):
            ranks = paths(kind, k, nodes)
            self.shape = fixed(ranks, device)
            self.nodes, self.siblings = len(self.shape.rank), int(self.shape.rank.max()) + 1
            self.width, self.k = max(self.siblings, min(width, vocab)), int(self.shape.depth.max())
            full = [[*path, *[0] * (self.k - len(path))] for path in sorted(ranks, key=lambda path: (len(path), path))]
            self.ranks = torch.tensor(full, device=device)  # along the path of a node
        elif kind == "best_first":
            self.nodes, self.width = nodes, min(max(width, nodes), vocab)
            self.siblings = self.width
            self.builder = BestFirst(k, nodes, self.width, device, linked=width > 0)
        else:
            if nodes > most(k, self.beam):
                raise UserError(
                    f"a dynamic tree of k = {k} has at most {most(k, self.beam)} nodes, not {nodes}: raise k"
                )
            self.nodes, self.width, self.siblings = nodes, self.beam, self.beam
        self.levels = self._levels() if self.shape else []

    def _levels(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By level of a fixed shape: its nodes' parents among the rows expanded above, ranks, and who is expanded."""
        shape, expanded, made = self.shape, [0], []
        rows = torch.arange(1, self.nodes + 1)
        for depth in range(1, self.k + 1):
            here = (shape.depth.cpu() == depth).nonzero()[:, 0]
            of = torch.tensor([expanded.index(p) for p in shape.parent[here].tolist()])
            keep = [i for i, row in enumerate(rows[here].tolist()) if row in shape.parent.tolist()]
            expanded = rows[here][keep].tolist()
            device = shape.rank.device
            made.append((of.to(device), shape.rank[here.to(device)], torch.tensor(keep, dtype=torch.long).to(device)))
        return made

    def __call__(self, candidates: Candidates) -> Tree:
        """The draft of a one-pass drafter: candidates of k slots [..., k, W] -> N nodes."""
        pairs, tokens = candidates.pairs, candidates.tokens
        shape = self.shape or self.builder(candidates.scores, pairs)
        slot, rank = shape.depth - 1, shape.rank
        if self.shape and pairs is not None:
            place = _linked(pairs, self.ranks, self.kind == "chain")[0]
            rank = place.gather(-1, slot[:, None].expand(*place.shape[:-1], 1))[..., 0]
            slot = slot.expand_as(rank)
        if rank.ndim == 1:
            tokens = tokens[..., slot, rank]
        else:
            tokens = tokens.flatten(-2).gather(-1, slot * tokens.shape[-1] + rank)
        return Tree(tokens, shape, candidates.q, shape.depth - 1)
