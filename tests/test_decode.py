"""Invariants 4, 5 and 7 for chains: the same tokens as plain decoding, whatever the drafter; bad input refused."""

import dataclasses

import numpy as np
import pytest
import torch
import toys
from transformers import MistralConfig, Qwen2Config

from psnb import decode, drafters, measure, verify
from psnb.cache import KVCache
from psnb.decode import Generation, Settings, Stops
from psnb.drafters.base import Drafter
from psnb.errors import UserError
from psnb.tree import Plan, Tree

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def naive(target, prompt, settings):
    """Plain decoding without a cache, noise row by row: slow and obviously right."""
    from psnb.verify import gumbel

    tokens = list(prompt)
    for _ in range(settings.max_new_tokens):
        logits = target.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        if settings.temperature:
            noise = gumbel(settings.seed, torch.tensor([len(tokens)]), target.vocab_size, logits.dtype)[0]
            logits = logits / settings.temperature + noise
        tokens.append(int(logits.argmax()))
        if tokens[-1] in settings.stop_tokens:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_plain_decoding_equals_the_naive_loop(temperature):
    target = toys.target(torch.float64)
    settings = Settings(
        temperature=temperature, max_new_tokens=40, seed=5, repeat_stop=0, stop_tokens=(toys.VOCAB - 1,)
    )
    assert decode.autoregressive(target, PROMPT, settings).tokens == naive(target, PROMPT, settings)


class Oracle(Drafter):
    """Drafts a given continuation: every token right, or right until `wrong_at`."""

    def __init__(self, spec, target, tokens, wrong_at=10**9):
        super().__init__(spec, target)
        self.tokens, self.wrong_at, self.at = tokens, wrong_at, 0

    def draft(self, features, next_ids, plan, choose, cache):
        self.at += next_ids.shape[1]  # what was accepted since the last draft, and the target's own token
        ids = self.tokens[self.at : self.at + plan.k]
        ids = [t if i < self.wrong_at else (t + 1) % toys.VOCAB for i, t in enumerate(ids)]
        tokens = torch.tensor(ids + [toys.VOCAB - 1] * (plan.k - len(ids)))
        return Tree(tokens, plan.shape, None, plan.shape.depth - 1)


TREE = {"temperature": 0.0, "tree": "best_first", "nodes": 6}


@pytest.mark.parametrize(("sharpen", "shape"), [(0.3, {}), (1.0, {}), (4.0, {}), (100.0, TREE)])
def test_sharpening_changes_drafts_but_not_the_text(sharpen, shape):
    target = toys.target(torch.float64)
    drafter = toys.drafter("eagle-ps", target)
    settings = Settings(**{"k": 4, "temperature": 0.7, "max_new_tokens": 30, "seed": 4, "repeat_stop": 0, **shape})
    base = decode.speculative(target, drafter, PROMPT, dataclasses.replace(settings, sharpen=1.5))
    made = decode.speculative(target, drafter, PROMPT, dataclasses.replace(settings, sharpen=sharpen))
    assert made.tokens == base.tokens == decode.autoregressive(target, PROMPT, settings).tokens
    assert [r.drafted for r in made.rounds] != [r.drafted for r in base.rounds]


