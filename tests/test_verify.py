"""Verification against slow references on random trees, and against the law that it must keep.

The laws: one round on a toy target whose every distribution is known, continued by plain sampling, gives three tokens;
their counts over many rounds are compared with p by chi-square. A right verifier fails a test with probability ALARM.
With 200,000 rounds and 64 cells a law q with sum (q - p)^2 / p >= 0.001 passes with probability below 1e-4 (a
non-central chi-square); the planted bugs have to be caught with a quarter of the rounds.
"""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psnb import verify

ALARM = 1e-6
trees = settings(max_examples=2000, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**40)


# --- slow references ------------------------------------------------------------------------------------------------


def simplex(rng, vocab):
    """Exact probabilities, some of them 0."""
    weights = [rng.choice([0, 1, 1, 2, 3, 7]) for _ in range(vocab)]
    weights[rng.randrange(vocab)] += 1
    return [Fraction(w, sum(weights)) for w in weights]


def ordinary(parent):
    """Depth of every row, and the most siblings: [-, 0, 0, 1] of parents is [0, 1, 1, 2], 2."""
    levels = [0]
    for above in parent:
        levels.append(levels[above] + 1)
    return levels, max(parent.count(row) for row in parent)


def random_tree(rng, vocab):
    """tokens, parent: parents first, siblings different."""
    tokens, parent = [], []
    for row in range(rng.randint(1, 12)):
        above = rng.choice([a for a in range(row + 1) if parent.count(a) < vocab])
        used = [t for t, a in zip(tokens, parent, strict=True) if a == above]
        tokens.append(rng.choice([t for t in range(vocab) if t not in used]))
        parent.append(above)
    return tokens, parent


def ancestors(parent):
    """The mask, one row at a time: a row sees what its parent sees, and itself."""
    mask = torch.eye(len(parent) + 1, dtype=torch.bool)
    for node, above in enumerate(parent):
        mask[node + 1] |= mask[above]
    return mask


def padded(path, depth):
    return path + [path[-1]] * (depth + 1 - len(path))


def float64(rows):
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def sample_by_hand(weights, emit):
    return max((math.log(w) + e, x) for x, (w, e) in enumerate(zip(weights, emit, strict=True)) if w)[1]


def walk_by_hand(tokens, parent, chosen):
    path = [0]
    while True:
        children = [i + 1 for i, above in enumerate(parent) if above == path[-1]]
        right = [row for row in children if tokens[row - 1] == chosen[path[-1]]]
        if not right:
            return path, chosen[path[-1]]
        path += right


def normalised_by_hand(weights):
    return [w / sum(weights) for w in weights] if sum(weights) else None


def rejection_by_hand(tokens, parent, p, q, draw, uniform, emit):
    path = [0]
    while True:
        left = list(p[path[-1]])
        children = [i for i, above in enumerate(parent) if above == path[-1]]
        guess = list(q[draw[children[0]]]) if q and children else None
        for r, node in enumerate(children):
            x = tokens[node]
            proposal = guess if q else [Fraction(t == x) for t in range(len(left))]
            if not proposal or not proposal[x]:
                continue
            if Fraction(uniform[len(path) - 1][r]) < min(1, left[x] / proposal[x]):
                path.append(node + 1)
                break
            left = normalised_by_hand([max(0, a - b) for a, b in zip(left, proposal, strict=True)])
            if q:
                guess = normalised_by_hand([0 if t == x else b for t, b in enumerate(guess)])
        else:
            return path, sample_by_hand(left, emit)


def block_by_hand(tokens, p, q, uniform, emit):
    k, tau, weight, left = len(tokens), 0, Fraction(1), [max(0, a - b) for a, b in zip(p[0], q[0], strict=True)]
    for i in range(1, k + 1):
        x = tokens[i - 1]
        weight = min(weight * p[i - 1][x] / q[i - 1][x], 1)
        rest = [max(0, weight * a - b) for a, b in zip(p[i], q[i], strict=True)] if i < k else p[k]
        total = sum(rest)
        holds = weight if i == k else total / (total + 1 - weight) if total + 1 - weight else Fraction(1)
        if uniform[i - 1] <= holds:
            tau, left = i, rest
    return tau, sample_by_hand(left if sum(left) else p[tau], emit)


