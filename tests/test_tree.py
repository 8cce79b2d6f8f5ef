"""Draft trees: shapes, ancestry, and the best tree against exhaustive search."""

import itertools
import math

import pytest
import torch

from psnb import tree
from psnb.errors import UserError
from psnb.tree import BestFirst, Candidates, Plan


def rank_paths(shape):
    """Each node's rank path, by walking up: slow and obviously right."""
    found = []
    for node in range(len(shape.parent)):
        path, row = [], node + 1
        while row:
            path.append(int(shape.rank[row - 1]))
            row = int(shape.parent[row - 1])
        found.append(tuple(reversed(path)))
    return found


def check(shape):
    """What every tree owes: parents first, siblings in order and without gaps, depth, mask."""
    found = rank_paths(shape)
    assert len(set(found)) == len(found)
    for node, path in enumerate(found):
        assert int(shape.depth[node]) == len(path)
        assert path[:-1] == () or found.index(path[:-1]) < node
        assert not path[-1] or found.index((*path[:-1], path[-1] - 1)) < node
        sees = {row for row in range(len(found) + 1) if shape.mask[node + 1, row]}
        assert sees == {0, *(found.index(path[:d]) + 1 for d in range(1, len(path) + 1))}
    assert shape.mask[0].tolist() == [True] + [False] * len(found)
    return found


def test_the_worked_example_of_ancestry():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.ancestry(torch.tensor([0, 0, 1]), 2).int().tolist() == expected


@pytest.mark.parametrize(("kind", "k", "nodes"), [("chain", 5, 0), ("static", 5, 25), ("static", 4, 63)])
def test_fixed_shapes_hold_their_paths(kind, k, nodes):
    wanted = tree.paths(kind, k, nodes)
    found = check(tree.fixed(wanted))
    assert sorted(found) == sorted(wanted) and len(found) == (nodes or k)


@pytest.mark.parametrize("nodes", range(1, 65))
def test_every_size_of_the_static_tree_is_a_tree(nodes):
    assert len(check(tree.fixed(tree.paths("static", 5, nodes)))) == nodes


def test_published_shapes_are_whole():
    """Counts by depth of Medusa's 63 and EAGLE's 25 nodes, as their papers draw them."""
    assert [sum(len(w) == d for w in tree.MEDUSA.split()) for d in (1, 2, 3, 4)] == [10, 28, 23, 2]
    assert [sum(len(w) == d for w in tree.EAGLE.split()) for d in (1, 2, 3, 4, 5)] == [4, 8, 8, 3, 2]


def scores(k, width, seed, ties=False):
    values = torch.randn(k, width, generator=torch.Generator().manual_seed(seed)).double() * 2
    values = (values * 2).round() / 2 if ties else values
    return values.log_softmax(-1).sort(descending=True).values


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("k", "width", "nodes"), [(1, 6, 6), (2, 5, 7), (3, 4, 4), (3, 6, 16), (4, 4, 32), (5, 3, 9)])
def test_best_first_is_optimal(k, width, nodes, ties):
    """Exhaustive: the N best of all paths. As a child is never worth more than its parent they form a tree."""
    for seed in range(20):
        given = scores(k, width, seed, ties)
        found = check(BestFirst(k, nodes, width)(given))
        every = [p for d in range(1, k + 1) for p in itertools.product(range(width), repeat=d)]
        worth = {path: sum(given[d, r].item() for d, r in enumerate(path)) for path in every}
        best = sorted(worth.values(), reverse=True)[:nodes]
        torch.testing.assert_close(
            torch.tensor(sorted((worth[p] for p in found), reverse=True)), torch.tensor(best), rtol=1e-9, atol=1e-9
        )


def test_a_large_best_first_tree_is_optimal():
    """Against the N best of all contenders by their exact worth."""
    k, nodes = 6, 63
    given = scores(k, nodes, 0)
    found = check(BestFirst(k, nodes, nodes)(given))
    worth = [sum(given[d, r].item() for d, r in enumerate(p)) for p in tree._contenders(k, nodes, nodes)]
    made = [sum(given[d, r].item() for d, r in enumerate(p)) for p in found]
    assert len(set(found)) == nodes
    assert sorted(made, reverse=True) == pytest.approx(sorted(worth, reverse=True)[:nodes], abs=1e-9)


@pytest.mark.parametrize("by_counting", [False, True])
def test_the_largest_in_order(by_counting):
    """Against Python's sort, which keeps equals as they stand; with equals, and some without any worth."""
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).mul(3).round()
    x[0, 0, 5:9] = -torch.inf
    found, place = tree.ranked(x, 7, by_counting)
    for of, largest, places in zip(x.flatten(0, 1), found.flatten(0, 1), place.flatten(0, 1), strict=True):
        order = sorted(range(40), key=lambda i: -of[i].item())
        assert largest.tolist() == order[:7]
        assert [places[i].item() for i in order] == list(range(40))


def test_best_first_survives_impossible_tokens():
    given = torch.full((3, 8), -torch.inf)
    given[:, 0] = 0.0
    assert set(check(BestFirst(3, 8, 8)(given))) >= {(0,), (0, 0), (0, 0, 0)}


def linked_paths(pairs, shape):
    """By node its path of candidates and what that is worth, written out."""
    found = {0: ((), 0.0)}
    for row, (parent, depth, of) in enumerate(zip(*(x.tolist() for x in shape[:3]), strict=True), start=1):
        path, worth = found[parent]
        assert len(path) == depth - 1
        found[row] = (*path, of), worth + pairs[depth - 1, path[-1] if path else 0, of].item()
    return [found[row] for row in sorted(found) if row]


