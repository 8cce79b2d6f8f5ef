"""Invariants 4, 5 and 6 of DESIGN through the real loop, for every drafter x tree x rule, and the bugs they must catch.

Equality: float64, token for token. Distribution: generations of four tokens from a known Markov chain, chi-square
against its exact law. Such a test calls a sound loop broken with probability ALARM (were its seeds not fixed); each
planted bug lies so far off that a run of fresh seeds catches it with a probability of 0.99 at least (`far_enough`).
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import toys
from transformers import Phi3Config

from psnb import decode, drafters, verify
from psnb.decode import Settings
from psnb.drafters.base import Drafter
from psnb.errors import UserError
from psnb.profile import DrafterSpec

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ALARM = 1e-6
DRAWS = 700


def shapes(drafter):
    """(tree, k, nodes) of every tree that a drafter can draft."""
    own = "best_first" if drafter.one_pass else "dynamic"
    return [("chain", 1, 0), ("chain", 4, 0), ("static", 4, 9), (own, 3, 8), (own, 4, 16)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", toys.KINDS)
def test_every_drafter_and_tree_gives_the_tokens_of_plain_decoding(kind, temperature):
    target = toys.target(torch.float64)
    drafter, accepted = toys.drafter(kind, target), 0
    for seed, (tree, k, nodes) in enumerate(shapes(drafter)):
        more = {"top_k": 20, "top_p": 0.9} if seed == 3 else {}
        settings = Settings(
            k=k, tree=tree, nodes=nodes, temperature=temperature, max_new_tokens=40, seed=seed, repeat_stop=0, **more
        )
        made = decode.speculative(target, drafter, PROMPT[seed:], settings)
        assert made.tokens == decode.autoregressive(target, PROMPT[seed:], settings).tokens
        accepted += sum(r.accepted for r in made.rounds)
    assert accepted or temperature == 0  # or nothing was tested


@pytest.mark.parametrize("kind", list(drafters.KINDS))
def test_rejected_nodes_leave_no_trace(kind, monkeypatch):
    """Items 3 and 4 of the cache: after each round both caches equal a fresh prefill of the same tokens (fp32)."""
    target = toys.target(torch.float32)
    drafter = toys.drafter(kind, target)
    seen = []
    draft, own = drafter.draft, []

    def spy(features, following, plan, choose, cache):
        made = draft(features, following, plan, choose, cache)
        own[:] = [cache, cache.length]
        return made

    forward = decode._forward

    def target_spy(of, tokens, cache, shape=None, taps=()):
        made = forward(of, tokens, cache, shape, taps)
        seen[:] = [cache]
        return made

    monkeypatch.setattr(drafter, "draft", spy)
    monkeypatch.setattr(decode, "_forward", target_spy)
    for tree, k, nodes in shapes(drafter):
        settings = Settings(k=k, tree=tree, nodes=nodes, max_new_tokens=30, seed=5, repeat_stop=0)
        made = decode.speculative(target, drafter, PROMPT, settings)
        text = torch.tensor(PROMPT + made.tokens)
        held = min(seen[0].length, len(text) - 1)  # the last round may have gone beyond what was asked for
        fresh = decode.KVCache(target.layers, 99)
        features = forward(target, text[:held], fresh)
        for layer, new in zip(seen[0].layers, fresh.layers, strict=True):
            for a, b in ((layer.keys, new.keys), (layer.values, new.values)):
                torch.testing.assert_close(a[:, :, :held], b[:, :, :held], rtol=1e-4, atol=1e-5)
        if kind == "medusa":
            continue  # has no cache
        cache, length = own[0], min(own[1], held)
        fresh = decode.KVCache(drafter.spec.layers, 99)
        drafter.prefill(features[:, :length], text[None, 1 : length + 1], fresh)
        assert length == fresh.length > len(PROMPT)
        for layer, new in zip(cache.layers, fresh.layers, strict=True):
            for a, b in ((layer.keys, new.keys), (layer.values, new.values)):
                torch.testing.assert_close(a[:, :, :length], b[:, :, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle-ps linked", "medusa-ps linked"])
def test_linked_trees_hang_together_where_few_candidates_hold_all(kind):
    """At a low temperature the candidates of a slot hold all its probability, up to rounding: float32 then has sums
    above 1."""
    target = toys.target(torch.float32)
    drafter, rounds = toys.drafter(kind, target), []
    for seed, temperature in itertools.product(range(3), (0.02, 0.1)):
        settings = Settings(temperature=temperature, max_new_tokens=30, seed=seed, repeat_stop=0)
        plain = decode.autoregressive(target, PROMPT, settings)
        made = decode.speculative(
            target, drafter, PROMPT, dataclasses.replace(settings, k=4, tree="best_first", nodes=12)
        )
        assert made.tokens == plain.tokens
        rounds += made.rounds
    assert len(rounds) > 100 and all(p <= i for one in rounds for i, p in enumerate(one.parent))


@pytest.mark.parametrize(("k", "nodes"), [(4, 1), (4, 2), (3, 2)])
def test_a_tree_of_fewer_nodes_than_it_may_be_deep(k, nodes):
    target = toys.target(torch.float64)
    settings = Settings(k=k, tree="best_first", nodes=nodes, max_new_tokens=9, seed=1, repeat_stop=0)
    made = decode.speculative(target, toys.drafter("eagle-ps", target), PROMPT, settings)
    assert made.tokens == decode.autoregressive(target, PROMPT, settings).tokens


def test_rope_that_changes_with_the_length_is_used_up_to_there():
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    target = toys.target(torch.float64, cls=Phi3Config, rope_parameters=rope, original_max_position_embeddings=32)
    assert target.context == 32
    drafter = toys.drafter("eagle-ps", target)
    settings = Settings(k=4, temperature=0.0, max_new_tokens=20, repeat_stop=0)
    with pytest.raises(UserError, match="need .* places, the target has 32"):
        decode.speculative(target, drafter, PROMPT * 2, settings)
    made = decode.speculative(target, drafter, PROMPT, settings)
    assert made.tokens == decode.autoregressive(target, PROMPT, settings).tokens


# --- distributions --------------------------------------------------------------------------------------------------


class Markov:
    """A target whose next token depends on the last one alone, by a table of logits [V, V]."""

    device, dtype, layers, context, hidden_size, shared = torch.device("cpu"), torch.float32, 1, 10**6, 3, 1

    def __init__(self, table):
        self.table, self.vocab_size = table, len(table)

    def features(self, ids, place, mask, cache, taps=()):
        row = torch.zeros(1, 1, ids.shape[1], 1)
        cache.update(row, row, 0)
        return self.table[ids]

    def logits(self, features):
        return features


class Slots(Drafter):
    """Independent slots from a table [k, V, V] that the last known token selects: a one-pass drafter."""

    def __init__(self, target, table):
        super().__init__(DrafterSpec(kind="medusa", k=len(table)), target)
        self.table = table

    def marginals(self, features, next_ids, k, cache, valid=None):
        return self.table[:k, next_ids[0, -1]]


class Chained(Drafter):
    """Each slot sees the one before: `eagle`'s loops over a table [V, V]."""

    one_pass = False
    draft, _fill, _grow = drafters.Eagle.draft, drafters.Eagle._fill, drafters.Eagle._grow
    branch, prune = staticmethod(drafters.Eagle.branch), staticmethod(drafters.Eagle.prune)

    def __init__(self, target, table):
        super().__init__(DrafterSpec(kind="eagle", k=3), target)
        self.table = table
        self.body = self

    def fuse(self, features, next_ids):
        return self.table[next_ids]

    def extend(self, hidden, cache, seen=None, ahead=0):
        row = torch.zeros(1, 1, hidden.shape[1], 1)
        cache.update(row, row, 0)
        return hidden

    def logits(self, hidden, slot):
        return hidden

    def prefill(self, features, next_ids, cache):
        self.extend(features, cache)