@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_acceptance_is_counted_exactly(right):
    target = toys.target(torch.float64)
    settings = Settings(k=4, temperature=0.7, max_new_tokens=36, seed=1, repeat_stop=0)
    plain = decode.autoregressive(target, PROMPT, settings)
    oracle = Oracle(toys.drafter("medusa", target).spec, target, plain.tokens, wrong_at=right)
    made = decode.speculative(target, oracle, PROMPT, settings)
    assert made.tokens == plain.tokens
    whole = made.whole_rounds
    assert whole and all(r.accepted == right for r in whole)
    assert made.tokens_per_step == 1 + right
    assert [r.start for r in made.rounds][:3] == [1, 2 + right, 3 + 2 * right]
    assert len(made.rounds) == -(-35 // (1 + right))  # the first of 36 tokens comes from the prefill


def test_noise_is_a_function_of_seed_position_and_token():
    from psnb.verify import Noise, gumbel

    rows = gumbel(7, torch.arange(40), 50)
    torch.testing.assert_close(gumbel(7, torch.tensor([31, 2]), 50), rows[[31, 2]])
    noise = Noise(7, 50, torch.float32, torch.device("cpu"))
    for start, count in ((0, 3), (2, 5), (14, 6), (30, 2), (1, 1)):
        torch.testing.assert_close(noise.rows(start, count), rows[start : start + count])
    assert not torch.equal(gumbel(8, torch.arange(40), 50), rows)
    assert not torch.equal(gumbel(7 + (1 << 40), torch.arange(40), 50), rows)


def test_noise_has_gumbel_moments_and_no_correlation():
    from psnb.verify import gumbel

    rows = gumbel(11, torch.arange(300), 1000, torch.float64)
    assert rows.mean().item() == pytest.approx(0.57722, abs=0.01)  # Euler's constant; standard error 0.0023
    assert rows.var().item() == pytest.approx(1.64493, abs=0.03)  # pi^2 / 6
    assert len(rows.unique()) > 0.999 * rows.numel()
    centred = (rows - rows.mean()) / rows.std()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[1:, 1:] * centred[:-1, :-1]):
        assert abs(shifted.mean().item()) < 0.01
    other = gumbel(12, torch.arange(300), 1000, torch.float64)
    assert abs((centred * (other - other.mean())).mean().item()) < 0.01


@pytest.mark.parametrize("config", [Qwen2Config, MistralConfig])
def test_other_architectures_decode_the_same(config):
    target = toys.target(torch.float64, cls=config)
    drafter = toys.drafter("eagle-ps", target)
    settings = Settings(k=3, temperature=0.7, max_new_tokens=24, seed=2, repeat_stop=0)
    plain = decode.autoregressive(target, PROMPT, settings)
    assert plain.tokens == naive(target, PROMPT, settings)
    assert decode.speculative(target, drafter, PROMPT, settings).tokens == plain.tokens


def test_stops_cut_every_method_at_the_same_token():
    target = toys.target(torch.float64)
    free = decode.autoregressive(target, PROMPT, Settings(temperature=0.7, max_new_tokens=30, repeat_stop=0))
    stop = free.tokens[11]
    settings = Settings(k=4, temperature=0.7, max_new_tokens=30, repeat_stop=0, stop_tokens=(stop,))
    expected = free.tokens[: free.tokens.index(stop) + 1]
    for kind in drafters.KINDS:
        made = decode.speculative(target, toys.drafter(kind, target), PROMPT, settings)
        assert made.tokens == expected and made.stopped == "stop"
    assert measure.hf_generate(target, PROMPT, Settings(temperature=0, max_new_tokens=9)).tokens == naive(
        target, PROMPT, Settings(temperature=0, max_new_tokens=9)
    )


def test_generate_is_plain_whatever_the_checkpoint_would_have():
    target, settings = toys.target(), Settings(temperature=0.0, max_new_tokens=20, repeat_stop=0)
    target.model.generation_config.repetition_penalty = 3.0
    target.model.generation_config.no_repeat_ngram_size = 1
    assert measure.hf_generate(target, PROMPT, settings).tokens == naive(target, PROMPT, settings)
    assert target.model.generation_config.repetition_penalty == 3.0


def test_the_repetition_stop_fires_after_repeated_8_grams():
    generation = Generation([1])
    stops = Stops(generation, Settings(max_new_tokens=100, repeat_stop=4))
    stops.add(list(range(10)))
    stops.add(list(range(10)))  # tokens 17.. end an 8-gram seen before
    assert generation.stopped == "length" and generation.repeated == 3
    stops.add([0, 1, 2])  # 9 0 and so on are repeats too: the fourth stops
    assert generation.stopped == "repeat" and len(generation.tokens) == 21


