"""EAGLE: one decoder layer that drafts autoregressively in feature space (EAGLE-1, arXiv 2401.15077)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psnb.drafters.base import Choose, Drafter, Layers, Mask, gather
from psnb.profile import DrafterSpec
from psnb.target import Target
from psnb.tree import Plan, Shape, Tree, ancestry


class Eagle(Drafter):
    """Row (0, t): fc[emb(x_{t+1}); f_t] -> an estimate of f_{t+1}, which `lm_head` turns into x_{t+2}'s distribution.

    Slot i >= 1 feeds the estimate and the drafted token back: k passes for k tokens.
    """

    one_pass = False
    glue = ("last", "fuse", "branch", "prune")

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        self.fc = nn.Linear(2 * target.hidden_size, target.hidden_size, bias=False)
        nn.init.normal_(self.fc.weight, std=0.02)
        self.body = Layers(spec.layers, target)

    def fuse(self, features: Tensor, next_ids: Tensor) -> Tensor:
        """features [B, m, H], next_ids [B, m] -> the real rows' inputs [B, m, H]."""
        return self.fc(torch.cat([self.target.embed(next_ids), features], -1))

    def rows(
        self, features: Tensor, next_ids: Tensor, depth: Tensor, anchor: Tensor, place: Tensor, mask: Mask
    ) -> Tensor:
        return self.body(self.fuse(features, next_ids), place, mask)

    def prefill(self, features: Tensor, next_ids: Tensor, cache: Any) -> None:
        self.body.extend(self.fuse(features, next_ids), cache)

    def draft(
        self, features: Tensor, next_ids: Tensor, plan: Plan, choose: Choose, cache: Any, valid: Tensor | None = None
    ) -> Tree:
        """k passes, each over the nodes that the level above left to be expanded (one, in a chain)."""
        real = cache.length + (features.shape[1] if valid is None else valid)
        hidden = self.last(self.body.extend(self.fuse(features, next_ids), cache), valid)
        cache.crop(real)
        grow = self._grow if plan.kind == "dynamic" else self._fill
        made = grow(hidden[0] if valid is None else hidden, plan, choose, cache)
        cache.crop(real)
        return made

    def _fill(self, hidden: Tensor, plan: Plan, choose: Choose, cache: Any) -> Tree:
        """A chain or a static tree, from the last real row [1, H], or from those of B sequences [B, 1, H]."""
        tokens, draws, drawn, before = [], [], [], 0
        seen = None if plan.kind == "chain" else torch.zeros(1, 0, dtype=torch.bool, device=hidden.device)
        for level, (of, rank, keep) in enumerate(plan.levels, start=1):
            found = choose(self.logits(hidden, level - 1), slice(level - 1, level))
            tokens.append(found.tokens[..., of, rank])
            draws.append(of + before)
            drawn.append(found.q)
            before += found.tokens.shape[-2]
            if level < plan.k:
                fed = tokens[-1]
                if seen is not None:
                    fed, of = fed[..., keep], of[keep]
                    seen = torch.cat([seen[of], torch.eye(len(keep), dtype=torch.bool, device=seen.device)], 1)
                    hidden = hidden[..., of, :]
                hidden = _level(self, hidden, fed, cache, seen, level - 1)
        q = None if drawn[0] is None else torch.cat(drawn, -2)
        return Tree(torch.cat(tokens, -1), plan.shape, q, torch.cat(draws))

    def _grow(self, hidden: Tensor, plan: Plan, choose: Choose, cache: Any) -> Tree:
        """EAGLE-2's dynamic tree (arXiv 2406.16858): expand the best nodes of each level, keep the best N of all.

        From the last real row [1, H], or from those of B sequences [B, 1, H].
        """
        beam, device, lead = plan.beam, hidden.device, hidden.shape[:-2]
        worth = torch.zeros(1, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        seen = torch.zeros(*lead, 1, 0, dtype=torch.bool, device=device)
        total = beam * (1 + (plan.k - 1) * beam)
        expanded = torch.full((*lead, 1), total, device=device)  # where this level's rows stand among all nodes
        levels, before = [], 0
        for level in range(1, plan.k + 1):
            found = choose(self.logits(hidden, level - 1), slice(level - 1, level))
            tokens, scores = found.tokens[..., :beam], found.scores[..., :beam]
            state = worth, expanded, seen, hidden
            nodes, (worth, expanded, seen, hidden), fed = self.branch(tokens, scores, *state, before, level < plan.k)
            levels.append(nodes)
            if level < plan.k:
                hidden = _level(self, hidden, fed, cache, seen, level - 1)
            before += tokens.shape[-2] * beam
        return self.prune(levels, plan.nodes, plan.k)

    @staticmethod
    def branch(
        tokens: Tensor,
        scores: Tensor,
        worth: Tensor,
        expanded: Tensor,
        seen: Tensor,
        hidden: Tensor,
        before: int,
        more: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The `beam` children of each of a level's rows, and the best of them, which are the next level's rows.

        tokens, scores [(B,) r, beam]; of the rows: worth of their paths [(B,) r], numbers among all nodes `expanded`,
        what they see of the levels `seen` [(B,) r, s], hidden [(B,) r, H]; before: nodes of former levels.
        Returns the children's tokens, path scores and parents' numbers [(B,) r * beam]; the same four of the best
        `beam` of them; and these ones' tokens. Unless `more` are to come, the last two are not of use.
        """
        rows, beam = tokens.shape[-2:]
        row = torch.arange(rows, device=tokens.device).repeat_interleave(beam)
        path, tokens = (worth[..., None] + scores).flatten(-2), tokens.flatten(-2)
        nodes = tokens, path, expanded[..., row]
        if not more:
            return nodes, (worth, expanded, seen, hidden), tokens
        best = path.argsort(descending=True, stable=True)[..., :beam]
        of = row[best]
        itself = torch.eye(beam, dtype=torch.bool, device=tokens.device).expand(*of.shape[:-1], -1, -1)
        state = path.gather(-1, best), best + before, torch.cat([_rows(seen, of), itself], -1), _rows(hidden, of)
        return nodes, state, tokens.gather(-1, best)

    @staticmethod
    def prune(levels: list[tuple[Tensor, Tensor, Tensor]], count: int, k: int) -> Tree:
        """The tree of the best `count` nodes of all levels, each given as `branch` gives it."""
        tokens, scores, parents = (torch.cat(parts, -1) for parts in zip(*levels, strict=True))
        device, total = tokens.device, tokens.shape[-1]
        beam = levels[0][0].shape[-1]
        number = torch.arange(total, device=device)
        depth, rank = 1 + (number + beam * (beam - 1)) // beam**2, number % beam  # beam of level 1, then beam^2 each
        order = scores.argsort(descending=True, stable=True)[..., :count]
        numbers = torch.arange(1, count + 1, device=device).expand_as(order)
        row = torch.zeros(*order.shape[:-1], total + 1, dtype=torch.long, device=device).scatter_(-1, order, numbers)
        parent = row.gather(-1, parents.gather(-1, order))  # the last row: the root's, 0
        shape = Shape(parent, depth[order], rank[order], ancestry(parent, k))
        return Tree(tokens.gather(-1, order), shape, None, parent)


def _level(of: Eagle, hidden: Tensor, fed: Tensor, cache: Any, seen: Tensor | None, ahead: int) -> Tensor:
    """One pass over the nodes of a level: hidden of their parents [(B,) r, H], tokens [(B,) r] -> [(B,) r, H]."""
    if hidden.ndim == 2:
        return of.body.extend(of.fuse(hidden[None], fed[None]), cache, seen, ahead)[0]
    return of.body.extend(of.fuse(hidden, fed), cache, seen, ahead)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """x [(B,) r, H], at [(B,) n] -> [(B,) n, H]."""
    return x[at] if at.ndim == 1 else gather(x, at)
