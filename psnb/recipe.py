"""How to train a parallel drafter: variants of one spec, trained alike and judged alike.

    python -m psnb.recipe --profile h200 --steps 1000 --seeds 2410 2411

writes results/<profile>/recipe.csv, which notebook 06 reads. A variant is judged twice: by greedy agreement on held-out
text (train.acceptance), and by `tokens_per_step` of chains on text that the target wrote itself.

Under `coupled` sampling the text does not depend on the drafter (DESIGN section 3), so a drafter can be judged on text
that is already there: all anchors are drafted from at once, and a walk over the text visits those at which decoding
would have begun a round. That is decoding's own tokens_per_step, without decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from psnb import drafters, groups, manifest
from psnb.drafters import Drafter
from psnb.errors import UserError
from psnb.fit import Batch
from psnb.profile import DrafterSpec, nearest
from psnb.respond import write
from psnb.study import Study
from psnb.target import Target, as_batch
from psnb.train import slots, teacher, train_drafter

COLUMNS = ("variant", "seed", "steps", "tokens", "seconds", "step_ms", "metric", "value", "low", "high", "n")
ROW = 2**20  # positions of noise that a row of text owns
SHARPEN = 1.5  # scale of the logits beside the noise: decode.Settings.sharpen


@dataclass(frozen=True)
class Variant:
    """A drafter spec that differs from the base in `changes` (of DrafterSpec), trained on the corpus or `responses`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    responses: str = "corpus"

    def spec(self, base: DrafterSpec, steps: int) -> DrafterSpec:
        """The base with the changes and a budget of `steps`; `learning_rate` among the changes is the budget's."""
        changes = dict(self.changes)
        budget = {"steps": steps, "evaluate_every": 0}
        budget |= {"learning_rate": changes.pop("learning_rate")} if "learning_rate" in changes else {}
        return dataclasses.replace(base, **changes, train=dataclasses.replace(base.train, **budget))


GRID = (
    Variant("base"),
    Variant("1 layer", {"layers": 1}),
    Variant("4 layers", {"layers": 4}),
    Variant("no warm start", {"warm_start": ""}),
    Variant("slot_decay 0.5", {"slot_decay": 0.5}),
    Variant("slot_decay 0.9", {"slot_decay": 0.9}),
    Variant("slot_decay 1", {"slot_decay": 1.0}),
    Variant("keep 1", {"keep": 1.0}),
    Variant("keep 0.7, 0.2", {"keep": 0.7, "keep_min": 0.2}),
    Variant("keep 0.5, 0.1", {"keep": 0.5, "keep_min": 0.1}),
    Variant("taps 2 5", {"taps": [2, 5]}),
    Variant("shared masks", {"mask_mode": "shared"}),
    Variant("feature loss 0.1", {"feature_weight": 0.1}),
    Variant("hard labels", {"labels": "hard"}),
    Variant("streak 0.3", {"streak_weight": 0.3}),
    Variant("curriculum 0.5", {"curriculum": 0.5}),
    Variant("target's text", {}, "target"),
    Variant("rate 3e-3", {"learning_rate": 3e-3}),
)


# --- judging ------------------------------------------------------------------------------------------------------


def text(target: Target, rows: Batch, prefix: int, temperature: float, seed: int, graph: bool = False) -> Batch:
    """What the target writes after the first `prefix` tokens of rows [R, n] that begin with so long a document.

    input_ids [R', n], document [R', n] (0, and -1 after an end token), in the noise of (seed, r * ROW + position).
    """
    ids, document = rows["input_ids"], rows["document"]
    length = ids.shape[1]
    ids = ids[(document[:, :prefix] == 0).all(1), :prefix]
    if not len(ids):
        raise UserError(f"no row begins with a document of {prefix} tokens: lower prefix")
    how = {"length": ROW, "temperature": temperature, "seed": seed, "graph": graph}
    more = write(target, ids.tolist(), range(len(ids)), length - prefix, **how).cpu()
    more = torch.nn.functional.pad(more, (0, length - prefix - more.shape[1]))
    ends = more == (-1 if target.eos_token_id is None else target.eos_token_id)
    after = ends.cumsum(1) - ends.int() > 0  # behind the first end token
    document = torch.cat([torch.zeros(len(ids), prefix, dtype=torch.long), -after.long()], 1)
    return {"input_ids": torch.cat([ids, more], 1), "document": document}


def drafted(drafter: Drafter, batch: Batch, k: int, worth: Tensor, sharpen: float) -> Tensor:
    """Chains of k drafted from every anchor of given text at once: batch of [B, n] -> tokens [B, n - 1, k].

    worth [B, n, V] is what is added to the sharpened logits of a token at a position (noise, in units of logits / T);
    slot i of anchor t drafts x_{t+2+i}. EAGLE's later passes are rows of its group: row (d, t) is fed its own draft.
    """
    ids, document = batch["input_ids"], batch["document"]
    n = ids.shape[1]
    features = teacher(drafter.target, batch, drafter.spec.taps)

    def pick(hidden: Tensor, slot: int) -> Tensor:
        at = (torch.arange(n - 1, device=ids.device) + 2 + slot).clamp(max=n - 1)
        return (drafter.logits(hidden, slot).float() * sharpen + worth[:, at]).argmax(-1)

    if drafter.one_pass:
        depth, anchor = (x.to(ids.device) for x in groups.layout(n - 1, drafter.masks))
        made = slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1))
        return torch.stack([pick(hidden, slot) for slot, (hidden, *_) in enumerate(made[:k])], -1)
    hidden, token, fed, tokens = features[:, :-1], ids[:, 1:], [], []
    for slot in range(k):
        fed.append(drafter.fuse(hidden, token))
        depth, anchor = (x.to(ids.device) for x in groups.layout(n - 1, slot))
        place = groups.positions(document)[:, anchor] + depth
        attention = groups.structure if drafter.spec.attention == "structured" else groups.mask
        mask = attention(depth, anchor, document[:, :-1])
        hidden = drafter.body(torch.cat(fed, 1), place, mask)[:, 1 - n :]
        token = pick(hidden, slot)
        tokens.append(token)
    return torch.stack(tokens, -1)


