"""EAGLE: one decoder layer that drafts autoregressively in feature space (EAGLE-1, arXiv 2401.15077)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psnb.drafters.base import Choose, Drafter, Layers, Mask, start_norm
from psnb.profile import DrafterSpec
from psnb.target import Target


class Eagle(Drafter):
    """Row (0, t): fc[emb(x_{t+1}); f_t] -> an estimate of f_{t+1}, which `lm_head` turns into x_{t+2}'s distribution.

    Slot i >= 1 feeds the estimate and the drafted token back: k passes for k tokens.
    """

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

    def draft(self, features: Tensor, next_ids: Tensor, k: int, choose: Choose, cache: Any) -> Tensor:
        hidden = self.body.extend(self.fuse(features, next_ids), cache)[:, -1:]
        real = cache.length
        drafted = [choose(self.logits(hidden[0], 0), 0)]
        for slot in range(1, k):
            hidden = self.body.extend(self.fuse(hidden, drafted[-1][None]), cache)
            drafted.append(choose(self.logits(hidden[0], slot), slot))
        cache.crop(real)
        return torch.cat(drafted)