def test_the_round_that_the_limit_cuts_counts_whole():
    """Rounds of 1 to 4 tokens in turn until 10: to leave the cut one out would shorten them; after an end it goes."""
    rounds = [decode.Round(start, [7] * 3, accepted) for start, accepted in ((1, 2), (4, 3), (8, 3))]
    made = Generation([1], list(range(10)), rounds)
    assert made.whole_rounds == rounds and made.tokens_per_step == pytest.approx(1 + 8 / 3)
    made.stopped = "repeat"
    assert made.whole_rounds == rounds
    made.stopped = "stop"
    assert made.whole_rounds == rounds[:2] and made.tokens_per_step == pytest.approx(1 + 5 / 2)
    lengths = np.random.default_rng(0).integers(1, 5, (4000, 12))  # of rounds, 2.5 tokens on average
    counts = (lengths.cumsum(1) < 10).sum(1) + 1  # those that begin before the tenth token
    given = sum(row[:n].sum() for row, n in zip(lengths, counts, strict=True))
    assert given / counts.sum() == pytest.approx(2.5, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "prompt", "message"),
    [
        ({"k": 0}, PROMPT, "k = 0"),
        ({"k": toys.K + 1}, PROMPT, "trained for at most 4"),
        ({}, [], "prompt is empty"),
        ({}, [1] * 250, "shorten the prompt"),
        ({"max_new_tokens": 0}, PROMPT, "at least one token"),
        ({"temperature": -1.0}, PROMPT, "temperature -1.0: 0 is greedy"),
        ({"temperature": float("nan")}, PROMPT, "temperature nan"),
        ({"temperature": 1e-39}, PROMPT, "temperature 1e-39: 0 is greedy, from 1e-06 on"),
        ({"spread": 0.0}, PROMPT, "spread = 0.0: both are above 0"),
        ({"seed": -1}, PROMPT, "seed = -1"),
        ({"repeat_stop": -1}, PROMPT, "repeat_stop = -1"),
        ({}, [1, 99], "outside the target's vocabulary"),
    ],
)
def test_what_cannot_be_decoded_is_refused(changes, prompt, message):
    target = toys.target()
    with pytest.raises(UserError, match=message):
        decode.speculative(target, toys.drafter("eagle-ps", target), prompt, Settings(**{"k": 2, **changes}))


def test_a_drafter_of_another_target_is_refused():
    drafter = toys.drafter("eagle-ps", toys.target())
    with pytest.raises(UserError, match="another target"):
        decode.speculative(toys.target(seed=3), drafter, PROMPT, Settings(k=2))


def test_the_cache_refuses_to_overflow_and_crops():
    target = toys.target()
    cache = KVCache(target.layers, 6)
    ids = torch.tensor(PROMPT)
    full = decode._forward(target, ids[:6], cache)
    cache.crop(3)
    again = decode._forward(target, ids[3:6], cache)
    torch.testing.assert_close(again, full[:, 3:], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="holds 6 tokens"):
        decode._forward(target, ids[:1], cache)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_linked_candidates_share_what_their_slot_gives_them(temperature):
    """After each token before, a slot's candidates have in sum what they have of the slot's whole vocabulary."""
    target, generator = toys.target(), torch.Generator().manual_seed(0)
    of = Settings(k=3, tree="best_first", nodes=5, temperature=temperature, seed=7)
    logits = torch.randn(3, toys.VOCAB, generator=generator)
    pairs, sampler = torch.randn(3, 5, 5, generator=generator), decode.Sampler(target, of)
    found = sampler.propose(Plan("best_first", 3, 5, toys.VOCAB, width=5))(logits, slice(0, 3), lambda tokens: pairs)
    worth = logits * of.sharpen
    if temperature:
        worth = (worth / temperature + verify.gumbel(7, torch.arange(3), toys.VOCAB)) / of.spread
    chosen = zip(worth.softmax(-1), found.tokens, strict=True)
    share = [sum(row[token].item() for token in tokens) for row, tokens in chosen]
    assert max(share) < 0.95
    torch.testing.assert_close(found.pairs.exp().sum(-1), torch.tensor(share)[:, None].expand(3, 5))