def walk(accepted: np.ndarray, prefix: int, end: int, k: int) -> list[int]:
    """Accepted counts of the rounds that decoding would make on one text, accepted [n - 1] of every anchor.

    The first anchor is prefix - 1; a round that accepts a moves on by a + 1; rounds that reach beyond `end` are left
    out. accepted [2 0 1 0 0 0], prefix 1, end 7, k = 2 -> [2, 0, 0].
    """
    found, anchor = [], prefix - 1
    while anchor + 2 + k <= end:
        found.append(min(int(accepted[anchor]), k))
        anchor += found[-1] + 1
    return found


@torch.no_grad()
def rounds(
    drafter: Drafter, rows: Batch, prefix: int, k: int, temperature: float, seed: int, sharpen: float, size: int = 4
) -> list[list[int]]:
    """Per row of `text`, the accepted counts of coupled decoding's rounds with chains of k."""
    device, vocab = drafter.target.device, drafter.target.vocab_size
    n = rows["input_ids"].shape[1]
    found = []
    for start in range(0, len(rows["input_ids"]), size):
        batch = {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}
        ids, count = batch["input_ids"], len(batch["input_ids"])
        worth = gumbels(seed, torch.arange(start, start + count, device=device), n, vocab) * temperature
        tokens = drafted(drafter, batch, k, worth, sharpen)
        at = torch.arange(n - 1, device=device)[:, None] + 2 + torch.arange(k, device=device)
        match = (tokens == ids[:, at.clamp(max=n - 1)]) & (at < n)
        accepted = match.int().cumprod(-1).sum(-1).cpu().numpy()
        ends = (batch["document"] >= 0).sum(1).tolist()
        found += [walk(accepted[r], prefix, ends[r], k) for r in range(count)]
    return found


def gumbels(seed: int, rows: Tensor, n: int, vocab: int) -> Tensor:
    """The noise of n positions of some rows of text: rows [B] -> [B, n, V]."""
    from psnb.verify import gumbel

    at = rows[:, None] * ROW + torch.arange(n, device=rows.device)
    return gumbel(seed, at.flatten(), vocab).view(len(rows), n, vocab)


def tokens_per_step(counts: Sequence[Sequence[int]], draws: int = 1000) -> tuple[float, float, float, int]:
    """Per row the accepted counts of its rounds -> (mean tokens a round, 95 % bootstrap interval over rows, rounds)."""
    table = np.array([(len(row), len(row) + sum(row)) for row in counts], dtype=float)
    pick = np.random.default_rng(0).integers(len(table), size=(draws, len(table)))
    low, high = np.percentile(np.divide(*table[pick].sum(1).T[::-1]), [2.5, 97.5])
    return table[:, 1].sum() / table[:, 0].sum(), low, high, int(table[:, 0].sum())


def judge(drafter: Drafter, written: Batch, prefix: int, ks: Iterable[int], temperature: float, seed: int) -> list[dict]:
    """Rows metric, value, low, high, n: tokens_per_step_k of coupled chains on `text`, at the default sharpening."""
    found = []
    for k in ks:
        counts = rounds(drafter, written, prefix, k, temperature, seed, SHARPEN)
        values = zip(("value", "low", "high", "n"), tokens_per_step(counts), strict=True)
        found.append({"metric": f"tokens_per_step_{k}", **dict(values)})
    return found


# --- training -------------------------------------------------------------------------------------------------------


def train_variant(
    variant: Variant,
    base: DrafterSpec,
    target: Target,
    rows: Batch,
    held_out: Batch,
    written: Batch,
    folder: Path,
    *,
    steps: int,
    seed: int,
    warm_start_from: Path | None,
    prefix: int,
    temperature: float,
    ks: Sequence[int] = (5,),
) -> pd.DataFrame:
    """Train a variant into `folder` and judge it: rows of COLUMNS.

    seconds: of the whole training, with its compilation; step_ms: median over the logged stretches of steps.
    """
    spec = variant.spec(base, steps)
    warm = warm_start_from if spec.warm_start else None
    train_drafter(spec, target, rows, held_out, folder, seed=seed, device=target.device, warm_start_from=warm)
    log = pd.read_csv(folder / "training.csv")
    times = log[log.metric == "seconds"]
    step_ms = 1e3 * (times.value.diff() / times.step.diff()).median()
    last = log[(log.step == steps) & log.metric.str.startswith("accept_")]
    found = last[["metric", "value"]].to_dict("records")
    found += judge(drafters.load(folder, target), written, prefix, [k for k in ks if k <= spec.k], temperature, seed=0)
    made = {"variant": variant.name, "seed": seed, "steps": steps, "tokens": int(log.tokens.max())}
    made |= {"seconds": round(times.value.iloc[-1], 1), "step_ms": step_ms}
    return pd.DataFrame([made | row for row in found]).reindex(columns=COLUMNS)
