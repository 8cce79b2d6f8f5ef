"""Decoding: `autoregressive` and `speculative` are siblings with one interface and one result.

One round of `speculative` is draft -> verify -> commit. Positions: x_0 .. x_{L-1} are known, the target's cache holds
x_0 .. x_{L-2}; a round feeds x_{L-1} (the root) and the drafted nodes, so a row of depth d chooses x_{L+d}.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psnb.cache import KVCache
from psnb.drafters import Drafter
from psnb.errors import UserError
from psnb.groups import for_few
from psnb.profile import nearest
from psnb.target import Target
from psnb.tree import Candidates, Plan, Shape, Tree
from psnb.verify import Noise, Verdict, best, block, perturb, rejection, walk, warp, without_replacement

RULES = ("coupled", "rejection", "block")  # above T = 0, where all are `greedy`
GRAM = 8  # tokens of a repeat
COLDEST = 1e-6  # temperature above 0: below, float32 does not hold logits / T
PARTS = ("prefill", "draft", "verify", "commit", "host")


@dataclass(frozen=True)
class Settings:
    """What to generate. `temperature` 0 is greedy; above 0 sampling is `coupled` to the seed's noise."""

    k: int = 5  # draft length; in a tree, its depth
    tree: str = "chain"  # chain, static, best_first or dynamic (see tree.Plan)
    nodes: int = 0  # of a tree
    temperature: float = 0.7
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    rule: str = "coupled"  # how drafts are verified above T = 0: coupled, rejection or block
    # A draft is worth Pr[the target chooses it | q, G], and the target is sharper than the drafter knows.
    # Fitted on held-out text; they change what is drafted, never the text.
    sharpen: float = 1.2  # greedy and coupled: scale of the drafter's logits
    spread: float = 1.25  # coupled: what a node is worth is a softmax of its perturbed score over `spread`
    max_new_tokens: int = 64
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    repeat_stop: int = 16  # stop once this many tokens in a row each end an 8-gram generated before; 0: never


@dataclass(frozen=True)
class Round:
    """One draft and its verification; `start` indexes Generation.tokens."""

    start: int
    drafted: list[int]
    accepted: int
    parent: list[int] = field(default_factory=list)  # of a tree: rows of the nodes' parents, and the accepted path
    path: list[int] = field(default_factory=list)


