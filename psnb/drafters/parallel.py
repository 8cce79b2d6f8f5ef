"""ParallelSpec: k tokens in one pass through mask tokens (arXiv 2410.05589), put into Medusa and EAGLE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psnb.drafters.base import Choose, Drafter, Layers, Link, Mask, gather
from psnb.drafters.eagle import Eagle
from psnb.profile import DrafterSpec
from psnb.target import Target
from psnb.tree import Plan, Tree

WIDTH = 32  # candidates of a linked slot, at least


class Pairs:
    """What the candidates of a slot are worth after each of the slot before, from tables that are made once.

    By token, [V, rank] each: what a link hears of the one before, and what it writes to the logit of the next.
    w (h + B silu(A h + C e)) = w h + (w B) silu(A h + C e): a pair costs `rank` products and no pass of the head.
    """

    def __init__(self, link: Link, target: Target) -> None:
        model = target.model
        with torch.inference_mode(False), torch.no_grad():
            self.row = link.row
            self.heard = link.hear(model.get_input_embeddings().weight)
            self.written = model.get_output_embeddings().weight @ link.write.weight

    def __call__(self, logits: Tensor, hidden: Tensor, tokens: Tensor, root: Tensor) -> Tensor:
        """Logits of each slot's candidates after each of the slot before (slot 0: all rows are alike, after the root).

        logits [(B,) k, V] of the slots' rows alone, these rows hidden [(B,) k, H], tokens [(B,) k, W], root [(B,)]
        -> [(B,) k, W (the token before), W].
        """
        before = torch.cat([root[..., None, None].expand_as(tokens[..., :1, :]), tokens[..., :-1, :]], -2)
        middle = F.silu(self.row(hidden)[..., None, :] + self.heard[before])
        return logits.gather(-1, tokens)[..., None, :] + middle @ self.written[tokens].transpose(-1, -2)


def plant(pairs: Pairs | None, logits: Tensor, hidden: Tensor, root: Tensor, plan: Plan, choose: Choose) -> Tree:
    """The tree from the slots' logits and rows [(B,) k, ...] and the token before the first of them [(B,)].

    No method: an engine compiles it once for all drafters.
    """
    slots = slice(0, plan.k)
    if pairs is None:
        return plan(choose(logits, slots))
    return plan(choose(logits, slots, lambda tokens: pairs(logits, hidden, tokens, root)))


class Parallel(Drafter):
    """The one-pass part that both variants share: real rows, then masks, causally, in a single forward."""

    body: Layers
    glue = ("last", "arrange")

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        if spec.link:
            self.link, self.width = Link(target.hidden_size, spec.link), WIDTH
        self.pairs: Pairs | None = None  # of linked slots, once `ready`
        self.planted: Tensor | None
        self.register_buffer("planted", None, persistent=False)  # `mask_inputs`, once `ready`

    def train(self, mode: bool = True) -> Parallel:
        self.pairs, self.planted = None, None
        return super().train(mode)

    def ready(self) -> None:
        if self.link is not None and self.pairs is None:
            self.pairs = Pairs(self.link, self.target)
        if self.planted is None:
            with torch.inference_mode(False), torch.no_grad():
                self.planted = self.mask_inputs().detach()

    def real(self, features: Tensor, next_ids: Tensor) -> Tensor:
        """Inputs of the real rows: features [B, m, (1 + taps) * H], next_ids [B, m] -> [B, m, H]."""
        raise NotImplementedError

    def mask_inputs(self) -> Tensor:
        """Inputs of masks 1..M: [M, H]."""
        raise NotImplementedError

    def each_mask(self, learned: Tensor, count: int) -> Tensor:
        """Inputs of masks 1..count from the learned ones: these (distinct), or the one for all (shared)."""
        if self.spec.mask_mode == "distinct":
            return learned
        return learned[torch.zeros(count, dtype=torch.long, device=learned.device)]

    def rows(
        self, features: Tensor, next_ids: Tensor, depth: Tensor, anchor: Tensor, place: Tensor, mask: Mask
    ) -> Tensor:
        real = self.real(features, next_ids)
        masked = self.mask_inputs()[depth[real.shape[1] :] - 1].expand(len(features), -1, -1).to(real.dtype)
        return self.body(torch.cat([real, masked], 1), place, mask)

    def prefill(self, features: Tensor, next_ids: Tensor, cache: Any) -> None:
        self.body.extend(self.real(features, next_ids), cache)

    def arrange(self, features: Tensor, next_ids: Tensor, masks: int, valid: Tensor | None) -> Tensor:
        """Inputs of a draft: those of real rows (features [B, m, H], next_ids [B, m]), then masks: [B, m + masks, H].

        With `valid` [B] the masks follow the last valid row; what does not count comes after them, where nothing sees
        it. m = 3, valid 2, masks 2: rows 0 1 3 4 2.
        """
        batch, m = next_ids.shape
        planted = self.mask_inputs() if self.planted is None else self.planted
        inputs = torch.cat([self.real(features, next_ids), planted[:masks].expand(batch, -1, -1)], 1)
        if valid is None:
            return inputs
        row = torch.arange(m + masks, device=inputs.device)
        late = row - valid[:, None]
        order = torch.where(late < 0, row, torch.where(late < masks, late + m, row - masks))
        return gather(inputs, order)

    def ahead(self, features: Tensor, next_ids: Tensor, k: int, cache: Any, valid: Tensor | None = None) -> Tensor:
        """As `marginals`, the rows of the slots instead of their logits: [k, H], with `valid` [B, k, H]."""
        masks, held = k - 1 - self.first_slot, cache.length
        hidden = self.body.extend(self.arrange(features, next_ids, masks, valid), cache)
        cache.crop(held + (next_ids.shape[1] if valid is None else valid))
        hidden = self.last(hidden, valid, k, masks)
        return hidden[0] if valid is None else hidden

    def marginals(self, features: Tensor, next_ids: Tensor, k: int, cache: Any, valid: Tensor | None = None) -> Tensor:
        return self.logits(self.ahead(features, next_ids, k, cache, valid), 0)

    def draft(
        self, features: Tensor, next_ids: Tensor, plan: Plan, choose: Choose, cache: Any, valid: Tensor | None = None
    ) -> Tree:
        hidden = self.ahead(features, next_ids, plan.k, cache, valid)
        root = next_ids[0, -1] if valid is None else self.last(next_ids[..., None], valid)[:, 0, 0]
        return plant(self.pairs, self.logits(hidden, 0), hidden, root, plan, choose)


class EaglePS(Parallel):
    """EAGLE + ParallelSpec: slot 0 is the real row fc[emb(x_{t+1}); f_t], slot i >= 1 the mask fc[m_i; h_i]."""

    fuse = Eagle.fuse

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        width = (2 + len(spec.taps)) * target.hidden_size  # the embedding, the taps, f_t
        self.fc = nn.Linear(width, target.hidden_size, bias=False)
        nn.init.normal_(self.fc.weight, std=0.02)
        count = (spec.k - 1) if spec.mask_mode == "distinct" else min(1, spec.k - 1)
        self.mask_pair = nn.Parameter(torch.randn(count, width) * 0.02)  # [m_i; h_i]
        self.body = Layers(spec.layers, target)

    @property
    def masks(self) -> int:
        return self.k - 1

    def real(self, features: Tensor, next_ids: Tensor) -> Tensor:
        return self.fuse(features, next_ids)

    def mask_inputs(self) -> Tensor:
        return self.each_mask(self.fc(self.mask_pair), self.masks)


class MedusaPS(Parallel):
    """Medusa + ParallelSpec: real rows are the features f_t and draft nothing; mask i + 1 drafts slot i.

    With taps the real rows are mix[taps; f_t], which is f_t at the start.
    """

    first_slot = -1

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__(spec, target)
        count = spec.k if spec.mask_mode == "distinct" else 1
        self.mask_row = nn.Parameter(torch.randn(count, target.hidden_size) * 0.02)
        if spec.taps:
            width = target.hidden_size
            self.mix = nn.Linear((1 + len(spec.taps)) * width, width, bias=False)
            with torch.no_grad():
                self.mix.weight.zero_()[:, -width:].fill_diagonal_(1.0)
        self.body = Layers(spec.layers, target)

    @property
    def masks(self) -> int:
        return self.k

    def real(self, features: Tensor, next_ids: Tensor) -> Tensor:
        return self.mix(features) if self.spec.taps else features

    def mask_inputs(self) -> Tensor:
        return self.each_mask(self.mask_row, self.masks)
