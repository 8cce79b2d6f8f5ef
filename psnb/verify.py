"""Verification: which drafted tokens the target keeps, and the one it adds. Pure functions, no model inside.

Rows of a verification pass: row 0 is the root (the last known token), row i + 1 is drafted node i = 0..N-1. A parent
stands before its children; siblings are different tokens, in the order in which they are tried. `parent` [N] holds
rows; `mask` bool [N + 1, N + 1]: a row sees itself and its ancestors. Two children of the root, and one of the first:

    tokens 5 7 9    parent 0 0 1    mask 1 0 0 0      row 0   the root
                                         1 1 0 0      row 1   5
                                         1 0 1 0      row 2   7
                                         1 1 0 1      row 3   5 9

Shapes are static and nothing waits for the device, so that a whole round can be one CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
TARGET, DRAFT, ACCEPT, EMIT = range(4)  # streams of noise: target's choice, drafter's draws, accept decisions, emission


class Verdict(NamedTuple):
    """path [D + 1]: rows of the accepted path from the root, its last row repeated to the end; D: depth of the tree.

    count []: accepted drafted nodes, 0..D; the path is path[: count + 1]. token []: what the target adds after it.
    """

    path: Tensor
    count: Tensor
    token: Tensor


# --- noise ----------------------------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that leaves no visible pattern (Mueller's integer hash); int64 in [0, 2^32)."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x


def uniform(seed: int | Tensor, positions: Tensor, columns: int, stream: int = TARGET) -> Tensor:
    """Uniform numbers in (0, 1), a function of (seed, stream, position, column): positions [r] int -> [r, columns].

    float64, the same on every device, in any order, for any batch of positions. Positions stay below 2^28. Draws that
    decide a round belong to that round alone, for a verifier may have looked beyond what it accepted (`block` does):
    ask for them at the round's first position, in as many columns as are needed (see `Noise`).
    """
    whole = _mix(torch.as_tensor(seed, device=positions.device).long() & _MASK)  # or seeds would share rows
    keyed = positions.long() ^ (stream << 28) ^ whole
    row = _mix(_mix(keyed) + (seed >> 32 & _MASK) & _MASK)
    column = _mix(torch.arange(columns, device=positions.device) ^ 0x9E3779B9)
    high = _mix((row[:, None] ^ column[None, :]) & _MASK)
    low = _mix(high + row[:, None] & _MASK)
    return ((high << 20 | low >> 12).double() + 0.5) / 2.0**52  # 52 bits, never 0 or 1


def gumbel(
    seed: int | Tensor, positions: Tensor, vocab: int, dtype: torch.dtype = torch.float32, stream: int = TARGET
) -> Tensor:
    """Noise G[s, v] = -log(-log u) that depends on (seed, absolute position s, token v) and on nothing else.

    positions [r] int -> [r, vocab]; u is `uniform`. That nothing else enters is what makes the output of `coupled`
    independent of the drafter (arXiv 2408.07978).
    """
    return -(-uniform(seed, positions, vocab, stream).log()).log().to(dtype)


class Noise:
    """The noise of one generation; float32 at least. The target's rows are made once, a few ahead of what is asked."""

    BLOCK = 8

    def __init__(self, seed: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.vocab, self.device = seed, vocab, device
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._start, self._rows = 0, torch.empty(0, vocab, dtype=self.dtype, device=device)

    def rows(self, start: int, count: int) -> Tensor:
        """G of the target's choice for the positions start .. start + count - 1: [count, vocab]."""
        have = self._start + len(self._rows)
        if not self._start <= start <= have:
            self._start, have, self._rows = start, start, self._rows[:0]
        if start + count > have:
            made = [self._rows[start - self._start :]]  # rows before `start` are decided
            while have < start + count:
                block = torch.arange(have, have + self.BLOCK, device=self.device)
                made.append(gumbel(self.seed, block, self.vocab, self.dtype))
                have += self.BLOCK
            self._start, self._rows = start, torch.cat(made)
        return self._rows[start - self._start : start - self._start + count]

    def drafts(self, start: int, count: int) -> Tensor:
        """G of the drafter's own draws in the round whose first new position is `start`: [count, vocab]."""
        at = torch.full((1,), start, device=self.device)
        return gumbel(self.seed, at, count * self.vocab, self.dtype, DRAFT).view(count, self.vocab)

    def accepts(self, start: int, depth: int, width: int) -> Tensor:
        """What decides the r-th sibling tried at depth d in the round that begins at `start`: [depth, width]."""
        at = torch.full((1,), start, device=self.device)
        return uniform(self.seed, at, depth * width, ACCEPT).view(depth, width)

    def emit(self, start: int) -> Tensor:
        """G of the token that ends the round beginning at `start`: [vocab]."""
        at = torch.full((1,), start, device=self.device)
        return gumbel(self.seed, at, self.vocab, self.dtype, EMIT)[0]


# --- distributions --------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def warp(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution to sample from, for p and q alike: logits [..., V] -> [..., V], float32 at least.

    logits / T (T > 0), then -inf outside the top_k largest (0: all), then outside the fewest of these whose mass
    reaches top_p. What equals the smallest logit kept is kept too, so the order of equals never matters. At T = 1,
    top_k = 3 and top_p = 0.7 the probabilities 0.4 0.3 0.2 0.1 keep 0.4 0.3 (masses 4/9 + 3/9 reach 0.7).
    """
    logits = _wide(logits) / temperature
    if not top_k and top_p >= 1:
        return logits
    best = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1])).values
    if top_p < 1:
        mass = best.softmax(-1)
        kept = (mass.cumsum(-1) - mass < top_p).sum(-1, keepdim=True).clamp(min=1)
        border = best.gather(-1, kept - 1)
    else:
        border = best[..., -1:]
    return logits.masked_fill(logits < border, -torch.inf)


def perturb(logits: Tensor, temperature: float, noise: Tensor | None, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Scores whose arg max is the choice: logits at T = 0, `warp` + G above. logits, noise [..., V] -> [..., V].

    arg max of log p / T + G is a sample of softmax(logits / T) (Gumbel's trick); log p and logits differ by a constant.
    """
    if temperature == 0:
        return logits
    if not top_k and top_p >= 1:  # one pass over the table
        return torch.add(noise, _wide(logits), alpha=1 / temperature)
    return warp(logits, temperature, top_k, top_p) + noise


def without_replacement(logits: Tensor, noise: Tensor, width: int) -> Tensor:
    """Draws of softmax(logits) without replacement, in their order: logits, noise (Gumbel) [r, V] -> [r, width].

    Gumbel top-k (arXiv 1903.06059). Beyond the support of a row (-inf) come tokens that `rejection` does not try.
    """
    return (_wide(logits) + noise).topk(width).indices


def best(scores: Tensor, width: int, ordered: bool = True, chunks: int = 0) -> tuple[Tensor, Tensor]:
    """`topk` of scores [..., V]: values and indices [..., width], of equals any; in any order unless `ordered`.

    In two steps, first in `chunks` parts of V each (0: 16 on a GPU, where a part has a block of threads; else 1).
    """
    vocab = scores.shape[-1]
    chunks = chunks or (16 if scores.is_cuda and vocab % 16 == 0 and vocab >= 4096 else 1)
    if chunks == 1:
        return tuple(scores.topk(width, sorted=ordered))
    size = vocab // chunks
    found = scores.unflatten(-1, (chunks, size)).topk(min(width, size), sorted=False)
    start = torch.arange(0, vocab, size, device=scores.device)[:, None]
    values, at = found.values.flatten(-2).topk(width, sorted=ordered)
    return values, (found.indices + start).flatten(-2).gather(-1, at)


# --- verifiers ------------------------------------------------------------------------------------------------------


def walk(tokens: Tensor, parent: Tensor, mask: Tensor, chosen: Tensor, depth: int) -> Verdict:
    """`greedy` and `coupled`: follow the child that equals the target's choice, emit the choice where none does.

    tokens, parent [N], mask [N + 1, N + 1], chosen [N + 1]: the arg max of `perturb` on every row. In the module's
    tree chosen 5 9 1 4 -> path 0 1 3, count 2, token 4; chosen 7 9 1 4 -> path 0 2 2, count 1, token 1.
    """
    match = tokens == chosen[parent]
    accepted = (torch.cat([match.new_ones(1), match]) | ~mask).all(-1)  # a row is where all rows that it sees are
    level = mask.sum(-1) - 1
    last = torch.where(accepted, level, -1).argmax(0, keepdim=True)
    rows = torch.arange(len(mask), device=mask.device)
    above = mask.index_select(0, last) & (level <= torch.arange(depth + 1, device=mask.device)[:, None])
    path = torch.where(above, rows, 0).amax(-1)  # deeper rows of a path have larger numbers
    return Verdict(path, level.index_select(0, last)[0], chosen.index_select(0, last)[0])


def _sample(weights: Tensor, otherwise: Tensor, emit: Tensor) -> Tensor:
    """A draw in proportion to weights [V], with Gumbel noise emit [V]: [].

    max(0, p - q) is 0 everywhere if p equals q and rounding alone has rejected: then it is drawn from `otherwise`.
    """
    return (torch.where(weights.sum() > 0, weights, otherwise).log() + emit).argmax(-1)


def rejection(
    tokens: Tensor,
    parent: Tensor,
    p: Tensor,
    q: Tensor | None,
    draw: Tensor | None,
    uniform: Tensor,
    emit: Tensor,
    depth: int,
    width: int,
) -> Verdict:
    """Speculative sampling: accept x with min(1, p(x) / q(x)), else p <- norm(max(0, p - q)); siblings one by one.

    tokens, parent [N], p [N + 1, V] the target's probabilities after every row, q [Q, V] the drafter's, draw [N] the
    row of q that a node was drawn from (one for all siblings), uniform [depth, width]: [d, r] decides the r-th sibling
    tried at depth d, emit [V] Gumbel noise of the last token; width: the most siblings that there are.
    Siblings are drawn without replacement: after a rejection q loses that token and is renormalised. With q None the
    nodes are no draws (q is a point mass): accept with p(x), else p(x) <- 0. A node with q(x) = 0 is not tried.
    For the output to follow p, the shape of the tree may not depend on what was drawn in it.

    p = 0.5 0.5 and one node 0 of q = 0.8 0.2: accepted if uniform < 0.5 / 0.8, else token 1 is emitted.
    Sources: arXiv 2211.17192 and 2302.01318 (chains), EAGLE-1, arXiv 2401.15077 (trees).
    """
    p = _wide(p)
    rows = torch.arange(1, len(tokens) + 1, device=tokens.device)
    earlier = (parent[:, None] == parent) & (rows < rows[:, None])  # [N, N]: siblings tried before
    rank = earlier.sum(-1)
    if q is None:
        return _rejection_of_points(tokens, parent, p, uniform, emit, depth, earlier, rank)
    q = _wide(q)
    order = torch.arange(width, device=tokens.device)[:, None]
    tokens, draw = torch.cat([tokens[:1], tokens]), torch.cat([draw[:1], draw])  # by row; the root's are not used
    row = torch.zeros(1, dtype=torch.long, device=tokens.device)
    live, path = row == 0, [row]
    for d in range(depth):
        children = torch.where((parent == row) & (rank == order), rows, 0).amax(-1)  # [width], 0: there is none
        guess = q.index_select(0, draw.index_select(0, children[:1]))[0]
        there, siblings = children > 0, tokens.index_select(0, children)
        siblings = torch.where(there, siblings, siblings[0])
        given = torch.where(there, guess.gather(0, siblings), 0)
        # q's mass before each draw, summed without cancellation: what is never drawn, and the draws still to come
        mass = guess.scatter(0, siblings, 0).sum() + given.flip(0).cumsum(0).flip(0)
        # p, its total and its share of each sibling after all siblings before were rejected; neither is normalised.
        # A rejected token has no p left, so that q may keep it
        left = p.index_select(0, row)[0]
        scale, totals, wanted = torch.where(given > 0, 1 / mass, 0), [], []
        for r in range(width):
            totals.append(left.sum(-1, keepdim=True))
            wanted.append(left.gather(0, siblings[r : r + 1]))
            left = torch.addcmul(left, guess, scale[r] * totals[r], value=-1).relu()
        hit = (uniform[d] * given * scale * torch.cat(totals) < torch.cat(wanted)) & (given > 0)
        first = children.index_select(0, hit.to(torch.uint8).argmax(0, keepdim=True))
        live = live & hit.any()
        row = torch.where(live, first, row)
        path.append(row)
    path, last = torch.cat(path), p.index_select(0, row)[0]
    token = _sample(torch.where(live, last, left), last, emit)  # where the path ended early, left is still that row's
    return Verdict(path, (path[1:] != path[:-1]).sum(), token)


def _rejection_of_points(
    tokens: Tensor, parent: Tensor, p: Tensor, uniform: Tensor, emit: Tensor, depth: int, earlier: Tensor, rank: Tensor
) -> Verdict:
    """`rejection` with q None, all nodes at once: the r-th sibling meets p without the siblings before it."""
    level = torch.zeros_like(parent)  # of a node; the root's children have 0
    above = parent
    for _ in range(depth - 1):
        level = level + (above > 0)
        above = torch.where(above > 0, parent[above - 1], 0)
    wanted = p[parent, tokens]
    left = (1 - torch.where(earlier, wanted, 0).sum(-1)).clamp(min=0)
    hit = uniform[level, rank] * left < wanted
    hit = hit & ~(earlier & hit).any(-1)
    rows = torch.arange(1, len(tokens) + 1, device=tokens.device)
    row = torch.zeros(1, dtype=torch.long, device=tokens.device)
    path = [row]
    for _ in range(depth):
        row = torch.maximum(row, torch.where((parent == row) & hit, rows, 0).amax(-1))
        path.append(row)
    path = torch.cat(path)
    ends = p.index_select(0, row)[0]
    gone = torch.zeros_like(ends).scatter_add(0, tokens, (parent == row).to(p.dtype))
    token = _sample(ends.masked_fill(gone > 0, 0), ends, emit)
    return Verdict(path, (path[1:] != path[:-1]).sum(), token)


def block(tokens: Tensor, p: Tensor, q: Tensor, uniform: Tensor, emit: Tensor) -> Verdict:
    """Block verification of a chain: on average never fewer accepted than with `rejection` (arXiv 2403.10444).

    tokens [k] drawn from q [k, V], p [k + 1, V] the target's probabilities, uniform [k], emit [V] Gumbel noise.
    w_0 = 1, w_i = min(w_(i-1) p(x_i) / q(x_i), 1); S_i = sum max(w_i p - q, 0) over the next token, h_i = S_i / (S_i +
    1 - w_i), h_k = w_k; the LARGEST i with uniform_i <= h_i is accepted (else 0) and max(w_i p - q, 0) emitted from.

    p = 0.5 0.5 on both rows, q = 0.8 0.2, chain 0: w_1 = h_1 = 0.625.
    """
    p, q = _wide(p), _wide(q)
    k = len(tokens)
    wanted, given = p[:k].gather(-1, tokens[:, None]), q.gather(-1, tokens[:, None])
    ratio = torch.where(given > 0, wanted / given, 0)
    weights = [torch.ones_like(ratio[0])]
    for i in range(k):
        weights.append((weights[-1] * ratio[i]).clamp(max=1))
    weight = torch.stack(weights)  # [k + 1, 1]
    # nothing was drafted after the chain: with q = 0 there, S_k = w_k and h_k = w_k / (w_k + 1 - w_k), as it should be
    rest = (weight * p - torch.cat([q, torch.zeros_like(q[:1])])).relu()
    total = rest.sum(-1)
    # S_i = 0 with w_i = 1: p equals q next, a later token is accepted for sure, any h_i serves
    holds = (total / (total + 1 - weight[:, 0]).clamp(min=1e-30))[1:]
    steps = torch.arange(k + 1, device=tokens.device)
    count = torch.where(uniform <= holds, steps[1:], 0).amax(0, keepdim=True)
    token = _sample(rest.index_select(0, count)[0], p.index_select(0, count)[0], emit)
    return Verdict(torch.minimum(steps, count), count[0], token)


# --- what to expect -------------------------------------------------------------------------------------------------


def rejection_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Probability that one draw of q is accepted by `rejection`, 1 - TV(p, q): p, q [..., V] -> [...]."""
    return torch.minimum(p, q).sum(-1)


def coupled_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Probability that p and q choose the same token with the same noise: p, q [..., V] -> [...].

    sum_j 1 / sum_i max(p_i / p_j, q_i / q_j) (arXiv 2408.07978; DESIGN section 8). With the tokens sorted by p / q,
    the maximum is p_i / p_j from j on and q_i / q_j before it, so cumulated sums serve all j. p = 0.5 0.5, q = 0.8 0.2
    gives 1 / (1 + 1) + 1 / (1 + 4) = 0.7, which here is 1 - TV too.
    """
    order = torch.where(p + q > 0, p / (p + q), 0).argsort(-1)
    p, q = p.gather(-1, order), q.gather(-1, order)
    above = p.flip(-1).cumsum(-1).flip(-1)
    below = q.cumsum(-1) - q
    return torch.where(p * q > 0, p * q / (above * q + below * p), 0).sum(-1)


def coupled_bounds(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Between what `coupled_acceptance` lies: (1 - TV) / (1 + TV) and 1 - TV. p, q [..., V] -> [...], [...]."""
    same = rejection_acceptance(p, q)
    return same / (2 - same), same
