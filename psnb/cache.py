"""Keys and values of fixed capacity: rows are appended by a forward and taken back by `crop`.

`KVCache` counts its rows in Python. `StaticCache` holds B sequences whose lengths are on the device, so that nothing in
a round waits for it; with it comes an attention of few queries over many keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from psnb import groups
from psnb.errors import UserError


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values [1, heads, capacity, head_dim], of which the first `length` rows are real."""

    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(like: Tensor) -> Tensor:
            return torch.zeros(*like.shape[:2], self.capacity, like.shape[3], dtype=like.dtype, device=like.device)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [1, heads, r, head_dim]; return views of all rows held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens, {end} are needed: raise its capacity")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in transformers 5.17


class KVCache(Cache):
    """The cache of a target or a drafter: what a `transformers` model takes as `past_key_values`."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[FixedLayer(capacity) for _ in range(layers)])

    @property
    def length(self) -> int:
        """Rows held (tokens that a later forward sees)."""
        return self.layers[0].length

    def crop(self, length: int) -> None:
        """Keep the first `length` rows; the others are overwritten by what comes next."""
        for layer in self.layers:
            layer.crop(length)

    def layout(
        self, r: int, device: torch.device, seen: Tensor | None = None, ahead: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Position ids [1, r] and mask bool [1, 1, r, keys] (None: all keys) of the r rows that follow.

        Each sees the cache and the rows up to itself. With `seen`, bool [r, s], they are nodes of one level of a tree:
        they see every row but the last s, of those what `seen` says, and all stand `ahead` places after the former.
        """
        held = self.length
        if seen is not None:
            real = held + r - seen.shape[1]
            place = torch.full((1, r), real + ahead, device=device)
            return place, torch.cat([seen.new_ones(r, real), seen], 1)[None, None]
        place = torch.arange(held, held + r, device=device)[None]
        if r == 1:
            return place, None
        return place, torch.ones(1, 1, r, held + r, dtype=torch.bool, device=device).tril(held)

    def commit(self, held: int, path: Tensor, length: int) -> None:
        """Of the rows after the first `held` keep those at `path` [r], in this order, and of all the first `length`.

        held 4, path [0, 2, 5], length 7: rows 4, 6, 9 now stand at 4, 5, 6. One gather a layer, of fixed size.
        """
        for layer in self.layers:
            for rows in (layer.keys, layer.values):
                rows[:, :, held : held + len(path)] = rows[:, :, held + path]
        self.crop(length)


# --- static shapes --------------------------------------------------------------------------------------------------

ATTENTION = ("auto", "sdpa", "bmm", "flex")
BLOCK = 128  # keys in a block of flex attention


