"""The group layout of group-wise training: rows, positions, attention, conditional drop (DESIGN section 2).

Every anchor t of a sequence carries masks d = 1..M. Rows are (depth d, anchor t), the real ones (d = 0) first.
`mask` is the attention written out, [R, R]; `Rows` and `attend` are the same attention without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "psnb_groups"  # the name under which transformers' layers find `attend`
DENSE_UP_TO = 1024  # tokens up to which a causal mask is written out
# Of flex attention's forward pass, heads of up to 64. With its own choice a group mask took 3.3 ms on an H100 (16 rows
# of 2,048 tokens, 12 heads) in place of 1.2, a causal one 1.05 in place of 0.36.
TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
CHUNK = 2**21  # attention scores held at once on a CPU (measured: 2^20 to 2^22 are fastest)


def positions(document: Tensor) -> Tensor:
    """Position of each token within its own document: document [..., n] -> [..., n].

    Documents are numbered runs: `[0, 0, 0, 1, 1, -1]` -> `[0, 1, 2, 0, 1, 0]` (-1 is padding).
    """
    n = document.shape[-1]
    index = torch.arange(n, device=document.device).expand_as(document)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[..., 1:] = document[..., 1:] != document[..., :-1]
    return index - torch.where(starts, index, 0).cummax(-1).values


def causal_mask(document: Tensor) -> Tensor:
    """Causal attention inside each document: document [B, n] -> bool [B, 1, n, n], True = may attend.

    Padding (-1) sees padding only, so no row is without a key.
    """
    n = document.shape[-1]
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(n, n, dtype=torch.bool, device=document.device).tril())[:, None]


def layout(n: int, masks: int) -> tuple[Tensor, Tensor]:
    """All rows of n anchors with `masks` masks each: (depth, anchor), each [n * (masks + 1)], depth-major.

    n = 2, masks = 1: depth [0, 0, 1, 1], anchor [0, 1, 0, 1].
    """
    depth = torch.arange(masks + 1).repeat_interleave(n)
    return depth, torch.arange(n).repeat(masks + 1)


def drop(
    n: int, masks: int, keep: float, keep_min: float, generator: torch.Generator, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The rows that conditional drop keeps (COD: PARD, P-EAGLE): (depth, anchor), the real rows, then the masks.

    Depth d keeps share * max(keep^d, keep_min) of the n anchors, drawn from those that depth d - 1 kept, so that the
    chain (1, t) .. (d, t) of a kept row is complete. Depth 0 is kept whole. Masks stand anchor by anchor: neighbours
    see about the same context, so that few blocks of the attention are cut. keep = share = 1 has the rows of `layout`.
    """
    kept = torch.arange(n)
    depths, anchors = [torch.zeros(n, dtype=torch.long)], [kept]
    for d in range(1, masks + 1):
        count = min(len(kept), max(1, round(share * max(keep**d, keep_min) * n)))
        kept = kept[torch.randperm(len(kept), generator=generator)[:count]].sort().values
        depths.append(torch.full((count,), d))
        anchors.append(kept)
    depth, anchor = torch.cat(depths), torch.cat(anchors)
    order = torch.cat([torch.arange(n), n + (anchor[n:] * (masks + 1) + depth[n:]).argsort()])
    return depth[order], anchor[order]


def mask(depth: Tensor, anchor: Tensor, document: Tensor) -> Tensor:
    """The group mask: depth, anchor [R], document [B, n] -> bool [B, 1, R, R], True = may attend.

    Row (d, t) sees row (0, s) for s <= t of its document, and row (j, t) for 1 <= j <= d; nothing of another group.
    n = 3, one mask: rows and columns (0,0) (0,1) (0,2) | (1,0) (1,1) (1,2):

        (0,0)  1 0 0 | 0 0 0        (1,0)  1 0 0 | 1 0 0
        (0,1)  1 1 0 | 0 0 0        (1,1)  1 1 0 | 0 1 0
        (0,2)  1 1 1 | 0 0 0        (1,2)  1 1 1 | 0 0 1

    Source: ParallelSpec, group-wise training; DESIGN section 2.
    """
    context = (depth[None, :] == 0) & (anchor[None, :] <= anchor[:, None])
    own = (depth[None, :] >= 1) & (anchor[None, :] == anchor[:, None]) & (depth[None, :] <= depth[:, None])
    of = document[:, anchor]
    return ((context | own) & (of[:, :, None] == of[:, None, :]))[:, None]


