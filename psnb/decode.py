"""Decoding: `autoregressive` and `speculative` are siblings with one interface and one result.

One round of `speculative` is draft -> verify -> commit. Positions: x_0 .. x_{L-1} are known, the target's cache holds
x_0 .. x_{L-2}; a round feeds x_{L-1} and the k drafted tokens, so row j of its logits chooses x_{L+j}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psnb.cache import KVCache
from psnb.drafters import Drafter
from psnb.errors import UserError
from psnb.target import Target
from psnb.verify import Noise, follow, perturb

GRAM = 8  # tokens of a repeat
PARTS = ("prefill", "draft", "verify", "commit", "host")


@dataclass(frozen=True)
class Settings:
    """What to generate. `temperature` 0 is greedy; above 0 sampling is `coupled` to the seed's noise."""

    k: int = 5
    temperature: float = 0.7
    sharpen: float = 1.5  # scale of the drafter's logits beside the shared noise; changes acceptance, never the text
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
        """Rounds that no limit cut: those that acceptance is counted over."""
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
    if settings.temperature < 0:
        raise UserError(f"temperature {settings.temperature} is negative: 0 is greedy, above 0 samples")
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
    if drafter is None:
        return
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


def _forward(target: Target, tokens: Tensor, cache: KVCache) -> Tensor:
    """Feed tokens [r] after what the cache holds: features [1, r, H]."""
    held, r = cache.length, len(tokens)
    places = torch.arange(held, held + r, device=tokens.device)[None]
    mask = torch.ones(1, 1, r, held + r, dtype=torch.bool, device=tokens.device).tril(held)
    return target.features(tokens[None], places, mask, cache)


def _prefill(
    target: Target, prompt: Sequence[int], settings: Settings, noise: Noise | None, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Features of the prompt [1, P, H] and the first new token [1]."""
    features = _forward(target, torch.tensor(prompt, device=target.device), cache)
    return features, _choose(target.logits(features[0, -1:]), len(prompt), settings, noise)


def _choose(logits: Tensor, start: int, settings: Settings, noise: Noise | None) -> Tensor:
    """The choices for the positions start, start + 1, ...: logits [r, V] -> tokens [r]."""
    rows = noise.rows(start, len(logits)) if noise else None
    return perturb(logits, settings.temperature, rows).argmax(-1)


def _draft_choice(logits: Tensor, start: int, settings: Settings, noise: Noise | None) -> Tensor:
    """The drafter's guesses at the target's choices, with the noise that the target will use.

    A draft is worth Pr[v is the target's choice | q, G], not q(v). The target's own distribution is sharper than the
    drafter's estimate of it, so the estimate counts for more beside the noise (`sharpen`; DESIGN section 3).
    """
    return _choose(logits * settings.sharpen, start, settings, noise)


def _noise(target: Target, settings: Settings) -> Noise | None:
    if settings.temperature == 0:
        return None
    return Noise(settings.seed, target.vocab_size, target.dtype, target.device)


@torch.inference_mode()
def autoregressive(target: Target, prompt: Sequence[int], settings: Settings) -> Generation:
    """Plain decoding, one target forward a token: the honest baseline. Raises `UserError` (see `check`)."""
    check(target, prompt, settings)
    result = Generation(list(prompt))
    stops, noise = Stops(result, settings), _noise(target, settings)
    clock = _Clock(target.device, result.seconds)
    cache = KVCache(target.layers, len(prompt) + settings.max_new_tokens)
    _, token = _prefill(target, prompt, settings, noise, cache)
    stops.add(token.tolist())
    clock.lap("prefill")
    while not stops.done:
        features = _forward(target, token, cache)
        token = _choose(target.logits(features[0]), cache.length, settings, noise)
        clock.lap("verify")
        stops.add(token.tolist())
        clock.lap("host")
    return result


@torch.inference_mode()
def speculative(target: Target, drafter: Drafter, prompt: Sequence[int], settings: Settings) -> Generation:
    """The same tokens as `autoregressive` with the same settings, several a target forward.

    Raises `UserError` (see `check`).
    """
    check(target, prompt, settings, drafter)
    k = settings.k
    result = Generation(list(prompt))
    stops, noise = Stops(result, settings), _noise(target, settings)
    clock = _Clock(target.device, result.seconds)
    room = len(prompt) + settings.max_new_tokens + k + 1
    cache, own = KVCache(target.layers, room), KVCache(max(1, drafter.spec.layers), room)
    features, token = _prefill(target, prompt, settings, noise, cache)
    known = torch.tensor(prompt, device=target.device)[None]
    if len(prompt) > 1:  # rows whose next token is in the prompt; the last one waits for the first round
        drafter.prefill(features[:, :-1], known[:, 1:], own)
    features, following = features[:, -1:], token[None]
    stops.add(token.tolist())
    clock.lap("prefill")
    while not stops.done:
        start = cache.length + 1  # position of slot 0
        drafted = drafter.draft(
            features,
            following,
            k,
            lambda logits, slot, at=start: _draft_choice(logits, at + slot, settings, noise),
            own,
        )
        clock.lap("draft")
        fed = torch.cat([following[0, -1:], drafted])
        features = _forward(target, fed, cache)
        chosen = _choose(target.logits(features[0]), start, settings, noise)
        accepted = int(follow(drafted, chosen))
        clock.lap("verify")
        cache.crop(start + accepted)
        features, following = features[:, : accepted + 1], chosen[None, : accepted + 1]
        clock.lap("commit")
        result.rounds.append(Round(len(result.tokens), drafted.tolist(), accepted))
        stops.add(chosen[: accepted + 1].tolist())
        clock.lap("host")
    return result