class StaticCache(Cache):
    """Keys and values of B sequences, `length` [B] rows of each held: a tensor, as nothing here asks the device.

    All layers' keys are one tensor [layers, B, heads, capacity, head_dim], and their values another. A forward is laid
    out by `layout`, writes its rows where that says, and sees the first `bucket` rows under the mask made there.
    A compiled layer finds its own where `select` put them before, so that one kind of layer is compiled once. It finds
    them as tables of rows [B * heads * capacity, head_dim], for that is what the compiler can write in place.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        shape = (layers, batch, heads, capacity, width)
        self.all_keys, self.all_values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self._count = torch.arange(capacity, device=device)
        self.see(capacity)
        self.groups = 1  # query heads that share a key head
        self.attention = "auto"
        self.lay_out: Callable[..., Any] = StaticCache._lay_out  # or what was compiled from it
        self._first = torch.arange(0, batch * heads * capacity, capacity, device=device).view(batch, heads, 1)

    @property
    def bucket(self) -> int:
        """Rows that a forward sees: the size of a tensor, for a compiler can be told that another's may differ."""
        return len(self._seen)

    def see(self, bucket: int, one_of_many: bool = False) -> None:
        """The first `bucket` rows. one_of_many: to be compiled for any number at once, not at first for this one."""
        self._seen, self._many = self._count[:bucket], one_of_many
        self.mark(self._seen)

    def mark(self, seen: Any) -> None:
        """Tells a compiler that the last dimension of what it made, or will be given, has `bucket` entries."""
        if self._many and isinstance(seen, Tensor) and not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(seen, seen.ndim - 1)

    def load(self, row: int, cache: KVCache) -> None:
        """Copy the rows held by the cache of one sequence to the front of sequence `row`."""
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                self.all_keys[index, row, :, : layer.length] = layer.keys[0, :, : layer.length]
                self.all_values[index, row, :, : layer.length] = layer.values[0, :, : layer.length]

    def select(self, layer: int) -> None:
        """The layer whose rows come next."""
        self.keys, self.values = (rows[layer].flatten(0, 2) for rows in (self.all_keys, self.all_values))

    def close(self) -> None:
        """Give the memory back, whoever may still name the tensors (a compiler keeps what it has seen)."""
        for rows in (self.all_keys, self.all_values):
            rows.untyped_storage().resize_(0)

    def crop(self, length: Tensor) -> None:
        """Hold the first `length` [B] rows; the others are overwritten by what comes next."""
        self.length = length

    def layout(
        self, r: int, device: torch.device, seen: Tensor | None = None, ahead: int | Tensor = 0
    ) -> tuple[Tensor, Tensor | BlockMask]:
        """Position ids [B, r] of the r rows that follow, and the mask that `attend` takes, as `KVCache.layout` does.

        `seen` is bool [r, s] or [B, r, s], `ahead` may differ by row: int, [r] or [B, r].
        """
        place, mask = self.lay_out(self, r, seen, ahead)
        self.mark(mask)
        return place, mask

    def _lay_out(self, r: int, seen: Tensor | None, ahead: int | Tensor) -> tuple[Tensor, Tensor | BlockMask]:
        start, count, bucket = self.length[:, None], self._count, self.bucket
        batch, at = len(start), start + count[:r]
        if seen is None:
            place, sees = at, self._seen <= at[..., None]
        else:
            s = seen.shape[-1]
            real = start + (r - s)
            place = (real + ahead).expand(batch, r)
            # a sequence that is done may stand beyond the bucket: its rows see anything, its keys land within
            own = (real + count[:s]).clamp(max=bucket - 1)[:, None].expand(batch, r, s)
            sees = (self._seen < real[..., None]).expand(batch, r, bucket).scatter(2, own, seen.expand(batch, r, s))
        self._at = (self._first + at[:, None]).flatten()
        self.length = self.length + r
        return place, self._mask(sees, r)

    def _mask(self, sees: Tensor, r: int) -> Tensor | BlockMask:
        """sees bool [B, r, bucket] in the form that suits the kind of attention."""
        if self.attention == "flex":
            blocks = -(-self.bucket // BLOCK)
            used = ((self.length + BLOCK - 1) // BLOCK).clamp(max=blocks).int()[:, None, None]
            order = torch.arange(blocks, dtype=torch.int32, device=sees.device).expand(len(used), 1, 1, -1).contiguous()

            def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
                return sees[b, row, key]

            return BlockMask.from_kv_blocks(
                used, order, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(r, self.bucket)
            )
        return groups.for_few(sees, self.groups, self.all_keys.dtype)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, heads, r, head_dim] where `layout` said; return the first `bucket` rows."""
        if not torch.compiler.is_compiling():
            self.select(layer_idx)
        seen = []
        for rows, states in ((self.keys, key_states), (self.values, value_states)):
            rows.index_put_((self._at,), states.reshape(-1, states.shape[-1]))
            seen.append(rows.view(self.all_keys.shape[1:])[:, :, : self.bucket])
        return seen[0], seen[1]

    def commit(self, held: Tensor, path: Tensor) -> None:
        """Of the rows after the first `held` [B] bring those at `path` [B, r] to the front: one gather for all keys.

        held 4, path [0, 2, 5]: rows 4, 6, 9 now stand at 4, 5, 6.
        """
        layers, _, heads, _, width = self.all_keys.shape

        def index(at: Tensor) -> Tensor:
            return at[None, :, None, :, None].expand(layers, -1, heads, -1, width)

        taken, put = index(held[:, None] + path), index(held[:, None] + self._count[: path.shape[1]])
        for rows in (self.all_keys, self.all_values):
            rows.scatter_(3, put, rows.gather(3, taken))


def register(kind: str) -> str:
    """Make `attend` of that kind known to transformers' layers; returns its name for `_attn_implementation`."""
    name = f"psnb_{kind}"
    AttentionInterface.register(name, functools.partial(attend, kind=kind))
    return name


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask,
    scaling: float | None = None,
    kind: str = "auto",
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for few queries over the keys of a `StaticCache`.

    query [B, heads, r, D], key, value [B, groups, bucket, D] -> [B, r, heads, D], laid out as by `groups.few`.
    sdpa: torch's fused attention. bmm: two matrix products, which cut the keys among more of a GPU. flex: flex
    attention, which skips the blocks of keys that are not used yet. auto: bmm on a GPU for more than one row a key
    head, else sdpa. At Llama-2-7B shape (one row a key head) a plain step is 9 % faster so on an H200, but cuDNN's sums
    in bfloat16 vary there from one generation to the next, and bmm's do not (results/h200/training_log.md).
    """
    batch, heads, r, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    if kind == "flex":
        flex = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
        made = flex(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=heads != key.shape[1])
        return made.transpose(1, 2).contiguous(), None
    if kind == "sdpa" or (kind == "auto" and not (query.is_cuda and heads * r > key.shape[1])):
        made = groups.few(query, key, value, attention_mask, scale)
    else:
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.reshape(batch, key.shape[1], -1, width) * scale) @ key.mT + attention_mask
        made = (scores.softmax(-1, dtype=wide).to(value.dtype) @ value).view(query.shape)
    return made.transpose(1, 2).contiguous(), None