@trees
@given(seeds)
def test_walk_equals_the_reference(seed):
    rng = random.Random(seed)
    tokens, parent = random_tree(rng, vocab=4)
    chosen = [rng.randrange(4) for _ in range(len(tokens) + 1)]
    levels, _ = ordinary(parent)
    path, token = walk_by_hand(tokens, parent, chosen)
    made = verify.walk(*map(torch.tensor, (tokens, parent)), ancestors(parent), torch.tensor(chosen), max(levels))
    assert made.path.tolist() == padded(path, max(levels))
    assert (made.count, made.token) == (len(path) - 1, token)


@pytest.mark.parametrize("drawn", [True, False])
def test_rejection_equals_the_reference(drawn):
    seen = set()

    @trees
    @given(seeds)
    def check(seed):
        rng = random.Random(seed)
        vocab = rng.randint(3, 6)
        tokens, parent = random_tree(rng, vocab)
        levels, width = ordinary(parent)
        p = [simplex(rng, vocab) for _ in range(len(tokens) + 1)]
        q = [simplex(rng, vocab) if rng.random() < 0.8 else p[0] for _ in range(max(parent) + 1)] if drawn else None
        uniform = [[rng.random() ** 2 for _ in range(width)] for _ in range(max(levels))]
        emit = [-math.log(-math.log(rng.random())) for _ in range(vocab)]
        path, token = rejection_by_hand(tokens, parent, p, q, parent, uniform, emit)
        made = verify.rejection(
            torch.tensor(tokens),
            torch.tensor(parent),
            float64(p),
            float64(q) if drawn else None,
            torch.tensor(parent) if drawn else None,
            float64(uniform),
            torch.tensor(emit, dtype=torch.float64),
            max(levels),
            width,
        )
        assert made.path.tolist() == padded(path, max(levels))
        assert (made.count, made.token) == (len(path) - 1, token)
        seen.add(len(path) - 1)

    check()
    assert seen >= {0, 1, 2, 3}


@trees
@given(seeds)
def test_block_equals_the_reference(seed):
    rng = random.Random(seed)
    vocab, k = rng.randint(2, 5), rng.randint(1, 6)
    p, q = [simplex(rng, vocab) for _ in range(k + 1)], [simplex(rng, vocab) for _ in range(k)]
    for i in range(k):
        if rng.random() < 0.3:
            q[i] = p[i]  # nothing is left where both agree
    tokens = [rng.choice([x for x in range(vocab) if row[x]]) for row in q]
    uniform = [rng.random() for _ in range(k)]
    emit = [-math.log(-math.log(rng.random())) for _ in range(vocab)]
    tau, token = block_by_hand(tokens, p, q, uniform, emit)
    made = verify.block(torch.tensor(tokens), float64(p), float64(q), *map(torch.tensor, (uniform, emit)))
    assert made.path.tolist() == [min(d, tau) for d in range(k + 1)]
    assert (made.count, made.token) == (tau, token)


@trees
@given(seeds)
def test_warp_equals_the_reference(seed):
    rng = random.Random(seed)
    logits = [rng.choice([rng.gauss(0, 3), 1.0, 2.0]) for _ in range(8)]  # with equals at the border
    temperature, top_k, top_p = (
        rng.choice([0.3, 1.0, 2.0]),
        rng.choice([0, 1, 3, 5, 20]),
        rng.choice([0.0, 0.5, 0.9, 1]),
    )
    best = sorted((x / temperature for x in logits), reverse=True)[: top_k or None]
    mass, kept = 0.0, 0
    while kept < len(best) and (kept == 0 or mass < top_p or top_p == 1):
        mass += math.exp(best[kept]) / sum(math.exp(x) for x in best)
        kept += 1
    expected = [x / temperature if x / temperature >= best[kept - 1] else -math.inf for x in logits]
    given = torch.tensor(logits, dtype=torch.float64)
    made = verify.warp(given, temperature, top_k, top_p)
    assert made.tolist() == pytest.approx(expected)
    order = torch.tensor(rng.sample(range(8), 8))
    assert torch.equal(verify.warp(given[order].expand(2, 8), temperature, top_k, top_p)[1], made[order])


