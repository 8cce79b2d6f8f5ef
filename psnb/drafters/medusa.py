"""Medusa: k heads on the target's feature, each with its own vocabulary projection (arXiv 2401.10774)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psnb.drafters.base import Drafter, Mask
from psnb.profile import DrafterSpec
from psnb.target import Target


class Medusa(Drafter):
    """Head i: f + SiLU(A_i f), A_i zero at the start, then W_i, a copy of the target's projection at the start."""

    frozen_head = False

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        width, vocab = target.hidden_size, target.vocab_size
        self.residual = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.k))
        self.project = nn.ModuleList(nn.Linear(width, vocab, bias=False) for _ in range(spec.k))
        with torch.no_grad():
            for residual, project in zip(self.residual, self.project, strict=True):
                residual.weight.zero_()
                residual.bias.zero_()
                project.weight.copy_(target.model.get_output_embeddings().weight)

    def rows(
        self, features: Tensor, next_ids: Tensor, depth: Tensor, anchor: Tensor, place: Tensor, mask: Mask
    ) -> Tensor:
        """The rows are the features themselves, one an anchor; every head reads the same row."""
        return features

    def logits(self, hidden: Tensor, slot: int) -> Tensor:
        return self.project[slot](hidden + F.silu(self.residual[slot](hidden)))

    def marginals(self, features: Tensor, next_ids: Tensor, k: int, cache: Any, valid: Tensor | None = None) -> Tensor:
        row = features[0, -1:] if valid is None else self.last(features, valid)
        return torch.cat([self.logits(row, slot) for slot in range(k)], -2)
