"""What every drafter is: a small module that reads the target's features and proposes tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from psnb import groups
from psnb.profile import DrafterSpec
from psnb.target import Target, heads
from psnb.tree import Candidates, Plan, Tree

Mask = Tensor | groups.Rows
# (logits [r, V] of slots first, first + 1, ... or all of one slot, and of linked slots `pairs`) -> candidates
Choose = Callable[..., Candidates]


def gather(rows: Tensor, at: Tensor) -> Tensor:
    """rows [B, m, H], at [B, n] -> [B, n, H]. `take_along_dim` would be compiled anew for every number of rows."""
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1]))


def last(rows: Tensor, valid: Tensor | None, count: int = 1, beyond: int = 0) -> Tensor:
    """The last `count` of the first `valid` [B] + `beyond` rows (None: of all): rows [B, m, H] -> [B, count, H]."""
    if valid is None:
        return rows[:, -count:]
    at = valid[:, None] + torch.arange(beyond - count, beyond, device=rows.device)
    return gather(rows, at)


class Link(nn.Module):
    """What a slot's row h becomes once the token x before it is known: h + B silu(A [h; e(x)]), h alone at the start.

    Slots drafted in one pass do not know each other's tokens. This is the part of Hydra's sequential heads (arXiv
    2402.05109) that needs no second pass: it is computed for all candidates of all slots at once.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.row, self.token = nn.Linear(width, rank, bias=False), nn.Linear(width, rank, bias=False)
        self.write = nn.Linear(rank, width, bias=False)
        for part in (self.row, self.token):
            nn.init.normal_(part.weight, std=width**-0.5)
        nn.init.zeros_(self.write.weight)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """hidden [..., H], embedded [..., H] of the tokens before (shapes that broadcast) -> [..., H]."""
        return hidden + self.write(F.silu(self.row(hidden) + self.hear(embedded)))

    def hear(self, embedded: Tensor) -> Tensor:
        """What the token before adds to the middle of the link: [..., H] -> [..., rank]."""
        return self.token(F.rms_norm(embedded, embedded.shape[-1:]))


class Drafter(nn.Module):
    """A drafter q. It borrows the target's embedding and `lm_head` (frozen, not copied, not saved).

    Rows: row (0, t) is the real row of anchor t, row (d, t) its mask d (see `groups`). Row (d, t) drafts slot
    `d + first_slot`; slot i of anchor t is x_{t+2+i}, whose distribution the target gives at position t + 1 + i.
    """

    one_pass = True  # all slots from one forward, so `marginals` exists
    frozen_head = True  # `logits` is the target's own projection
    first_slot = 0  # slot of the real row; -1 where it drafts nothing
    width = 0  # candidates of a slot in a draft, at least
    glue: tuple[str, ...] = ("last",)  # functions of a draft, beside the layers, that an engine may compile

    last = staticmethod(last)

    def __init__(self, spec: DrafterSpec, target: Target) -> None:
        super().__init__()
        self.spec = spec
        self.k = spec.k
        self.link: Link | None = None  # what a slot's row hears of the token before it
        object.__setattr__(self, "target", target)  # not a submodule: frozen, shared, never saved here

    @property
    def masks(self) -> int:
        """Masks a group carries in training (0: only real rows)."""
        return 0

    def rows(
        self, features: Tensor, next_ids: Tensor, depth: Tensor, anchor: Tensor, place: Tensor, mask: Mask
    ) -> Tensor:
        """Training forward: every row at once.

        features [B, n, (1 + taps) * H] (f_t last), next_ids [B, n] (x_{t+1}), depth, anchor [R], place [B, R]
        (position ids), mask: `groups.structure`, or bool [B, 1, R, R] -> hidden [B, R, H].
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor, slot: int) -> Tensor:
        """hidden [..., H] of rows that draft `slot` -> logits [..., V]."""
        return self.target.logits(hidden)

    def ready(self) -> None:
        """Decoding: make once what drafts take from weights that stay as they are. To be called before the first."""

    def prefill(self, features: Tensor, next_ids: Tensor, cache: Any) -> None:
        """Decoding: put the real rows of features [1, m, H] and next_ids [1, m] into `cache`; draft nothing."""

    def marginals(self, features: Tensor, next_ids: Tensor, k: int, cache: Any, valid: Tensor | None = None) -> Tensor:
        """Decoding: add real rows (features [1, m, H], next_ids [1, m]); logits [k, V] of the k slots after the last.

        `cache` then holds the real rows alone. With `valid` [B], features [B, m, H] and next_ids [B, m] are of B
        sequences, of each the first `valid` rows count (others leave no trace), and the logits are [B, k, V].
        """
        raise NotImplementedError

    def draft(
        self, features: Tensor, next_ids: Tensor, plan: Plan, choose: Choose, cache: Any, valid: Tensor | None = None
    ) -> Tree:
        """Decoding: add real rows and draft the tree of `plan` after the last of them, in one pass.

        `choose` turns logits into candidates. `cache` then holds the real rows alone. `valid`: see `marginals`; then
        the tree's tensors have a leading B, but for what is the same in all trees.
        """
        return plan(choose(self.marginals(features, next_ids, plan.k, cache, valid), slice(0, plan.k)))


class Layers(nn.Module):
    """Decoder layers of the target's width, with RoPE and a final norm: the body of every attentive drafter.

    The norm starts at the target's own, so that the rows have the scale of features.
    """

    def __init__(self, count: int, target: Target) -> None:
        super().__init__()
        of = target.config
        queries, keys, width = heads(of)
        config = LlamaConfig(
            hidden_size=of.hidden_size,
            intermediate_size=getattr(of, "intermediate_size", None) or 4 * of.hidden_size,
            num_hidden_layers=count,
            num_attention_heads=queries,
            num_key_value_heads=keys,
            head_dim=width,
            max_position_embeddings=of.max_position_embeddings,
            rms_norm_eps=getattr(of, "rms_norm_eps", 1e-6),
        )
        config._attn_implementation = groups.register()
        self.shared = queries // keys  # query heads of a key head
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(count))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        parts = [(part, getattr(part, "weight", None)) for part in target.model.base_model.children()]
        if norms := [(part, weight) for part, weight in parts if isinstance(weight, Tensor) and weight.ndim == 1]:
            last, scale = norms[-1]
            if "RMS" in (kind := type(last).__name__):
                scale = last(torch.ones_like(scale))  # Gemma's scales by 1 + weight
            elif "1P" in kind:
                scale = 1 + scale
            self.norm.weight.data.copy_(scale.data)

    def forward(self, hidden: Tensor, place: Tensor, mask: Mask | None, cache: Any = None) -> Tensor:
        """hidden [B, R, H], place [B, R], mask bool [B, 1, R, keys], the rows of groups, or None (all keys).

        Returns the normed hidden [B, R, H].
        """
        angles = self.rotary(hidden, place)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
        return self.norm(hidden)

    def extend(self, hidden: Tensor, cache: Any, seen: Tensor | None = None, ahead: int = 0) -> Tensor:
        """Decoding: rows [B, r, H] that follow the cached ones, laid out by `cache.layout`, which see."""
        place, mask = cache.layout(hidden.shape[1], hidden.device, seen, ahead)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = groups.for_few(mask[:, 0], self.shared, hidden.dtype)
        return self(hidden, place, mask, cache)