def test_the_docstrings_examples():
    tokens, parent = torch.tensor([5, 7, 9]), torch.tensor([0, 0, 1])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    assert torch.equal(mask, ancestors([0, 0, 1]))
    for chosen, path, count, token in (([5, 9, 1, 4], [0, 1, 3], 2, 4), ([7, 9, 1, 4], [0, 2, 2], 1, 1)):
        made = verify.walk(tokens, parent, mask, torch.tensor(chosen), 2)
        assert (made.path.tolist(), made.count, made.token) == (path, count, token)
    kept = verify.warp(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), 1.0, top_k=3, top_p=0.7)
    assert kept.isfinite().tolist() == [True, True, False, False]
    p, q, emit = torch.tensor([[0.5, 0.5]] * 2), torch.tensor([[0.8, 0.2]]), torch.tensor([9.0, 0.0])
    zero = torch.tensor([0])
    for u, count in ((0.62, 1), (0.63, 0)):
        u = torch.tensor([[u]])
        for made in (verify.rejection(zero, zero, p, q, zero, u, emit, 1, 1), verify.block(zero, p, q, u[0], emit)):
            assert (made.count, made.token) == (count, 1 - count)  # the noise wants 0, the residual holds 1 alone


def test_agreement_is_always_accepted_and_rounding_leaves_a_token():
    """p == q in bfloat16 and float32: everything is accepted, and where rounding rejects, p is emitted from."""
    p = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tokens, parent, emit = p[:4].argmax(-1), torch.arange(4), torch.zeros(50)
    for dtype in (torch.float32, torch.bfloat16):
        near = torch.full((4, 1), 1 - 1e-5, dtype=torch.float64)
        chain = verify.rejection(tokens, parent, p.to(dtype), p[:4].to(dtype), parent, near, emit, 4, 1)
        assert chain.count == 4 and chain.token == p[4].to(dtype).argmax()
    over = torch.full((4, 1), 2.0)  # no such uniform: the residual of p and p is empty
    assert verify.rejection(tokens, parent, p, p[:4], parent, over, emit, 4, 1).token == p[0].argmax()
    assert verify.block(tokens, p, p[:4], over[:, 0], emit).token == p[0].argmax()
    one = torch.eye(50)[tokens]  # a target that is sure of the drafted tokens
    sure = verify.rejection(tokens, parent, torch.cat([one, p[4:]]), None, None, near, emit, 4, 1)
    assert sure.count == 4
    even, all_of = torch.full((9, 8), 1 / 8), torch.arange(8)
    refused = verify.rejection(all_of, 0 * all_of, even, None, None, over[:1].expand(1, 8), emit[:8], 1, 8)
    assert refused.count == 0 and refused.token == 0  # all tokens were tried: p stays


def test_nothing_waits_for_the_device():
    """Tensors without data refuse `.item()`, `bool` and shapes that depend on data: what a CUDA graph refuses too."""
    with torch.device("meta"):
        tokens, parent, mask = torch.zeros(5).long(), torch.zeros(5).long(), torch.ones(6, 6).bool()
        p, q, uniform, emit = torch.ones(6, 9), torch.ones(5, 9), torch.ones(3, 2), torch.ones(9)
        verify.uniform(torch.zeros(()).long(), parent, 4, verify.ACCEPT)
        chosen = verify.perturb(p, 0.7, verify.gumbel(3, torch.arange(6), 9), 4, 0.9).argmax(-1)
        drawn = verify.without_replacement(q, q, 2)
        verdicts = (
            verify.walk(tokens, parent, mask, chosen, 3),
            verify.rejection(tokens, parent, p, q, parent, uniform, emit, 3, 2),
            verify.rejection(tokens, parent, p, None, None, uniform, emit, 3, 2),
            verify.block(tokens, p, q, torch.ones(5), emit),
        )
    assert drawn.shape == (5, 2)
    for verdict, depth in zip(verdicts, (3, 3, 3, 5), strict=True):
        assert [x.shape for x in verdict] == [(depth + 1,), (), ()]
        assert {x.dtype for x in verdict} == {torch.long}


# --- noise ----------------------------------------------------------------------------------------------------------


def noise_by_hand(seed, stream, position, column):
    """`verify.uniform` in whole numbers: what must never change, or committed texts could not be made again."""

    def mix(x):
        for _ in range(2):
            x = (x >> 16 ^ x) * 0x45D9F3B % 2**32
        return x >> 16 ^ x

    row = mix((mix(position ^ stream << 28 ^ mix(seed % 2**32)) + (seed >> 32)) % 2**32)
    high = mix(row ^ mix(column ^ 0x9E3779B9))
    low = mix((high + row) % 2**32)
    return ((high << 20) + (low >> 12) + 0.5) / 2**52


