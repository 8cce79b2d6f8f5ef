"""How weights lie in memory, so that products of a few rows are fast.

On a GPU they are bound by their number, not by their size, so projections that read the same input are one matrix
product: query, key and value; a gated block's gate and up. Of one row, what they read is computed first. On a CPU it
matters whether a weight lies there row by row or column by column, and in which number format.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
AFTER = "down_proj"


@torch.library.custom_op("psnb::settle", mutates_args=("x",))
def settle(x: Tensor) -> None:
    """Does nothing, but the compiler has to have computed x before, and whatever reads it afterwards reads that."""


@settle.register_fake
def _(x: Tensor) -> None:
    return None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., n], weight [m, n] -> [..., m]. Of one row, the compiler may not compute x as a part of the product.

    It makes a reduction of such a product, and would compute x, a norm or a gate, anew for every few outputs. On an
    H100 that took 122 us in place of 96 for gate and up of Llama-2-13B (5,120 x 27,648), 60 in place of 54 for its
    query, key and value.
    """
    if x.numel() == x.shape[-1]:
        settle(x)
    return F.linear(x, weight, bias)


def join(tensors: Sequence[nn.Parameter]) -> Tensor:
    """Parameters [r_i, ...] as one tensor [sum r_i, ...] of the same memory: they keep their values, and move there.

    Parameters that are joined already are not moved.
    """
    first, start = tensors[0], tensors[0].storage_offset()
    for one in tensors:
        there = one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and one.storage_offset() == start
        if not (there and one.is_contiguous()):
            break
        start += one.numel()
    else:
        return first.data.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())
    made = torch.cat([one.data for one in tensors])
    for one, part in zip(tensors, made.split([len(one) for one in tensors]), strict=True):
        one.data = part
    return made


class Joined(nn.Module):
    """A product of one input, of which several parts are asked for, one after the other."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.weight = nn.Parameter(join([part.weight for part in parts]), requires_grad=False)
        has_bias = parts[0].bias is not None
        self.bias = nn.Parameter(join([part.bias for part in parts]), requires_grad=False) if has_bias else None
        self.made: tuple[Tensor, ...] = ()
        self.left = 0

    def take(self, index: int, x: Tensor) -> Tensor:
        if not self.left:
            made = product(x, self.weight, self.bias)
            self.made, self.left = made.split(self.sizes, -1), len(self.sizes)
        taken = self.made[index]
        self.left -= 1
        if not self.left:
            self.made = ()
        return taken


class Part(nn.Module):
    """Stands for one of the projections."""

    def __init__(self, whole: Joined, index: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.take(self.index, x)


class Apart(nn.Module):
    """Stands for the projection after a gate."""

    def __init__(self, own: nn.Linear) -> None:
        super().__init__()
        self.weight = own.weight

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def parts(layers: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Of all plain linear projections in `layers` that belong together: (block, name, what stands for it)."""
    made = []
    for block in layers.modules():
        for names in GROUPS:
            found = [getattr(block, name, None) for name in names]
            alike = all(type(one) is nn.Linear for one in found) and len({one.bias is None for one in found}) == 1
            if alike and len({(one.in_features, one.weight.dtype) for one in found}) == 1:
                whole = Joined(found)
                made += [(block, name, Part(whole, index)) for index, name in enumerate(names)]
        after = getattr(block, AFTER, None)
        if type(after) is nn.Linear and after.bias is None:
            made.append((block, AFTER, Apart(after)))
    return made


@contextlib.contextmanager
def swapped(stands: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Inside, the `parts` take the places of the projections."""
    before = [getattr(block, name) for block, name, _ in stands]
    try:
        for block, name, part in stands:
            setattr(block, name, part)
        yield
    finally:
        for (block, name, _), own in zip(stands, before, strict=True):
            setattr(block, name, own)


def by_columns(module: nn.Module) -> None:
    """Lays the float32 weights of linear layers on a CPU out column by column; values and shapes stay.

    So products of a few rows read them in order. An 8 x 320 model on two cores of a Xeon, ms a pass of 1, 5 and 9 rows:
    2.96, 4.49, 4.89 before, 3.08, 3.85, 4.41 after. A weight that is an embedding as well stays, as that reads rows.
    """
    embedded = {one.weight.data_ptr() for one in module.modules() if isinstance(one, nn.Embedding)}
    for one in module.modules():
        if type(one) is not nn.Linear or one.weight.data_ptr() in embedded:
            continue
        if one.weight.device.type == "cpu" and one.weight.dtype == torch.float32:
            one.weight.data = one.weight.data.t().contiguous().t()


@functools.cache
def bfloat16_pays(width: int, inner: int, layers: int, repeats: int = 15, least: float = 0.3) -> bool:
    """Whether this CPU multiplies 8 rows by matrices [inner, width] in less time in bfloat16 than in float32.

    So many rows has a pass that verifies a draft. (For one row the answer may be another, and with both it changed from
    run to run on one machine: `measure.PLAIN32` shows what plain decoding makes of the other format.) Measured for
    `least` seconds, with as many matrices as a model of so many layers has or as fit in 64 MB: small ones may well be
    slower in bfloat16, which pays a fixed price a product, even where the hardware computes in it.
    """
    count = max(1, min(layers, 2**24 // (width * inner)))
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.inference_mode():
        models = {d: nn.Sequential(*(nn.Linear(width, inner, False, dtype=d) for _ in range(count))) for d in best}
        inputs = {d: torch.zeros(8, width, dtype=d) for d in best}
        by_columns(models[torch.float32])
        start, turns = time.perf_counter(), 0
        while turns < repeats or time.perf_counter() - start < least:
            turns += 1
            for dtype, model in models.items():
                began = time.perf_counter()
                for one in model:
                    one(inputs[dtype])
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.bfloat16] < best[torch.float32]
