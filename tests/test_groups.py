"""The group layout against double loops and hand-written cases."""

import pytest
import torch

from psnb import groups


def test_positions_restart_with_every_document():
    document = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, 2, 2]])
    assert groups.positions(document).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def test_mask_is_the_one_drawn_in_the_design():
    depth, anchor = groups.layout(3, 1)
    drawn = """1 0 0 0 0 0
               1 1 0 0 0 0
               1 1 1 0 0 0
               1 0 0 1 0 0
               1 1 0 0 1 0
               1 1 1 0 0 1"""
    expected = [[int(x) for x in line.split()] for line in drawn.splitlines()]
    assert groups.mask(depth, anchor, torch.zeros(1, 3, dtype=torch.long))[0, 0].int().tolist() == expected


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_mask_equals_the_double_loop(keep):
    n, masks = 11, 4
    depth, anchor = groups.drop(n, masks, keep, 0.2, torch.Generator().manual_seed(0))
    document = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2, [0] * 11])
    fast = groups.mask(depth, anchor, document)[:, 0]
    rows = list(zip(depth.tolist(), anchor.tolist(), strict=True))
    for b in range(2):
        of = document[b].tolist()
        for r, (d, t) in enumerate(rows):
            for c, (j, s) in enumerate(rows):
                may = of[s] == of[t] and ((j == 0 and s <= t) or (j >= 1 and s == t and j <= d))
                assert fast[b, r, c] == may, (b, (d, t), (j, s))


def test_dropped_rows_keep_complete_chains():
    n, masks, keep, least = 100, 7, 0.7, 0.2
    depth, anchor = groups.drop(n, masks, keep, least, torch.Generator().manual_seed(3))
    kept = [set(anchor[depth == d].tolist()) for d in range(masks + 1)]
    assert kept[0] == set(range(n))
    assert all(deeper <= shallower for shallower, deeper in zip(kept, kept[1:], strict=False))
    assert [len(k) for k in kept] == [100, 70, 49, 34, 24, 20, 20, 20]  # max(0.7^d, 0.2) of 100
    other = groups.drop(n, masks, keep, least, torch.Generator().manual_seed(4))[1]
    assert not torch.equal(anchor, other)


def test_causal_mask_keeps_documents_apart():
    mask = groups.causal_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