def test_streams_of_noise_are_independent_and_the_targets_never_change():
    at = torch.arange(300)
    drawn = verify.gumbel(7, torch.tensor([0, 3]), 2, torch.float64, verify.DRAFT)
    for row, position in enumerate((0, 3)):
        for token in (0, 1):
            u = noise_by_hand(7, verify.DRAFT, position, token)
            assert drawn[row, token].item() == pytest.approx(-math.log(-math.log(u)), rel=1e-12)
    streams = (verify.TARGET, verify.DRAFT, verify.ACCEPT, verify.EMIT)
    drawn = [verify.uniform(11, at, 400, stream) for stream in streams]
    for u in drawn:
        assert u.min() > 0 and u.max() < 1
        assert chi_square((u * 64).long().flatten(), torch.full((64,), 1 / 64)) > ALARM
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.isin(a, b).any()
        for lag in (0, 1):  # 1: of the next position; standard error of a correlation 0.003
            assert abs(torch.corrcoef(torch.stack([a[lag:].flatten(), b[: 300 - lag].flatten()]))[0, 1]) < 0.016
    seed = torch.tensor(11)
    assert torch.equal(verify.uniform(seed, at[5:7], 9, verify.EMIT), drawn[verify.EMIT][5:7, :9])


def test_a_rounds_draws_are_its_own():
    noise = verify.Noise(5, 30, torch.float32, torch.device("cpu"))
    draws = [noise.drafts(9, 4), noise.drafts(10, 4), noise.rows(9, 4), noise.rows(13, 4), noise.emit(9)[None]]
    assert len(torch.cat(draws).unique(dim=0)) == 17  # the next round draws anew for the positions that both draft
    assert torch.equal(draws[0][0], verify.gumbel(5, torch.tensor([9]), 30, stream=verify.DRAFT)[0])
    decisions = torch.cat([noise.accepts(9, 4, 2), noise.accepts(10, 4, 2)])
    assert decisions.shape == (8, 2) and len(decisions.unique()) == 16


# --- laws -----------------------------------------------------------------------------------------------------------


def chi_square(cells, law):
    """The chance of counts as far from the law [cells] as these, or farther; cells expected below 5 are one."""
    counts, expected = torch.bincount(cells, minlength=len(law)).double(), law.double() * len(cells)
    assert not counts[law == 0].any(), "a token that the target never produces"
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-12)).sum()
    free = (expected > 0).sum() - 1
    return torch.special.gammaincc(free / 2, statistic / 2).item()


V, LENGTH = 4, 3
CHAIN, TREE = [0, 1, 2], [0, 0, 1, 1, 2]


class Toy:
    """A target and a drafter as tables: p[l] and q[l] [V^l, V] of the next token after l tokens."""

    def __init__(self, seed=0, apart=1.0, **warped):
        generator = torch.Generator().manual_seed(seed)
        self.p, self.q = [], []
        for length in range(LENGTH + 1):
            logits = torch.randn(V**length, V, generator=generator, dtype=torch.float64)
            guess = logits + apart * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
            for table, of in ((self.p, logits), (self.q, guess)):
                table.append(verify.warp(of, **{"temperature": 0.8, **warped}).softmax(-1))

    def law(self):
        """Probability of every sequence of LENGTH tokens: [V^LENGTH]."""
        law = torch.ones(1, dtype=torch.float64)
        for length in range(LENGTH):
            law = (law[:, None] * self.p[length]).flatten()
        return law


