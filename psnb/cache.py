"""Keys and values of fixed capacity: rows are appended by a forward and taken back by `crop`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

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

    def commit(self, held: int, path: Tensor, length: int) -> None:
        """Of the rows after the first `held` keep those at `path` [r], in this order, and of all the first `length`.

        held 4, path [0, 2, 5], length 7: rows 4, 6, 9 now stand at 4, 5, 6. One gather a layer, of fixed size.
        """
        for layer in self.layers:
            for rows in (layer.keys, layer.values):
                rows[:, :, held : held + len(path)] = rows[:, :, held + path]
        self.crop(length)