def markov():
    random = torch.Generator().manual_seed(4)
    target = Markov(torch.randn(3, 3, generator=random) * 1.2)
    one_pass = Slots(target, torch.randn(3, 3, 3, generator=random))
    return target, one_pass, Chained(target, target.table * 0.3 + torch.randn(3, 3, generator=random))


def law(table, temperature, top_k):
    """Exact probabilities of the four tokens after token 0: [81], by multiplying out."""
    p = np.array([[float(x) for x in row] for row in table], float) / temperature
    p = np.exp(p)
    for row in p:
        if top_k:
            row[np.argsort(-row)[top_k:]] = 0
        row /= row.sum()
    paths = itertools.product(range(3), repeat=4)
    return np.array([np.prod([p[a, b] for a, b in itertools.pairwise((0, *path))]) for path in paths])


def counts(target, drafter, draws=DRAWS, **settings):
    found = np.zeros(81)
    for seed in range(draws):
        one = Settings(max_new_tokens=4, seed=seed, repeat_stop=0, **settings)
        made = decode.speculative(target, drafter, [0], one)
        found[int("".join(map(str, made.tokens)), 3)] += 1
    return found


def statistic(found, expected):
    """Chi-square and its degrees of freedom, cells of expectation below 5 joined; infinite for the impossible."""
    if found[expected == 0].sum():
        return np.inf, 1
    expected = expected * found.sum()
    small = expected < 5
    a = np.append(found[~small], found[small].sum())
    b = np.append(expected[~small], expected[small].sum())
    a, b = (a, b) if b[-1] else (a[:-1], b[:-1])
    return ((a - b) ** 2 / b).sum(), len(a) - 1