@pytest.mark.parametrize("nodes", [1, 5, 12])
def test_the_best_tree_of_linked_slots(nodes):
    """Every kept node is worth no less than any path of the best three candidates a slot that is left out."""
    k, width, generator = 3, 3, torch.Generator().manual_seed(nodes)
    pairs = torch.randn(k, width, width, generator=generator).log_softmax(-1)
    pairs[0] = pairs[0, 0]
    builder = BestFirst(k, nodes, width)
    found = linked_paths(pairs, builder(pairs[:, 0], pairs))
    assert len({path for path, _ in found}) == nodes
    every = {}
    for ranks in (p for n in range(1, k + 1) for p in itertools.product(range(width), repeat=n)):
        row, path, worth = 0, [], 0.0
        for slot, rank in enumerate(ranks):
            of = pairs[slot, row].argsort(descending=True)[rank].item()
            worth, row = worth + pairs[slot, row, of].item(), of
            path.append(of)
        every[tuple(path)] = ranks, worth
    contenders = {tuple(p) for p in tree._contenders(k, nodes, width)}
    able = sorted((worth for ranks, worth in every.values() if ranks in contenders), reverse=True)
    assert sorted((worth for _, worth in found), reverse=True) == pytest.approx(able[:nodes], abs=1e-6)


@pytest.mark.parametrize(("k", "nodes"), [(6, 63), (5, 80), (1, 70)])
def test_half_the_reach_is_enough_for_linked_slots(k, nodes):
    """Of the worth of the tree from all contenders hardly anything is lost; where half are too few, nothing."""
    few, all_of_them = (BestFirst(k, nodes, nodes, linked=linked) for linked in (True, False))
    assert len(few.depth) < len(all_of_them.depth) / 3 or k == 1
    assert len(BestFirst(k, 30, 40, linked=True).depth) == len(BestFirst(k, 30, 40).depth)
    for seed in range(5):
        pairs = torch.randn(k, nodes, nodes, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
        sums = []
        for builder in (few, all_of_them):
            found = linked_paths(pairs, builder(pairs[:, 0], pairs))
            assert len({path for path, _ in found}) == nodes
            sums.append(sum(math.exp(worth) for _, worth in found))
        assert sums[0] >= 0.995 * sums[1]


def test_rounding_never_puts_a_child_before_its_parent():
    """Path 0 0 is worth 0, its child 6e-8 more by rounding: the child may not stand first, or alone."""
    pairs = torch.tensor([[[0.0, -9.0]] * 2, [[6e-8, -9.0]] * 2])
    for nodes in (1, 2):
        for given in ((pairs[:, 0], None), (pairs[:, 0], pairs)):
            shape = BestFirst(2, nodes, 2)(*given)
            assert shape.parent.tolist() == [0, 1][:nodes] and shape.depth.tolist() == [1, 2][:nodes]


@pytest.mark.parametrize(("k", "nodes"), [(1, 50), (2, 40), (3, 5)])
def test_few_candidates_make_a_large_tree(k, nodes):
    """A slot has more candidates than asked for where the tree could not be filled otherwise."""
    plan = Plan("best_first", k, nodes, vocab=99, width=3)
    pairs = torch.randn(k, plan.width, plan.width).log_softmax(-1)
    found = linked_paths(pairs, plan.builder(pairs[:, 0], pairs))
    assert len({path for path, _ in found}) == nodes and plan.width >= 3


@pytest.mark.parametrize(("kind", "nodes"), [("chain", 0), ("static", 12)])
def test_a_fixed_shape_of_linked_slots(kind, nodes):
    """Rank r below a node is the r-th best candidate after that node's."""
    k, width = 4, 10
    pairs = torch.randn(2, k, width, width, generator=torch.Generator().manual_seed(3))
    tokens = torch.randperm(2 * k * width, generator=torch.Generator().manual_seed(4)).view(2, k, width)
    plan = Plan(kind, k, nodes, vocab=99, width=width)
    made = plan(Candidates(tokens, torch.zeros(2, k, width), None, pairs))
    for b in range(2):
        at = {(): 0}
        for node, path in enumerate(rank_paths(made.shape)):
            slot = len(path) - 1
            at[path] = pairs[b, slot, at[path[:-1]]].argsort(descending=True)[path[-1]].item()
            assert made.tokens[b, node] == tokens[b, slot, at[path]]


def test_a_plan_puts_the_candidates_in_place():
    tokens = torch.arange(40).view(4, 10)
    made = Plan("static", 4, 12, vocab=99)(Candidates(tokens, torch.zeros(4, 10), None))
    for node, path in enumerate(rank_paths(made.shape)):
        assert made.tokens[node] == tokens[len(path) - 1, path[-1]] and made.draw[node] == len(path) - 1


def test_levels_of_a_fixed_plan_say_what_is_expanded():
    """Walking level by level with (parent among the expanded, rank) rebuilds the paths."""
    plan = Plan("static", 5, 25, vocab=99)
    above, found = [()], []
    for of, rank, keep in plan.levels:
        here = [above[int(o)] + (int(r),) for o, r in zip(of, rank, strict=True)]
        found += here
        above = [here[i] for i in keep.tolist()]
    assert found == rank_paths(plan.shape) and above == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chian", 5, 0), "did you mean chain"),
        (("static", 5, 65), "1 to 64 nodes"),
        (("static", 3, 63), "4 deep"),
        (("best_first", 5, 0), "number of nodes"),
        (("best_first", 1, 50), "larger k or vocabulary"),
        (("dynamic", 1, 20), "at most 8 nodes"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Plan(*arguments, vocab=40)


def test_paths_without_a_parent_are_refused():
    with pytest.raises(UserError, match="lacks its parent"):
        tree.fixed([(0,), (1, 0)])
