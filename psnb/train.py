"""Group-wise training of a drafter against the frozen target (DESIGN section 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from psnb import drafters, groups, manifest
from psnb.drafters import Drafter
from psnb.errors import UserError
from psnb.fit import Batch, Metrics, Row, compiled, fit, generator, main_process
from psnb.profile import DrafterSpec
from psnb.target import Target, as_batch, check_rows

if TYPE_CHECKING:
    from datasets import Dataset

Slots = list[tuple[Tensor, Tensor, Tensor]]  # per slot: hidden [B, a, H], teacher position [a], valid [B, a]


@torch.no_grad()
def teacher(target: Target, batch: Batch) -> Tensor:
    """The frozen target's features of packed rows: batch of [B, n] -> [B, n, H], documents kept apart."""
    document = batch["document"]
    return target.features(batch["input_ids"], groups.positions(document), groups.causal_mask(document))


def judged(drafter: Drafter, batch: Batch, anchor: Tensor, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What each slot is judged by: per slot teacher position [a] and valid bool [B, a], from the rows alone.

    anchor [R] over the n - 1 anchors that know x_{t+1}; counts[d] rows have depth d. Slot i of anchor t is judged
    against the target's logits at t + 1 + i. It is valid where x_{t+2+i} lies in the anchor's document and, with a
    loss mask, is selected.
    """
    document = batch["document"]
    n = document.shape[1]
    chosen = batch["loss_mask"].bool() if "loss_mask" in batch else document >= 0
    result = []
    for slot, at in enumerate(_by_slot(drafter, anchor.split(counts))):
        token = (at + 2 + slot).clamp(max=n - 1)
        valid = (at + 2 + slot < n) & (document[:, token] == document[:, at]) & chosen[:, token]
        result.append((token - 1, valid))
    return result


def _by_slot(drafter: Drafter, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parts by depth -> parts by slot."""
    if drafter.masks == 0:  # every slot is drafted from the real rows: Medusa's heads, EAGLE's first pass
        return parts[:1] * (drafter.k if drafter.spec.kind == "medusa" else 1)
    return parts[-drafter.k :]


def slots(drafter: Drafter, batch: Batch, features: Tensor, depth: Tensor, anchor: Tensor, counts: list[int]) -> Slots:
    """The drafter's training forward, cut by slot: features [B, n, H]; depth, anchor [R], counts as in `judged`."""
    ids, document = batch["input_ids"], batch["document"]
    place = groups.positions(document)[:, anchor] + depth
    mask = groups.mask(depth, anchor, document[:, :-1])
    hidden = drafter.rows(features[:, :-1], ids[:, 1:], depth, anchor, place, mask)
    by_slot = _by_slot(drafter, hidden.split(counts, 1))
    return [(rows, *how) for rows, how in zip(by_slot, judged(drafter, batch, anchor, counts), strict=True)]


def group_loss(
    drafter: Drafter,
    batch: Batch,
    features: Tensor,
    depth: Tensor,
    anchor: Tensor,
    counts: list[int],
    totals: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Weighted mean over slots of ce_weight * CE(target's distribution, drafter) + feature_weight * SmoothL1(features).

    Slot i weighs slot_decay^i, and its sums are divided by totals[i] (`judged` of the whole batch, of which this one
    is a part; by default its own). Returns the loss and per slot [sum of CE, arg-max matches, valid rows].
    """
    spec = drafter.spec
    loss, weights = torch.zeros((), device=features.device), 0.0
    metrics: list[Tensor] = []
    for slot, (hidden, position, valid) in enumerate(slots(drafter, batch, features, depth, anchor, counts)):
        expected = features[:, position]
        logits = drafter.logits(hidden, slot).float()
        with torch.no_grad():
            wanted = drafter.target.logits(expected).float()
            p = wanted.softmax(-1)
            matches = (wanted.argmax(-1) == logits.argmax(-1)) & valid
        count = valid.sum()
        total = (count if totals is None else totals[slot]).clamp(min=1)
        ce = ((logits.logsumexp(-1) - (p * logits).sum(-1)) * valid).sum()
        term = spec.ce_weight * ce / total
        if spec.feature_weight:
            gap = F.smooth_l1_loss(hidden.float(), expected.float(), reduction="none").mean(-1)
            term = term + spec.feature_weight * (gap * valid).sum() / total
        weight = spec.slot_decay**slot
        loss, weights = loss + weight * term, weights + weight
        metrics.append(torch.stack([ce.detach(), matches.sum(), count]))
    return loss / weights, metrics


@torch.no_grad()
def acceptance(drafter: Drafter, rows: Batch, size: int = 4) -> dict[str, float]:
    """Greedy acceptance on given text, no generation: rows of [R, n] -> accept_cond_i, accept_uncond_i.

    Slot i counts as accepted where the arg max of drafter and target agree. EAGLE shows slot 0 only (its later slots
    need its own rollout). A cheap guide while training, not a result: results come from decoding.
    """
    n = rows["input_ids"].shape[1]
    device = drafter.target.device
    depth, anchor = (part.to(device) for part in groups.layout(n - 1, drafter.masks))
    totals: dict[int, Tensor] = {}
    for start in range(0, len(rows["input_ids"]), size):
        batch = {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}
        features = teacher(drafter.target, batch)
        alive = torch.ones_like(batch["document"][:, :-1], dtype=torch.bool)
        counts = [n - 1] * (drafter.masks + 1)
        for slot, (hidden, position, valid) in enumerate(slots(drafter, batch, features, depth, anchor, counts)):
            same = drafter.logits(hidden, slot).argmax(-1) == drafter.target.logits(features[:, position]).argmax(-1)
            tried = alive & valid
            pair = torch.stack([(tried & same).sum(), tried.sum(), valid.sum()])
            totals[slot] = totals.get(slot, 0) + pair
            alive = tried & same
    values = {}
    for slot, (hits, tried, valid) in totals.items():
        values[f"accept_cond_{slot}"] = (hits / tried.clamp(min=1)).item()
        values[f"accept_uncond_{slot}"] = (hits / valid.clamp(min=1)).item()
    return values


def warm_start(drafter: Drafter, folder: Path) -> None:
    """Copy the tensors that the drafter in `folder` shares by name and shape; layers it lacks start as the identity."""
    try:
        weights = load_file(Path(folder) / "drafter.safetensors")
    except Exception as error:
        raise UserError(f"warm start: {folder} does not load ({str(error).splitlines()[0]}); train it first") from error
    own = drafter.state_dict()
    shared = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    if not shared:
        raise UserError(f"warm start: {folder} shares no tensor with a {drafter.spec.kind} drafter")
    fresh = [n for n in own if n not in shared and n.endswith(("o_proj.weight", "down_proj.weight"))]
    drafter.load_state_dict({**own, **shared, **{name: torch.zeros_like(own[name]) for name in fresh}})


def train_drafter(
    spec: DrafterSpec,
    target: Target,
    rows: Dataset | Batch,
    held_out: Dataset | Batch,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    log: Callable[[Row], None] = lambda row: None,
    warm_start_from: Path | None = None,
    steps: int | None = None,
    state: Path | None = None,
) -> None:
    """Train a drafter on packed rows (data.pack); write it, spec.json and training.csv to `folder`.

    `steps` overrides the budget (the notebooks' live run). The target is frozen; its features are computed on the fly.
    A run that was killed goes on from what stands in `state`.
    """
    if spec.train is None:
        raise UserError(f"drafter {spec.kind}: the profile gives no training budget (drafters.*.train)")
    budget = spec.train if steps is None else dataclasses.replace(spec.train, steps=steps)
    torch.manual_seed(seed)
    drafter = drafters.build(spec, target)
    if warm_start_from is not None:
        warm_start(drafter, warm_start_from)
    held, rows = as_batch(held_out), as_batch(rows, device)
    check_rows(rows, target.vocab_size, target.context)
    n = held["input_ids"].shape[1]
    one_step = compiled(group_loss, budget, device)
    features_of = compiled(teacher, budget, device)

    @functools.lru_cache(maxsize=1)  # `count` and each part of the step's batch ask for the same
    def layout(step: int) -> tuple[Tensor, Tensor, list[int]]:
        depth, anchor = groups.drop(n - 1, drafter.masks, spec.keep, spec.keep_min, generator(seed, step))
        return depth.to(device), anchor.to(device), torch.bincount(depth).tolist()

    def count(batch: Batch, step: int) -> list[Tensor]:
        _, anchor, counts = layout(step)
        return [valid.sum() for _, valid in judged(drafter, batch, anchor, counts)]

    def loss(batch: Batch, step: int, totals: list[Tensor]) -> tuple[Tensor, Metrics]:
        value, parts = one_step(drafter, batch, features_of(target, batch), *layout(step), totals)
        metrics: Metrics = {}
        for slot, (ce, matches, valid) in enumerate(parts):
            metrics |= {f"loss_{slot}": (ce, valid), f"match_{slot}": (matches, valid)}
        return value, metrics

    lines = fit(
        drafter,
        loss,
        rows,
        budget,
        count=count,
        seed=seed,
        device=device,
        log=log,
        evaluate=lambda: acceptance(drafter, held),
        state=state,
    )
    if main_process():
        drafters.save(drafter, Path(folder))
        manifest.write_frame(Path(folder) / "training.csv", pd.DataFrame(lines))