@dataclass
class Generation:
    """What was generated, and what it cost. `rounds` is empty for plain decoding."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    stopped: str = "length"  # length, stop or repeat
    repeated: int = 0  # tokens that end an 8-gram generated before

    @property
    def whole_rounds(self) -> list[Round]:
        """Rounds that acceptance is counted over: all but one that an end token cut, whose rest nobody asked for.

        One that a limit cut counts with all it accepted: a long round is the likeliest to be cut, so to leave it out
        would make rounds look shorter than they are (with it, their mean is right: Wald's identity).
        """
        if self.stopped != "stop":
            return self.rounds
        return [r for r in self.rounds if r.start + r.accepted + 1 <= len(self.tokens)]

    @property
    def decode_seconds(self) -> float:
        """All but the prefill."""
        return sum(self.seconds.values()) - self.seconds["prefill"]

    @property
    def tokens_per_step(self) -> float:
        """Tokens a target forward yields (tau), its own one included; 1 for plain decoding."""
        whole = self.whole_rounds
        return 1 + sum(r.accepted for r in whole) / len(whole) if whole else 1.0


class Stops:
    """Adds tokens one by one until a limit, a stop token or the repetition stop; the same for every method."""

    def __init__(self, generation: Generation, settings: Settings) -> None:
        self.of, self.settings = generation, settings
        self.seen: set[tuple[int, ...]] = set()
        self.run = 0
        self.done = False

    def add(self, tokens: Sequence[int]) -> None:
        of = self.of
        for token in tokens:
            if self.done:
                return
            of.tokens.append(token)
            gram = tuple(of.tokens[-GRAM:])
            again = len(gram) == GRAM and gram in self.seen
            self.seen.add(gram)
            of.repeated += again
            self.run = self.run + 1 if again else 0
            if token in self.settings.stop_tokens:
                of.stopped = "stop"
            elif self.settings.repeat_stop and self.run >= self.settings.repeat_stop:
                of.stopped = "repeat"
            elif len(of.tokens) < self.settings.max_new_tokens:
                continue
            self.done = True


def check(target: Target, prompt: Sequence[int], settings: Settings, drafter: Drafter | None = None) -> None:
    """Refuse, before any work, what cannot be decoded. Raises `UserError`."""
    if not len(prompt):
        raise UserError("the prompt is empty: give at least one token")
    if settings.temperature and not COLDEST <= settings.temperature < math.inf:
        raise UserError(f"temperature {settings.temperature}: 0 is greedy, from {COLDEST:g} on it samples")
    if not (settings.sharpen > 0 and settings.spread > 0):
        raise UserError(f"sharpen = {settings.sharpen}, spread = {settings.spread}: both are above 0")
    if not 0 <= settings.seed < 2**63 or settings.repeat_stop < 0:
        raise UserError(f"seed = {settings.seed}, repeat_stop = {settings.repeat_stop}: neither may be below 0")
    if settings.max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {settings.max_new_tokens}: ask for at least one token")
    need = len(prompt) + settings.max_new_tokens + settings.k
    if need > target.context:
        raise UserError(
            f"a prompt of {len(prompt)} tokens, {settings.max_new_tokens} new ones and a draft of {settings.k} need "
            f"{need} places, the target has {target.context}: shorten the prompt or max_new_tokens"
        )
    if max(prompt) >= target.vocab_size or min(prompt) < 0:
        raise UserError(f"the prompt holds a token outside the target's vocabulary of {target.vocab_size}")
    if settings.rule not in RULES:
        raise UserError(f"unknown rule {settings.rule!r}; {nearest(settings.rule, RULES)}")
    if settings.top_k < 0 or not 0 < settings.top_p <= 1:
        raise UserError(f"top_k = {settings.top_k}, top_p = {settings.top_p}: top_k is 0 or more, top_p in (0, 1]")
    if drafter is None:
        return
    if settings.rule == "block" and settings.tree != "chain":
        raise UserError(f"block verification is for chains, not {settings.tree} trees: choose coupled or rejection")
    wrong = "dynamic" if drafter.one_pass else "best_first"
    if settings.tree == wrong:
        cure = "best_first" if drafter.one_pass else "dynamic"
        raise UserError(f"{drafter.spec.kind} does not draft {wrong} trees: choose {cure}, static or chain")
    if settings.k < 1:
        raise UserError(f"k = {settings.k}: a draft has at least one token; use autoregressive for plain decoding")
    if settings.k > drafter.k:
        raise UserError(f"k = {settings.k}, but this drafter was trained for at most {drafter.k}: use a smaller k")
    if drafter.target is not target:
        raise UserError("the drafter belongs to another target: load it with drafters.load(folder, target)")


class _Clock:
    """Adds the time since the last call to a part of a round; synchronises with the GPU first."""

    def __init__(self, device: torch.device, seconds: dict[str, float]) -> None:
        self.cuda, self.seconds = device.type == "cuda", seconds
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def _forward(
    target: Target, tokens: Tensor, cache: KVCache, shape: Shape | None = None, taps: Sequence[int] = ()
) -> Tensor:
    """Feed tokens [r] after what the cache holds, in a row or as a tree with its root: features [1, r, H]."""
    held, r, mask = cache.length, len(tokens), None
    if shape is None:
        places = torch.arange(held, held + r, device=tokens.device)
        if r > 1:
            mask = torch.ones(r, held + r, dtype=torch.bool, device=tokens.device).tril(held)
    else:
        places = held + _depths(shape)
        mask = torch.cat([shape.mask.new_ones(r, held), shape.mask], 1)
    if mask is not None:
        mask = for_few(mask[None], target.shared, target.dtype)
    return target.features(tokens[None], places[None], mask, cache, taps)


def _depths(shape: Shape) -> Tensor:
    """Depth of the rows: the root's is 0."""
    return torch.cat([shape.depth.new_zeros(1), shape.depth])


class Sampler:
    """The rule of one generation: what the target chooses, what the drafter proposes, what is accepted.

    `coupled` shares the target's noise, which is keyed by position. The draws of `rejection` and `block` are keyed by
    the round (its first new position): they may look beyond what they accept.
    """

    def __init__(self, target: Target, settings: Settings) -> None:
        self.settings = settings
        self.rule = settings.rule if settings.temperature else "greedy"
        self.noise = Noise(settings.seed, target.vocab_size, target.dtype, target.device)
        self.start = 0  # position of slot 0 of the round

    def warp(self, logits: Tensor) -> Tensor:
        """logits / T, tokens outside top-k and top-p at -inf."""
        return warp(logits, self.settings.temperature, self.settings.top_k, self.settings.top_p)

    def worth(self, logits: Tensor, start: int, depth: Tensor | None = None) -> Tensor:
        """Scores whose arg max is the target's choice for the positions start + depth (0, 1, ... if None): [r, V]."""
        of = self.settings
        if of.temperature == 0:
            return logits
        noise = self.noise.rows(start, len(logits)) if depth is None else self.noise.rows(start, of.k + 1)[depth]
        return perturb(logits, of.temperature, noise, of.top_k, of.top_p)

    def choose(self, logits: Tensor, start: int, depth: Tensor | None = None) -> Tensor:
        """The target's choices: logits [r, V] -> tokens [r]."""
        return self.worth(logits, start, depth).argmax(-1)

    def propose(self, plan: Plan) -> Callable[[Tensor, slice], Candidates]:
        """The function that turns a drafter's logits [r, V] of some slots into candidates (see Drafter.draft)."""
        of, drawn = self.settings, self.rule in ("rejection", "block") and plan.kind != "dynamic"

        def candidates(logits: Tensor, slots: slice, pairs: Callable[[Tensor], Tensor] | None = None) -> Candidates:
            noise = None
            if self.rule == "greedy":
                worth = logits
            elif self.rule == "coupled":
                noise = self.noise.rows(self.start + slots.start, slots.stop - slots.start)
                worth = perturb(logits, of.temperature / of.sharpen, noise, of.top_k, of.top_p)
            else:
                worth = self.warp(logits)
            if drawn:
                # The shape may depend on q but not on the draws: ranks are worth the sorted q, tokens are drawn.
                q = worth.softmax(-1)
                noise = self.noise.drafts(self.start, plan.k)[..., slots, :]
                tokens = without_replacement(worth, noise, plan.width)
                return Candidates(tokens, q.topk(plan.width).values.log(), q)
            if plan.width == 1:
                first = worth.argmax(-1, keepdim=True)
                return Candidates(first, torch.zeros_like(first, dtype=self.noise.dtype), None)
            scale = {"greedy": of.sharpen, "coupled": 1 / of.spread}.get(self.rule, 1.0)
            worth = worth.to(self.noise.dtype) * scale
            values, tokens = best(worth, plan.width, pairs is None)
            if pairs is None:
                return Candidates(tokens, values - worth.logsumexp(-1, keepdim=True), None)
            after = warp(pairs(tokens), (of.temperature or 1.0) / of.sharpen).to(worth.dtype)
            if noise is not None:
                after = (after + noise.gather(-1, tokens)[..., None, :]) / of.spread
            # what lies outside the candidates stays there
            mass, whole = ((x - values.amax(-1, keepdim=True)).exp().sum(-1) for x in (values, worth))
            return Candidates(tokens, values, None, after.log_softmax(-1) + (mass / whole).log()[..., None, None])

        return candidates

    def verdict(self, tree: Tree, logits: Tensor, plan: Plan) -> Verdict:
        """What the target makes of a tree, from the logits of its rows [N + 1, V]."""
        shape, k = tree.shape, plan.k
        if self.rule in ("greedy", "coupled"):
            depth = None if plan.kind == "chain" else _depths(shape)
            return walk(tree.tokens, shape.parent, shape.mask, self.choose(logits, self.start, depth), k)
        p = self.warp(logits).softmax(-1)
        uniform, emit = self.noise.accepts(self.start, k, plan.siblings), self.noise.emit(self.start)
        if self.rule == "block":
            return block(tree.tokens, p, tree.q, uniform[:, 0], emit)
        return rejection(tree.tokens, shape.parent, p, tree.q, tree.draw, uniform, emit, k, plan.siblings)


@torch.inference_mode()
def autoregressive(target: Target, prompt: Sequence[int], settings: Settings) -> Generation:
    """Plain decoding, one target forward a token: the honest baseline. Raises `UserError` (see `check`).

    Above T = 0 it samples by the seed's noise, whatever the rule.
    """
    check(target, prompt, settings)
    result = Generation(list(prompt))
    stops, sampler = Stops(result, settings), Sampler(target, settings)
    clock = _Clock(target.device, result.seconds)
    cache = KVCache(target.layers, len(prompt) + settings.max_new_tokens)
    features = _forward(target, torch.tensor(prompt, device=target.device), cache)
    token = sampler.choose(target.logits(features[0, -1:]), len(prompt))
    stops.add(token.tolist())
    clock.lap("prefill")
    while not stops.done:
        features = _forward(target, token, cache)
        token = sampler.choose(target.logits(features[0]), cache.length)
        clock.lap("verify")
        stops.add(token.tolist())
        clock.lap("host")
    return result


@torch.inference_mode()
def speculative(target: Target, drafter: Drafter, prompt: Sequence[int], settings: Settings) -> Generation:
    """What plain decoding gives, several tokens a target forward.

    With `greedy` and `coupled` verification the same tokens as `autoregressive` with the same settings, with the other
    rules tokens of the same distribution. Raises `UserError` (see `check`).
    """
    check(target, prompt, settings, drafter)
    drafter.ready()
    result = Generation(list(prompt))
    stops, sampler = Stops(result, settings), Sampler(target, settings)
    plan = Plan(settings.tree, settings.k, settings.nodes, target.vocab_size, device=target.device, width=drafter.width)
    chain, propose = plan.kind == "chain", sampler.propose(plan)
    clock = _Clock(target.device, result.seconds)
    room = len(prompt) + settings.max_new_tokens + max(plan.nodes, plan.k) + 1
    cache = KVCache(target.layers, room)
    own = KVCache(max(1, drafter.spec.layers), room + drafter.k + plan.k * plan.beam)
    known = torch.tensor(prompt, device=target.device)
    taps = drafter.spec.taps
    features = _forward(target, known, cache, taps=taps)
    token = sampler.choose(target.logits(features[0, -1:]), len(prompt))
    if len(prompt) > 1:  # rows whose next token is in the prompt; the last one waits for the first round
        drafter.prefill(features[:, :-1], known[None, 1:], own)
    features, following = features[:, -1:], token[None]
    stops.add(token.tolist())
    clock.lap("prefill")
    while not stops.done:
        held = cache.length
        sampler.start = held + 1
        tree = drafter.draft(features, following, plan, propose, own)
        clock.lap("draft")
        fed = torch.cat([following[0, -1:], tree.tokens])
        features = _forward(target, fed, cache, None if chain else tree.shape, taps)
        path, count, token = sampler.verdict(tree, target.logits(features[0]), plan)
        accepted = int(count)
        clock.lap("verify")
        if chain:
            cache.crop(held + 1 + accepted)
        else:
            cache.commit(held, path, held + 1 + accepted)
        path = path[: accepted + 1]
        features, following = features[:, path], torch.cat([fed[path[1:]], token[None]])[None]
        clock.lap("commit")
        grown = {} if chain else {"parent": tree.shape.parent.tolist(), "path": path.tolist()}
        result.rounds.append(Round(len(result.tokens), tree.tokens.tolist(), accepted, **grown))
        stops.add(following[0].tolist())
        clock.lap("host")
    return result