def rounds(toy, rule, parent, n, bug="", seed=1):
    """n rounds, each continued by plain sampling: (cells [n] of LENGTH tokens, accepted nodes [n])."""
    levels, width = ordinary(parent)
    depth, every, at = max(levels), range(len(parent) + 1), torch.arange(n) * 8
    plain = [
        verify.gumbel(seed, at + (0 if bug == "noise of one position" else level), V, torch.float64)
        for level in range(LENGTH + 1)
    ]
    noise = verify.gumbel(seed, at, len(parent) * V, torch.float64, verify.DRAFT).view(n, -1, V)
    context, tokens = [torch.zeros(n, dtype=torch.long)] * len(every), [None] * len(parent)
    for row in every:
        children = [i for i, above in enumerate(parent) if above == row]
        if not children:
            continue
        guess = toy.q[levels[row]][context[row]].log()
        g = plain[levels[row]] if rule == "coupled" else noise[:, row]
        drawn = verify.without_replacement(guess, 0 * g if rule == "points" else g, len(children))
        for r, node in enumerate(children):
            tokens[node], context[node + 1] = drawn[:, r], context[row] * V + drawn[:, r]
    p = torch.stack([toy.p[levels[row]][context[row]] for row in every], 1).float()
    q = torch.stack([toy.q[levels[row]][context[row]] for row in every[:-1]], 1).float()
    tokens, above = torch.stack(tokens, 1), torch.tensor(parent)
    uniform = verify.uniform(seed, at, depth * width, verify.ACCEPT).view(n, depth, width)
    if bug == "one decision for all":
        uniform = uniform[:, :1].expand(n, depth, width)
    emit = verify.gumbel(seed, at, V, torch.float64, verify.EMIT)
    if bug == "noise of the draft":
        emit = noise[:, 0]
    if bug == "next row of p":
        p = p[:, [*every[1:], 0]]
    if bug == "next row of q":
        q = q[:, [*every[1:-1], 0]]
    if rule == "coupled":
        g = torch.stack([plain[levels[row]] for row in every], 1)
        if bug == "next row of noise":
            g = g[:, [*every[1:], 0]]
        chosen, mask = (p.log() + g).argmax(-1), ancestors(parent)
        made = torch.vmap(lambda t, c: verify.walk(t, above, mask, c, depth))(tokens, chosen)
    elif rule == "block":
        made = torch.vmap(verify.block)(tokens, p, q, uniform[..., 0], emit)
    else:
        drawn = rule == "rejection"
        made = torch.vmap(
            lambda t, p, q, u, e: verify.rejection(
                t, above, p, q if drawn else None, above if drawn else None, u, e, depth, width
            )
        )(tokens, p, q, uniform, emit)
    path, count, token = made
    if bug == "emits from p":
        token = (p.take_along_dim(path[:, -1:, None], 1)[:, 0].log() + emit).argmax(-1)
    if bug == "accepts one more":
        count = (count + 1).clamp(max=depth)
        path = torch.where(path == path[:, -1:], (path + 1).clamp(max=len(parent)), path)
    elif bug == "drops the first":
        path, count = path[:, 1:], (count - 1).clamp(min=0)
    cells = torch.zeros(n, dtype=torch.long)
    for j in range(LENGTH):
        fresh = (toy.p[j][cells].log() + verify.gumbel(seed, at + LENGTH + 1 + j, V, torch.float64)).argmax(-1)
        node = path[:, min(j + 1, path.shape[1] - 1)] - 1  # of no use where j >= count
        kept = tokens.gather(1, node.clamp(min=0)[:, None])[:, 0]
        cells = cells * V + torch.where(j < count, kept, torch.where(j == count, token, fresh))
    return cells, made.count


RULES = [("rejection", CHAIN), ("rejection", TREE), ("points", TREE), ("block", CHAIN), ("coupled", TREE)]


@pytest.mark.parametrize(("rule", "parent"), RULES)
@pytest.mark.parametrize("warped", [{}, {"temperature": 1.5, "top_k": 3, "top_p": 0.95}])
def test_the_output_follows_the_target(rule, parent, warped):
    toy = Toy(**warped)
    cells, accepted = rounds(toy, rule, parent, 200_000)
    assert chi_square(cells, toy.law()) > ALARM
    assert len(accepted.unique()) == max(ordinary(parent)[0]) + 1  # every outcome occurred


@pytest.mark.parametrize(
    ("rule", "parent", "bug"),
    [
        *((rule, parent, bug) for rule, parent in RULES for bug in ("drops the first", "accepts one more")),
        *(
            (rule, parent, bug)
            for rule, parent in RULES[:4]
            for bug in ("emits from p", "noise of the draft", "next row of p", "residual without max")
            if (rule, bug) not in (("points", "noise of the draft"), ("points", "residual without max"))
        ),
        *((rule, parent, "next row of q") for rule, parent in RULES if rule in ("rejection", "block")),
        ("rejection", TREE, "one decision for all"),
        ("block", CHAIN, "one decision for all"),
        ("coupled", TREE, "noise of one position"),
        ("coupled", TREE, "next row of noise"),
    ],
)
def test_a_planted_bug_is_caught(rule, parent, bug, monkeypatch):
    if bug == "residual without max":
        monkeypatch.setattr(torch.Tensor, "relu", torch.Tensor.abs)
    cells, _ = rounds(Toy(), rule, parent, 50_000, bug)
    assert chi_square(cells, Toy().law()) < ALARM


