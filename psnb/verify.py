"""Verification: which drafted tokens the target would have produced itself. Pure functions, no model inside."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that leaves no visible pattern (Mueller's integer hash); int64 in [0, 2^32)."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x


def gumbel(seed: int, positions: Tensor, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise G[s, v] = -log(-log u) that depends on (seed, absolute position s, token v) and on nothing else.

    positions [r] int -> [r, vocab]. The same numbers on every device, in any order, for any batch of positions: this
    is what makes the output of `coupled` independent of the drafter (arXiv 2408.07978).
    """
    device = positions.device
    row = _mix(_mix(positions.long() ^ (seed & _MASK)) + (seed >> 32 & _MASK) & _MASK)
    column = _mix(torch.arange(vocab, device=device) ^ 0x9E3779B9)
    high = _mix((row[:, None] ^ column[None, :]) & _MASK)
    low = _mix(high + row[:, None] & _MASK)
    u = ((high << 20 | low >> 12).double() + 0.5) / 2.0**52  # 52 bits, never 0 or 1
    return -(-u.log()).log().to(dtype)


class Noise:
    """Rows of `gumbel` for one generation, made a block of positions at a time; float32 at least."""

    BLOCK = 16

    def __init__(self, seed: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.vocab, self.device = seed, vocab, device
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._start, self._rows = 0, torch.empty(0, vocab)

    def rows(self, start: int, count: int) -> Tensor:
        """G for the positions start .. start + count - 1: [count, vocab]."""
        end = start + count
        if not self._start <= start <= end <= self._start + len(self._rows):
            self._start = start
            block = torch.arange(start, start + max(count, self.BLOCK) + count, device=self.device)
            self._rows = gumbel(self.seed, block, self.vocab, self.dtype)
        return self._rows[start - self._start : end - self._start]


def perturb(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Scores whose arg max is the choice: logits at T = 0, logits / T + G above. logits, noise [..., V] -> [..., V].

    arg max of log p / T + G is a sample of softmax(logits / T) (Gumbel's trick); log p and logits differ by a constant.
    """
    return logits if temperature == 0 else logits / temperature + noise


def follow(drafted: Tensor, chosen: Tensor) -> Tensor:
    """How many drafted tokens are accepted: drafted [k], the target's choices chosen [k + 1] -> int tensor 0..k.

    This is `greedy` and `coupled` alike (the choices differ): accept while the draft equals the choice, then emit the
    choice. drafted [5, 7, 9], chosen [5, 7, 2, 4] -> 2, and chosen[2] = 2 is emitted.
    """
    return (drafted == chosen[:-1]).long().cumprod(0).sum()