def tail(value, freedom):
    """P(chi-square with that freedom > value)."""
    return torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(value / 2.0).double()).item()


def far_enough(value, freedom):
    """A fresh run of the same bug is caught with probability 0.99: noncentral chi-square, normal approximation."""
    critical = next(x for x in range(10_000) if tail(x, freedom) < ALARM)
    off = max(0.0, value - freedom)
    return freedom + off - 2.33 * (2 * (freedom + 2 * off)) ** 0.5 > critical


RULES = [
    ("slots", "chain", 3, 0, "rejection", 0),
    ("slots", "chain", 3, 0, "block", 0),
    ("slots", "static", 3, 8, "rejection", 0),
    ("slots", "best_first", 3, 8, "rejection", 2),
    ("slots", "best_first", 3, 8, "coupled", 0),
    ("chained", "chain", 3, 0, "block", 0),
    ("chained", "static", 3, 8, "rejection", 0),
    ("chained", "dynamic", 3, 8, "rejection", 0),
]


@pytest.mark.parametrize(("who", "tree", "k", "nodes", "rule", "top_k"), RULES)
def test_every_rule_follows_the_distribution(who, tree, k, nodes, rule, top_k):
    target, slots, chained = markov()
    settings = {"k": k, "tree": tree, "nodes": nodes, "rule": rule, "temperature": 0.8, "top_k": top_k}
    found = counts(target, slots if who == "slots" else chained, **settings)
    assert tail(*statistic(found, law(target.table, 0.8, top_k))) > ALARM


def biased_residual(verdict):
    """Emits from p where the residual is due."""
    return lambda tokens, parent, p, q, draw, uniform, emit, *more: verdict(
        tokens, parent, p, q, draw, uniform, emit, *more
    )._replace(token=(p[verdict(tokens, parent, p, q, draw, uniform, emit, *more).path[-1]].log() + emit).argmax())


def always_first(verdict):
    """Accepts a draw whenever the target could have made it."""
    return lambda tokens, parent, p, q, draw, uniform, *more: verdict(tokens, parent, p, q, draw, uniform * 0.5, *more)


def dropped_root(verdict):
    """Every node is judged by the row after its own parent."""
    return lambda tokens, parent, p, *more: verdict(tokens, parent, p.roll(-1, 0), *more)


def wrong_slot(verdict):
    """The drafter's distribution of the next slot."""
    return lambda tokens, parent, p, q, *more: verdict(tokens, parent, p, q.roll(1, 0), *more)


@pytest.mark.parametrize("bug", [biased_residual, always_first, dropped_root, wrong_slot])
def test_planted_bugs_are_caught(bug, monkeypatch):
    target, slots, _ = markov()
    monkeypatch.setattr(decode, "rejection", bug(verify.rejection))
    found = counts(target, slots, draws=1200, k=3, rule="rejection", temperature=0.8)
    value, freedom = statistic(found, law(target.table, 0.8, 0))
    assert tail(value, freedom) < ALARM and far_enough(value, freedom)


def test_reused_noise_is_caught(monkeypatch):
    """Every round emits with the noise of the first."""
    target, slots, _ = markov()
    emit = verify.Noise.emit
    monkeypatch.setattr(verify.Noise, "emit", lambda self, start: emit(self, 0))
    found = counts(target, slots, draws=1200, k=3, rule="rejection", temperature=0.8)
    value, freedom = statistic(found, law(target.table, 0.8, 0))
    assert tail(value, freedom) < ALARM and far_enough(value, freedom)


@pytest.mark.parametrize("bug", ["position", "root"])
def test_coupled_bugs_are_caught_by_equality(bug, monkeypatch):
    """Noise of the position after, or a draft's first token left out of the verification."""
    target = toys.target(torch.float64)
    drafter = toys.drafter("eagle-ps", target)
    if bug == "position":
        rows = verify.Noise.rows
        monkeypatch.setattr(verify.Noise, "rows", lambda self, start, count: rows(self, start + (count > 1), count))
    else:
        walk = verify.walk
        monkeypatch.setattr(
            decode,
            "walk",
            lambda tokens, parent, mask, chosen, k: walk(tokens, parent, mask, chosen.roll(1), k),
        )
    settings = Settings(k=4, tree="best_first", nodes=8, temperature=0.7, max_new_tokens=40, seed=1, repeat_stop=0)
    made = decode.speculative(target, drafter, PROMPT, settings).tokens
    monkeypatch.undo()
    assert made != decode.autoregressive(target, PROMPT, settings).tokens