def test_draws_without_replacement_have_their_order():
    """Two draws of four tokens: q(a) q(b) / (1 - q(a)) for every pair a, b."""
    q = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    noise = verify.gumbel(3, torch.arange(100_000), 4, stream=verify.DRAFT)
    drawn = verify.without_replacement(q.log().expand(100_000, 4), noise, 2)
    law = q[:, None] * q / (1 - q[:, None])
    assert chi_square(drawn[:, 0] * 4 + drawn[:, 1], law.fill_diagonal_(0).flatten()) > ALARM
    assert not torch.equal(drawn[:, 0], drawn[:, 1]) and (drawn[:, 0] != drawn[:, 1]).all()


# --- acceptance -----------------------------------------------------------------------------------------------------


def accepted_by_hand(toy, rule):
    """Expected accepted nodes of a chain of LENGTH: sum over drafts and i of Pr[drafted] times Pr[i and all before].

    The second is prod min(1, p / q) for `rejection` and the weight w_i for `block` (arXiv 2403.10444).
    """
    expected = 0.0
    for draft in itertools.product(range(V), repeat=LENGTH):
        drawn, keeps, context = 1.0, 1.0, 0
        for i, x in enumerate(draft):
            p, q = toy.p[i][context, x].item(), toy.q[i][context, x].item()
            drawn, context = drawn * q, context * V + x
            keeps = min(1, keeps * p / q) if rule == "block" else keeps * min(1, p / q)
            expected += drawn * keeps / V ** (LENGTH - 1 - i)  # a prefix occurs in that many drafts
    return expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("apart", [0.5, 2.0])
def test_accepted_nodes_are_those_expected_and_block_has_more(seed, apart):
    toy = Toy(seed, apart)
    by_hand = {rule: accepted_by_hand(toy, rule) for rule in ("rejection", "block")}
    assert by_hand["block"] > by_hand["rejection"]
    for rule, expected in by_hand.items():
        _, count = rounds(toy, rule, CHAIN, 40_000)
        error = count.double().std() / 200
        assert count.double().mean().item() == pytest.approx(expected, abs=4.9 * error.item())  # ALARM


def test_acceptance_per_position():
    """`coupled`'s formula against its double sum, its bounds and a simulation; `rejection`'s against its law."""
    generator = torch.Generator().manual_seed(2)
    n, vocab, pairs = 40_000, 6, 20
    logits = torch.randn(pairs, vocab, generator=generator, dtype=torch.float64) * 1.5
    apart = torch.logspace(-2, 1, pairs, dtype=torch.float64)[:, None]
    p = logits.softmax(-1)
    q = (logits + apart * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).softmax(-1)
    q[3] = p[3]
    p[4, 2:4] = q[4, 3:5] = 0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    formula, (low, high) = verify.coupled_acceptance(p, q), verify.coupled_bounds(p, q)
    torch.testing.assert_close(high, 1 - (p - q).abs().sum(-1) / 2)
    torch.testing.assert_close(low, high / (1 + (p - q).abs().sum(-1) / 2))
    assert (low <= formula + 1e-12).all() and (formula <= high + 1e-12).all()
    assert formula[3] == pytest.approx(1)
    for i in range(pairs):
        mine, theirs = p[i].tolist(), q[i].tolist()
        double = sum(
            1 / sum(max(a / mine[j], b / theirs[j]) for a, b in zip(mine, theirs, strict=True))
            for j in range(vocab)
            if mine[j] and theirs[j]
        )
        assert formula[i].item() == pytest.approx(double)
        noise = verify.gumbel(i, torch.arange(n), vocab)
        same = ((p[i].log() + noise).argmax(-1) == (q[i].log() + noise).argmax(-1)).double().mean().item()
        assert same == pytest.approx(double, abs=4.9 * math.sqrt(double * (1 - double) / n) + 1e-9)


@pytest.mark.parametrize("width", [1, 5, 12])
def test_the_best_in_two_steps_are_the_best(width):
    scores = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    values, tokens = verify.best(scores, width, chunks=8)
    expected = scores.sort(descending=True)
    assert torch.equal(values, expected.values[..., :width]) and torch.equal(tokens, expected.indices[..., :width])
    values, tokens = verify.best(scores, width, ordered=False, chunks=8)
    assert torch.equal(values.sort(descending=True).values, expected.values[..., :width])
    assert torch.equal(scores.gather(-1, tokens), values)
