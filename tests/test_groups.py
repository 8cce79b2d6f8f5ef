"""The group layout against double loops and hand-written cases."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

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


def test_dropped_masks_stand_anchor_by_anchor():
    rows = list(zip(*(x.tolist() for x in groups.drop(40, 5, 0.8, 0.3, torch.Generator().manual_seed(3))), strict=True))
    assert rows[:40] == [(0, t) for t in range(40)]
    assert [(t, d) for d, t in rows[40:]] == sorted((t, d) for d, t in rows[40:])
    every = list(zip(*(x.tolist() for x in groups.drop(7, 3, 1.0, 0.2, torch.Generator())), strict=True))
    assert sorted(every) == list(zip(*(x.tolist() for x in groups.layout(7, 3)), strict=True))


def test_causal_mask_keeps_documents_apart():
    mask = groups.causal_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_fewer_anchors_carry_masks_and_every_real_row_stays():
    depth, anchor = groups.drop(100, 3, 1.0, 0.2, torch.Generator().manual_seed(3), share=0.4)
    assert torch.bincount(depth).tolist() == [100, 40, 40, 40]
    assert anchor[depth == 1].tolist() == anchor[depth == 3].tolist() != list(range(40))


def sample(n: int, masks: int, keep: float, documents: str):
    """Rows of two sequences; `documents` "one" fills each with a document, "many" packs and pads."""
    dropped = groups.drop(n, masks, keep, 0.2, torch.Generator().manual_seed(1))
    depth, anchor = groups.layout(n, masks) if keep == 1 else dropped
    document = torch.zeros(2, n, dtype=torch.long)
    if documents == "many":
        document = torch.stack([(torch.arange(n) * 3) // n + 4, (torch.arange(n) * 5) // n])
        document[1, -n // 6 :] = -1
    return depth, anchor, document


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("chunk", [1, groups.CHUNK])
@pytest.mark.parametrize(("keep", "documents"), [(1.0, "one"), (0.7, "many"), (1.0, "many")])
def test_structured_attention_equals_the_dense_mask(keep, documents, chunk, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(groups, "CHUNK", chunk)  # 1: sixteen rows at a time
    depth, anchor, document = sample(37, 4, keep, documents)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, len(depth), 8, dtype=torch.float64) for heads in (4, 2, 2)]
    wanted = torch.randn(2, len(depth), 4, 8, dtype=torch.float64)

    def values_and_slopes(mask, dtype):
        given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        if isinstance(mask, torch.Tensor):
            out = F.scaled_dot_product_attention(*given, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        else:
            out, _ = groups.attend(torch.nn.Identity(), *given, mask, scaling=0.3, dropout=0.0)
        (out * wanted.to(dtype)).sum().backward()
        return [out, *(x.grad for x in given)]

    dense = values_and_slopes(groups.mask(depth, anchor, document), torch.float64)
    for ours, reference in zip(values_and_slopes(groups.structure(depth, anchor, document), dtype), dense, strict=True):
        error = (ours.double() - reference).norm() / reference.norm()
        assert error < tolerance


@pytest.mark.parametrize(("n", "keep", "documents"), [(64, 1.0, "one"), (64, 1.0, "many"), (61, 0.7, "many")])
def test_blocks_hold_the_whole_mask(n, keep, documents):
    size = 8
    depth, anchor, document = sample(n, 3, keep, documents)
    some, full = groups.block_table(depth, anchor, document, size)
    gap = some.shape[-1] * size - len(depth)
    entries = groups.mask(depth, anchor, document)[:, 0]

    def blocks(x):
        return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)

    holds = blocks(F.pad(entries, (0, gap, 0, gap), value=False)).any(-1)
    assert not (holds & ~some).any()  # nothing is lost
    assert blocks(F.pad(entries, (0, gap, 0, gap), value=True)).all(-1)[full].all()
    assert full.any() and not (full & ~some).any()
    if n % size == 0:  # depths begin with a block: the table is exact
        assert torch.equal(holds, some)
        if documents == "one":
            assert torch.equal(blocks(entries).all(-1), full)


@pytest.mark.parametrize(("keep", "documents"), [(1.0, "one"), (0.7, "many")])
def test_flex_attention_reads_the_block_mask_as_the_dense_one(keep, documents):
    depth, anchor, document = sample(70, 3, keep, documents)
    mask = groups.block_mask(depth, anchor, document)
    query, key, value = (torch.randn(2, heads, len(depth), 16) for heads in (4, 2, 2))
    flex = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    dense = F.scaled_dot_product_attention(
        query, key, value, attn_mask=groups.mask(depth, anchor, document), enable_gqa=True
    )
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
    some, _ = groups.block_table(depth, anchor, document, 128)
    assert torch.equal(mask.to_dense()[:, 0].bool(), some)


def test_a_causal_mask_is_written_out_only_where_it_must_be():
    long = groups.DENSE_UP_TO + 1
    one, two = torch.zeros(1, long, dtype=torch.long), (torch.arange(long)[None] > 5).long()
    assert groups.causal(one) is None
    assert torch.equal(groups.causal(two), groups.causal_mask(two))
    assert torch.equal(groups.causal(one[:, :9]), groups.causal_mask(one[:, :9]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("keep", "documents"), [(1.0, "one"), (0.7, "many")])
@pytest.mark.parametrize(("heads", "width"), [((10, 2), 32), ((4, 4), 128), ((4, 2), 8)])
def test_attention_on_a_gpu_equals_the_dense_mask(heads, width, keep, documents, dtype, tolerance):
    depth, anchor, document = (x.cuda() for x in sample(333, 7, keep, documents))
    torch.manual_seed(0)
    shapes = [(2, h, len(depth), width) for h in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, dtype=torch.float64, device="cuda") for shape in shapes]
    wanted = torch.randn(2, len(depth), heads[0], width, dtype=torch.float64, device="cuda")
    results = []
    for kind, mask in ((dtype, groups.structure(depth, anchor, document)), (torch.float64, None)):
        given = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        if mask is None:
            dense = groups.mask(depth, anchor, document)
            query, key, value = given[0], *(x.repeat_interleave(heads[0] // heads[1], 1) for x in given[1:])
            scores = (query @ key.mT * 0.3).masked_fill(~dense, -torch.inf)
            out = (scores.softmax(-1) @ value).transpose(1, 2)
        else:
            assert mask.block is not None
            out, _ = groups.attend(torch.nn.Identity(), *given, mask, scaling=0.3, dropout=0.0)
        (out * wanted.to(kind)).sum().backward()
        results.append([out.double(), *(x.grad.double() for x in given)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).norm() / reference.norm() < tolerance


def test_few_queries_see_what_attention_with_repeated_keys_sees():
    """Two key heads of three query heads each, two sequences, three rows of which each sees other keys."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((6, 3), (2, 5), (2, 5)))
    sees = torch.rand(2, 3, 5) < 0.5
    sees[..., 0] = True
    mask = groups.for_few(sees, 3, torch.float64)
    assert mask.shape == (2, 1, 9, 5) and set(mask.unique().tolist()) == {0.0, float("-inf")}
    found = groups.few(query, key, value, mask, 0.3)
    wanted = torch.zeros_like(query)
    for b, h, r in itertools.product(range(2), range(6), range(3)):
        scores = 0.3 * key[b, h // 3] @ query[b, h, r]
        weights = scores.masked_fill(~sees[b, r], -torch.inf).softmax(0)
        wanted[b, h, r] = weights @ value[b, h // 3]
    torch.testing.assert_close(found, wanted)
    through = groups.attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)[0]
    torch.testing.assert_close(through, wanted.transpose(1, 2))
