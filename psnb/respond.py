"""Training text in the target's own words: packed rows are cut at a prompt, and the target writes on, in large batches.

A drafter is judged by what its target writes, so text of the target's is what it should see. Sampling is `coupled`'s
(verify.gumbel): token v at position s of row r is a function of (seed, r, s, v), so the text does not depend on how the
rows are batched, and a second run writes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import StaticCache

from psnb import manifest
from psnb.data import SHORTEST_WINDOW, pack
from psnb.errors import UserError
from psnb.fit import Batch
from psnb.target import Target, as_batch, check_rows
from psnb.verify import gumbel, perturb

LOOK = 32  # tokens between two looks at whether every row has ended: the only wait for the device


def cuts(document: np.ndarray, loss_mask: np.ndarray | None, prefix: int) -> list[tuple[int, int]]:
    """Prompts in one packed row: [n] -> (begin, end) of each.

    A window of text or code is cut after `prefix` tokens, a chat (a window whose loss mask leaves something out) where
    its last answer begins. Windows that are too short to cut have no prompt.

    document [0 0 0 0 1 1 1 1 1 -1], loss_mask [1 1 1 1 0 0 1 0 1 0], prefix 2 -> [(0, 2), (4, 8)]
    """
    found = []
    for number in range(int(document.max(initial=-1)) + 1):
        places = np.flatnonzero(document == number)
        begin, end = int(places[0]), int(places[-1]) + 1
        stop = begin + prefix
        if loss_mask is not None and not loss_mask[begin:end].all():
            starts = np.flatnonzero(np.diff(loss_mask[begin:end]) == 1)  # the token before each answer
            stop = begin + int(starts[-1]) + 1 if len(starts) else end
        if stop < end:
            found.append((begin, stop))
    return found


@torch.inference_mode()
def write(
    target: Target,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    new: int,
    *,
    length: int,
    temperature: float,
    seed: int,
    graph: bool = False,
) -> list[list[int]]:
    """What the target writes after each of B prompts, all at once: `new` tokens, or fewer where it ends, end included.

    It ends at the first of the target's `stop_tokens`.

    rows: B numbers that name the prompts' noise; `length` is more than any position that is of use. Shorter prompts are
    padded on the left, where nothing looks. The K/V cache is static, and with `graph` (a GPU) a token is one CUDA
    graph: no wait for the host but every LOOK tokens.
    """
    device, size, m = target.device, len(prompts), max(map(len, prompts))
    pad = torch.tensor([m - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (m - len(p)) + list(p) for p in prompts], device=device)
    first = torch.tensor(rows, device=device) * length  # of the noise's positions
    ends = torch.tensor(target.stop_tokens, dtype=torch.long, device=device)
    plain = copy.deepcopy(target.config)  # rows are within a sliding window, but padded ones may be longer
    plain.sliding_window, plain.layer_types = None, ["full_attention"] * target.layers
    cache = StaticCache(config=plain, max_cache_len=m + new)
    key = torch.arange(m + new, device=device)
    at = torch.arange(m, device=device)
    mask = (key <= at[:, None]) & (key >= pad[:, None, None])
    mask |= key == at[:, None]  # a padded row sees itself: no row without a key
    place = (at - pad[:, None]).clamp(min=0)
    written = torch.zeros(size, new, dtype=torch.long, device=device)
    key_of_noise = torch.tensor(seed, device=device)  # capturing a graph allows no copy from the host
    token, done = torch.zeros(size, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)

    def choose(features: Tensor, position: Tensor) -> None:
        """Samples x at `position` [B] from features [B, H] of the token before it."""
        noise = gumbel(key_of_noise, first + position, target.vocab_size) if temperature else None
        token.copy_(perturb(target.logits(features).float(), temperature, noise).argmax(-1, keepdim=True))
        written.index_copy_(1, done, token)
        done.add_(1)

    choose(target.features(ids, place, mask[:, None], cache)[:, -1], m - pad)
    seen, place = mask[:, None, -1:].contiguous(), (m - pad)[:, None]

    def step() -> None:
        seen.index_fill_(3, m - 1 + done, True)
        features = target.features(token, place, seen, cache)[:, 0]
        place.add_(1).clamp_(max=target.context - 1)
        choose(features, place[:, 0])

    run = step
    for count in range(1, new):
        if graph and count == 4:  # the first ones warmed up; capturing runs nothing
            captured = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(captured):
                step()
            run = captured.replay
        run()
        if count % LOOK == 0 and torch.isin(written[:, : count + 1], ends).any(1).all():
            break
    texts = written[:, : int(done)].tolist()
    return [text[: next((i for i, x in enumerate(text) if x in target.stop_tokens), new) + 1] for text in texts]


def respond(
    target: Target,
    rows: Dataset | Batch,
    prefix: int,
    temperature: float,
    seed: int,
    size: int = 1024,
    graph: bool = False,
) -> Dataset:
    """Packed rows [R, n] -> packed rows whose prompts (`cuts`) are the old ones and whose rest the target wrote.

    Columns input_ids, document and loss_mask, which selects the written part: up to its end token, or to n tokens in
    all. `size` prompts are written at once: n x layers x 2 x kv_heads x head_dim numbers of memory each. Raises
    UserError for rows that are not the target's, that are longer than its context, or that leave nothing to write.
    """
    batch = as_batch(rows)
    check_rows(batch, target.vocab_size, target.context)
    ids, document = batch["input_ids"].numpy(), batch["document"].numpy()
    masks = batch["loss_mask"].numpy() if "loss_mask" in batch else [None] * len(ids)
    length = ids.shape[1]
    prompts = [
        ids[r, begin:end].tolist()
        for r in range(len(ids))
        for begin, end in cuts(document[r], masks[r], prefix)
        if end - begin <= length - SHORTEST_WINDOW
    ]
    if not prompts:
        raise UserError(f"no row has a prompt to answer: windows of more than prefix = {prefix} tokens, or chats")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    texts: dict[int, tuple[list[int], int]] = {}
    for group in manifest.progress(groups, label="the target writes, batch"):
        chosen = [prompts[i] for i in group]
        new = length - len(chosen[0])  # what goes beyond `length` after a longer prompt is thrown away
        how = {"length": length, "temperature": temperature, "seed": seed, "graph": graph}
        for i, prompt, more in zip(group, chosen, write(target, chosen, group, new, **how), strict=True):
            more = more[: length - len(prompt)]
            texts[i] = prompt + more, len(more)
    lists = [texts[i] for i in range(len(prompts))]
    selected = [[0] * (len(text) - count) + [1] * count for text, count in lists]
    return pack(Dataset.from_dict({"input_ids": [text for text, _ in lists], "loss_mask": selected}), length)