# --- the same attention, structured ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What `attend` takes in place of a mask: the rows' depth and anchor [R] and the anchors' documents [B, n].

    `block` is flex attention's block-sparse form of the mask, made on a GPU only.
    """

    depth: Tensor
    anchor: Tensor
    document: Tensor
    block: BlockMask | None = None


def structure(depth: Tensor, anchor: Tensor, document: Tensor) -> Rows:
    """The group mask without its [R, R] entries: depth, anchor [R], document [B, n] (see `mask`)."""
    block = block_mask(depth, anchor, document) if document.is_cuda else None
    return Rows(depth, anchor, document, block)


def block_table(depth: Tensor, anchor: Tensor, document: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which blocks of size x size entries of the group mask hold anything: (some, full), bool [B, Q, Q], Q = R / size.

    `some` may hold an empty block, never lacks one with an entry; every entry of a `full` one is set. Found from each
    block's least and greatest anchor, depth and document, so it costs (R / size)^2, not R^2. n = 4, no mask, size 2:

        some 1 0    full 0 0
             1 1         1 0
    """
    rows, blocks = len(depth), -(-len(depth) // size)
    # documents are numbered upwards along a row; padding (-1) comes last, so it becomes the greatest
    of = torch.where(document < 0, document.shape[1] + document.amax() + 1, document)[:, anchor]

    def least(x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, blocks * size - rows), value=2**40)
        return padded.unflatten(-1, (blocks, size)).amin(-1)

    def greatest(x: Tensor) -> Tensor:
        return -least(-x)

    first = torch.arange(blocks, device=depth.device) * size  # a real row's anchor is its index
    a0, a1, d0, d1 = least(anchor), greatest(anchor), least(depth), greatest(depth)
    o0, o1 = least(of), greatest(of)
    n = document.shape[1]
    touch = (o0[:, :, None] <= o1[:, None]) & (o0[:, None] <= o1[:, :, None])
    context = (first < n) & (first <= a1[:, None])
    own = (d1 >= 1) & (d0.clamp(min=1) <= d1[:, None]) & (a0 <= a1[:, None]) & (a0[:, None] <= a1)
    one = o0 == o1
    alike = one[:, :, None] & one[:, None] & (o0[:, :, None] == o0[:, None])
    full = (first + size <= n) & (first + size - 1 <= a0[:, None])
    return touch & (context | own), alike & full


def block_mask(depth: Tensor, anchor: Tensor, document: Tensor, size: int = 128) -> BlockMask:
    """The group mask as flex attention takes it: depth, anchor [R], document [B, n]."""
    n, many = document.shape[1], 2**10  # more than a group has masks, so that a code names one row
    first = (torch.arange(n, device=anchor.device) - positions(document))[:, anchor]  # where the row's document begins
    # Of its own group a row sees the masks up to itself: codes above `own`, up to its own. In 64 bits it is slower.
    upto, first, own, code = (x.int() for x in (anchor, first, anchor * many, anchor * many + depth))

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        context = (key < n) & (key <= upto[row]) & (key >= first[b, row])
        return context | ((code[key] > own[row]) & (code[key] <= code[row]))

    some, full = block_table(depth, anchor, document, size)
    lists = []
    for table in (some & ~full, full):
        order = table.int().argsort(dim=-1, descending=True, stable=True)
        lists += [table.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(len(depth), len(depth)))


def causal(document: Tensor) -> Tensor | BlockMask | None:
    """`causal_mask` in the cheapest form: document [B, n] -> None (causal and nothing else), a mask, or a block mask.

    Up to DENSE_UP_TO tokens the mask is written out. Beyond, it is block-sparse on a GPU (to look at the documents
    would make the host wait for it); on a CPU it is None where every row is one document.
    """
    n = document.shape[1]
    if n > DENSE_UP_TO and document.is_cuda:
        index = torch.arange(n, device=document.device)
        return block_mask(torch.zeros_like(index), index, document)
    if n > DENSE_UP_TO and bool((document == document[:, :1]).all()):
        return None
    return causal_mask(document)


