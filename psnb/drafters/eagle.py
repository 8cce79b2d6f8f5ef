"""EAGLE: one decoder layer that drafts autoregressively in feature space (EAGLE-1, arXiv 2401.15077)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psnb.drafters.base import Choose, Drafter, Layers, Mask, start_norm
from psnb.profile import DrafterSpec
from psnb.target import Target
from psnb.tree import Plan, Shape, Tree, ancestry


class Eagle(Drafter):
    """Row (0, t): fc[emb(x_{t+1}); f_t] -> an estimate of f_{t+1}, which `lm_head` turns into x_{t+2}'s distribution.

    Slot i >= 1 feeds the estimate and the drafted token back: k passes for k tokens.
    """

    one_pass = False

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        self.fc = nn.Linear(2 * target.hidden_size, target.hidden_size, bias=False)
        nn.init.normal_(self.fc.weight, std=0.02)
        self.body = Layers(spec.layers, target)
        start_norm(self.body, target)

    def fuse(self, features: Tensor, next_ids: Tensor) -> Tensor:
        """features [B, m, H], next_ids [B, m] -> the real rows' inputs [B, m, H]."""
        return self.fc(torch.cat([self.target.embed(next_ids), features], -1))

    def rows(
        self, features: Tensor, next_ids: Tensor, depth: Tensor, anchor: Tensor, place: Tensor, mask: Mask
    ) -> Tensor:
        return self.body(self.fuse(features, next_ids), place, mask)

    def prefill(self, features: Tensor, next_ids: Tensor, cache: Any) -> None:
        self.body.extend(self.fuse(features, next_ids), cache)

    def draft(self, features: Tensor, next_ids: Tensor, plan: Plan, choose: Choose, cache: Any) -> Tree:
        """k passes, each over the nodes that the level above left to be expanded (one, in a chain)."""
        hidden = self.body.extend(self.fuse(features, next_ids), cache)[:, -1:]
        real = cache.length
        grow = self._grow if plan.kind == "dynamic" else self._fill
        made = grow(hidden, plan, choose, cache)
        cache.crop(real)
        return made

    def _fill(self, hidden: Tensor, plan: Plan, choose: Choose, cache: Any) -> Tree:
        """A chain or a static tree."""
        tokens, draws, drawn, before = [], [], [], 0
        seen = None if plan.kind == "chain" else torch.zeros(1, 0, dtype=torch.bool, device=hidden.device)
        for level, (of, rank, keep) in enumerate(plan.levels, start=1):
            found = choose(self.logits(hidden[0], level - 1), slice(level - 1, level))
            tokens.append(found.tokens[of, rank])
            draws.append(of + before)
            drawn.append(found.q)
            before += len(found.tokens)
            if level < plan.k:
                fed = tokens[-1]
                if seen is not None:
                    fed, of = fed[keep], of[keep]
                    seen = torch.cat([seen[of], torch.eye(len(keep), dtype=torch.bool, device=seen.device)], 1)
                    hidden = hidden[:, of]
                hidden = self.body.extend(self.fuse(hidden, fed[None]), cache, seen, level - 1)
        q = None if drawn[0] is None else torch.cat(drawn)
        return Tree(torch.cat(tokens), plan.shape, q, torch.cat(draws))

    def _grow(self, hidden: Tensor, plan: Plan, choose: Choose, cache: Any) -> Tree:
        """EAGLE-2's dynamic tree (arXiv 2406.16858): expand the best nodes of each level, keep the best N of all."""
        beam, device = plan.beam, hidden.device
        worth = torch.zeros(1, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        seen = torch.zeros(1, 0, dtype=torch.bool, device=device)
        expanded = torch.full((1,), -1, device=device)  # where the rows of this level stand among all nodes; -1: root
        tokens, scores, parents, ranks, depths, before = [], [], [], [], [], 0
        for level in range(1, plan.k + 1):
            found = choose(self.logits(hidden[0], level - 1), slice(level - 1, level))
            path = (worth[:, None] + found.scores[:, :beam]).flatten()
            row = torch.arange(len(found.tokens), device=device).repeat_interleave(beam)
            tokens.append(found.tokens[:, :beam].flatten())
            scores.append(path)
            parents.append(expanded[row])
            ranks.append(torch.arange(beam, device=device).repeat(len(found.tokens)))
            depths.append(torch.full_like(row, level))
            if level < plan.k:
                best = path.argsort(descending=True, stable=True)[:beam]
                worth, of, expanded = path[best], row[best], best + before
                seen = torch.cat([seen[of], torch.eye(len(best), dtype=torch.bool, device=device)], 1)
                hidden = self.body.extend(self.fuse(hidden[:, of], tokens[-1][best][None]), cache, seen, level - 1)
            before += len(path)
        order = torch.cat(scores).argsort(descending=True, stable=True)[: plan.nodes]
        row = torch.zeros(before + 1, dtype=torch.long, device=device)
        row[order] = torch.arange(1, plan.nodes + 1, device=device)
        parent = row[torch.cat(parents)[order]]
        shape = Shape(parent, torch.cat(depths)[order], torch.cat(ranks)[order], ancestry(parent, plan.k))
        return Tree(torch.cat(tokens)[order], shape, None, parent)