def register() -> str:
    """Make `attend` known to transformers' layers; returns its name for a config's `_attn_implementation`."""
    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, heads, R, D], key, value [B, groups, R, D] -> [B, R, heads, D].

    Structured where `attention_mask` is `Rows`, flex attention where it is a block mask, `few` where it is `for_few`'s,
    else `sdpa`.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-2] != query.shape[2]:
        made = few(query, key, value, attention_mask, options["scaling"])
        return made.transpose(1, 2).contiguous(), None
    rows = isinstance(attention_mask, Rows)
    block = attention_mask.block if rows else attention_mask
    flex = isinstance(block, BlockMask) and query.shape[-1] >= 16  # it needs a head of 16 or more
    if not (rows or flex):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in float32
    one, how = (_flex, block) if flex else (_chunked, attention_mask)
    return one(query, key, value, how, options["scaling"]).transpose(1, 2).contiguous(), None


def for_few(sees: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """What each row sees, bool [B, r, keys], as `few` takes it: 0 and -inf, [B, 1, shared * r, keys].

    shared: query heads of a key head. Two of them, one row that sees the first of two keys: [[0, -inf], [0, -inf]].
    """
    return sees.to(dtype).log()[:, None].repeat(1, 1, shared, 1)


def few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Few queries over many keys: query [B, heads, r, D], key, value [B, groups, m, D], mask `for_few` -> as query.

    The query heads that share a key head stand one after the other as its rows: keys are never repeated in memory.
    """
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale).reshape(query.shape)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor, block: BlockMask, scale: float) -> Tensor:
    flex = flex_attention if torch.compiler.is_compiling() or not query.is_cuda else _compiled_flex()
    tiles: Any = TILES if query.is_cuda and query.shape[-1] <= 64 else None
    return flex(query, key, value, block_mask=block, scale=scale, enable_gqa=True, kernel_options=tiles)


def _chunked(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    """Chunks of query rows against the n context keys and the rows of their own group, one softmax over both.

    A chunk's scores are recomputed in the backward pass, so that they are held for one chunk at a time.
    """
    depth, anchor, document = rows.depth, rows.anchor, rows.document
    batch, heads, count, _ = query.shape
    groups, n = key.shape[1], document.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)  # of the softmax
    query = (query * scale).unflatten(1, (groups, heads // groups))
    place = torch.zeros(int(depth.max()) + 1, n, dtype=torch.long, device=depth.device)  # row of (depth, anchor)
    place[depth, anchor] = torch.arange(count, device=depth.device)

    def part(query: Tensor, key: Tensor, value: Tensor, depth: Tensor, anchor: Tensor) -> Tensor:
        upto, deepest = int(anchor.max()) + 1, int(depth.max())
        at = torch.arange(upto, device=anchor.device)
        seen = (at <= anchor[:, None]) & (document[:, None, :upto] == document[:, anchor, None])
        scores = query @ key[:, :, None, :upto].mT
        scores = scores.to(wide).masked_fill(~seen[:, None, None], -torch.inf)
        if deepest:
            own = place[1 : deepest + 1, anchor].T  # [c, deepest]
            there = torch.arange(1, deepest + 1, device=depth.device) <= depth[:, None]
            near = torch.einsum("bghcd,bgcmd->bghcm", query, key[:, :, own])
            scores = torch.cat([scores, near.to(wide).masked_fill(~there, -torch.inf)], -1)
        weights = scores.softmax(-1).to(value.dtype)
        mixed = weights[..., :upto] @ value[:, :, None, :upto]
        if deepest:
            mixed = mixed + torch.einsum("bghcm,bgcmd->bghcd", weights[..., upto:], value[:, :, own])
        return mixed

    size = max(16, CHUNK // (batch * heads * n))
    chunks = list(zip(query.split(size, 3), depth.split(size), anchor.split(size), strict=True))
    if len(chunks) == 1:
        return part(query, key, value, depth, anchor).flatten(1, 2)
    parts = [checkpoint(part, q, key, value, d, a, use_reentrant=False) for q, d, a in chunks]
    return torch.cat(parts, 3).flatten(1, 2)
