"""Group-wise training of a drafter against the frozen target (DESIGN section 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from psnb import drafters, groups, manifest
from psnb.drafters import Drafter
from psnb.drafters.base import Layers
from psnb.errors import UserError
from psnb.fit import Batch, Metrics, Row, compiled, fit, generator, main_process
from psnb.profile import DrafterSpec
from psnb.target import Target, as_batch, check_rows

if TYPE_CHECKING:
    from datasets import Dataset

Slots = list[tuple[Tensor, Tensor, Tensor]]  # per slot: hidden [B, a, H], teacher position [a], valid [B, a]

LOGITS = 2**25  # entries of a table of logits held at once


class Term(NamedTuple):
    """One part of a loss, weight * total / tallies[tally]. Totals and tallies add up over batches and processes."""

    weight: float
    total: Tensor
    tally: int


class Scores(NamedTuple):
    """What the vocabulary says of one slot's rows, each [B, a]."""

    nats: Tensor  # cross entropy to the target's distribution, or to the text's token
    log_q: Tensor  # log probability of the text's token
    match: Tensor  # bool: the arg max is the target's


@torch.no_grad()
def teacher(target: Target, batch: Batch, taps: Sequence[int] = (), run: Callable[..., Tensor] | None = None) -> Tensor:
    """The frozen target's features of packed rows: batch of [B, n] -> [B, n, (1 + taps) * H], documents kept apart.

    `run` stands for `target.features` (compiled, say).
    """
    document = batch["document"]
    mask = groups.causal(document)
    return (run or target.features)(batch["input_ids"], groups.positions(document), mask, taps=taps)


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


def chains(places: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Per slot where each of its chains stood one slot before [a], and whether it is valid so far, bool [B, a].

    A chain reaches a slot where its anchor's masks are kept and its tokens valid up to there.
    """
    anchors = [place - slot for slot, (place, _) in enumerate(places)]  # clamped ends are never valid
    found = [(torch.arange(len(anchors[0]), device=anchors[0].device), places[0][1])]
    for slot in range(1, len(places)):
        back = torch.searchsorted(anchors[slot - 1], anchors[slot])
        found.append((back, found[-1][1][:, back] & places[slot][1]))
    return found


def tallies(drafter: Drafter, batch: Batch, anchor: Tensor, counts: list[int]) -> list[Tensor]:
    """What the terms of `group_terms` are divided by: valid rows of each slot, then, for the streak, chains."""
    places = judged(drafter, batch, anchor, counts)
    rows = [valid.sum() for _, valid in places]
    return rows + [alive.sum() for _, alive in chains(places)] if drafter.spec.streak_weight else rows


def _by_slot(drafter: Drafter, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parts by depth -> parts by slot; depths that are absent leave out the last slots."""
    if drafter.masks == 0:  # every slot is drafted from the real rows: Medusa's heads, EAGLE's first pass
        return parts[:1] * (drafter.k if drafter.spec.kind == "medusa" else 1)
    return parts[-drafter.first_slot :]


def slots(drafter: Drafter, batch: Batch, features: Tensor, depth: Tensor, anchor: Tensor, counts: list[int]) -> Slots:
    """The drafter's training forward, cut by slot.

    features [B, n, (1 + taps) * H]; depth, anchor [R], counts as in `judged`.
    """
    ids, document = batch["input_ids"], batch["document"]
    place = groups.positions(document)[:, anchor] + depth
    attention = groups.structure if drafter.spec.attention == "structured" else groups.mask
    mask = attention(depth, anchor, document[:, :-1])
    hidden = drafter.rows(features[:, :-1], ids[:, 1:], depth, anchor, place, mask)
    by_slot = _by_slot(drafter, hidden.split(counts, 1))
    return [(rows, *how) for rows, how in zip(by_slot, judged(drafter, batch, anchor, counts), strict=True)]


def _measure(z: Tensor, w: Tensor, token: Tensor, hard: bool, streak: bool) -> tuple[Tensor, ...]:
    """Drafter's and target's logits z, w [..., V], token [...] -> nats, log_q, match [...], and two slopes [..., V].

    The slopes are those of nats (q - p) and, for the streak, of log_q (onehot - q) with respect to z.
    """
    log_q = z.float().log_softmax(-1)
    q, at = log_q.exp(), token[..., None]
    own = log_q.gather(-1, at).squeeze(-1)
    one = torch.zeros_like(q).scatter_(-1, at, 1.0)
    p = one if hard else w.float().softmax(-1)
    nats = -own if hard else -(p * log_q).sum(-1)
    slopes = [(q - p).to(z.dtype)] + ([(one - q).to(z.dtype)] if streak else [])
    return nats, own, z.argmax(-1) == w.argmax(-1), *slopes


@functools.cache
def _compiled_measure() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_measure, dynamic=True)


def _pieces(places: list[Tensor], batch: int, n: int, vocab: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Cut B rows of n positions so that a piece's logits are at most LOGITS entries.

    places[i] [a]: ascending teacher positions of slot i. Yields (batch rows, positions, per slot: its rows there).
    """
    wide = max(1, min(n, LOGITS // vocab))
    tall = max(1, LOGITS // (vocab * wide))
    edges = [*range(0, n, wide), n]
    if len(edges) == 2:  # every slot whole: nothing is read back from the device
        cuts = [[0, len(place)] for place in places]
    else:
        cuts = [torch.searchsorted(place, torch.tensor(edges, device=place.device)).tolist() for place in places]
    for start in range(0, batch, tall):
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            yield slice(start, start + tall), slice(low, high), [slice(cut[i], cut[i + 1]) for cut in cuts]


class _Vocabulary(torch.autograd.Function):
    """`score` for drafters with the target's frozen projection: the gradient is made with the loss, piece by piece.

    With q = softmax(z), z = W h: d nats / dh = W^T (q - p), d log_q / dh = W^T (onehot - q).
    """

    @staticmethod
    def forward(
        ctx: Any,
        target: Target,
        features: Tensor,
        ids: Tensor,
        places: list[Tensor],
        spec: DrafterSpec,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        weight = target.model.get_output_embeddings().weight
        measure = _compiled_measure() if ids.is_cuda else _measure
        streak, learns = spec.streak_weight > 0, any(ctx.needs_input_grad)
        shapes = [h.shape[:2] for h in hidden]
        values = [[ids.new_empty(s, dtype=kind) for s in shapes] for kind in (torch.float, torch.float, torch.bool)]
        slopes = [[torch.empty_like(h) for h in hidden] for _ in range(1 + streak)] if learns else []
        for rows, span, parts in _pieces(places, *ids.shape, target.vocab_size):
            wanted = target.logits(features[rows, span])  # once a position, whichever slots need it
            for i, part in enumerate(parts):
                if part.start == part.stop:
                    continue
                place = places[i][part]
                z = target.logits(hidden[i][rows, part])
                made = measure(z, wanted[:, place - span.start], ids[rows][:, place + 1], spec.labels == "hard", streak)
                for table, value in zip(values, made, strict=False):
                    table[i][rows, part] = value
                weight = weight.to(z.dtype)
                for table, slope in zip(slopes, made[3:], strict=False):
                    table[i][rows, part] = (slope @ weight).to(z.dtype)
        ctx.mark_non_differentiable(*values[2])
        ctx.save_for_backward(*(h for table in slopes for h in table))
        return tuple(value for table in values for value in table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = len(grads) // 3
        found = [grad[..., None] * slope for grad, slope in zip(grads, ctx.saved_tensors, strict=False)]
        if len(found) > count:
            found = [a + b for a, b in zip(found[:count], found[count:], strict=True)]
        return (None,) * 5 + tuple(found)


def score(drafter: Drafter, batch: Batch, features: Tensor, made: Slots) -> list[Scores]:
    """Hold every slot's rows against the target's vocabulary, no more than LOGITS logits of each at a time.

    batch of [B, n], features [B, n, (1 + taps) * H]; `made` as `slots` gives it.
    """
    target, ids, spec = drafter.target, batch["input_ids"], drafter.spec
    places, hidden = [place for _, place, _ in made], [h for h, _, _ in made]
    if drafter.frozen_head:
        flat = _Vocabulary.apply(target, features, ids, places, spec, *hidden)
        return [Scores(*flat[i :: len(made)]) for i in range(len(made))]

    def piece(h: Tensor, f: Tensor, token: Tensor, slot: int) -> tuple[Tensor, ...]:
        return _measure(drafter.logits(h, slot), target.logits(f), token, spec.labels == "hard", False)[:3]

    # a trained projection: the logits of a piece are made again in the backward pass
    found = []
    for slot, (h, place) in enumerate(zip(hidden, places, strict=True)):
        size = max(1, LOGITS // target.vocab_size)
        given = [x.flatten(0, 1).split(size) for x in (h, features[:, place], ids[:, place + 1])]
        parts = [checkpoint(piece, *part, slot, use_reentrant=False) for part in zip(*given, strict=True)]
        found.append(Scores(*(torch.cat(x).view(h.shape[:2]) for x in zip(*parts, strict=True))))
    return found


def group_terms(
    drafter: Drafter, batch: Batch, features: Tensor, depth: Tensor, anchor: Tensor, counts: list[int]
) -> tuple[list[Term], list[Tensor]]:
    """The loss in terms, and per slot [sum of nats, arg-max matches, valid rows].

    Weighted mean over slots, slot i weighing slot_decay^i, of ce_weight * CE(target's distribution, drafter)
    + feature_weight * SmoothL1(features); less streak_weight times SpecDiff-2's expected accepted prefix, the sum over
    m of the mean of prod_{j <= m} q_j(x_j) over the chains that reach slot m, x the text's own continuation.
    """
    spec = drafter.spec
    made = slots(drafter, batch, features, depth, anchor, counts)
    scores = score(drafter, batch, features, made)
    whole = sum(spec.slot_decay**slot for slot in range(len(made)))
    terms: list[Term] = []
    metrics: list[Tensor] = []
    for slot, ((hidden, place, valid), seen) in enumerate(zip(made, scores, strict=True)):
        weight, nats = spec.slot_decay**slot / whole, (seen.nats * valid).sum()
        terms.append(Term(weight * spec.ce_weight, nats, slot))
        if spec.feature_weight:
            expected = features[:, place, -hidden.shape[-1] :]
            gap = F.smooth_l1_loss(hidden.float(), expected.float(), reduction="none").mean(-1)
            terms.append(Term(weight * spec.feature_weight, (gap * valid).sum(), slot))
        metrics.append(torch.stack([nats.detach(), (seen.match & valid).sum(), valid.sum()]))
    if spec.streak_weight:
        run = torch.zeros_like(scores[0].log_q)
        for slot, (back, alive) in enumerate(chains([how for _, *how in made])):
            run = run[:, back] + scores[slot].log_q
            terms.append(Term(-spec.streak_weight, (run.exp() * alive).sum(), len(made) + slot))
    return terms, metrics


def group_loss(
    drafter: Drafter,
    batch: Batch,
    features: Tensor,
    depth: Tensor,
    anchor: Tensor,
    counts: list[int],
    totals: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The sum of `group_terms`, and its metrics.

    `totals` are the `tallies` of the whole batch, of which this one is a part; by default its own.
    """
    terms, metrics = group_terms(drafter, batch, features, depth, anchor, counts)
    totals = tallies(drafter, batch, anchor, counts) if totals is None else totals
    loss = torch.stack([term.weight * term.total / totals[term.tally].clamp(min=1) for term in terms]).sum()
    return loss, metrics


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
        features = teacher(drafter.target, batch, drafter.spec.taps)
        alive = torch.ones_like(batch["document"][:, :-1], dtype=torch.bool)
        made = slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1))
        for slot, (seen, (_, _, valid)) in enumerate(zip(score(drafter, batch, features, made), made, strict=True)):
            tried = alive & valid
            alive = tried & seen.match
            pair = torch.stack([alive.sum(), tried.sum(), valid.sum()])
            totals[slot] = totals.get(slot, 0) + pair
    values = {}
    for slot, (hits, tried, valid) in totals.items():
        values[f"accept_cond_{slot}"] = (hits / tried.clamp(min=1)).item()
        values[f"accept_uncond_{slot}"] = (hits / valid.clamp(min=1)).item()
    return values


def warm_start(drafter: Drafter, folder: Path) -> None:
    """Copy the tensors that the drafter in `folder` shares by name and shape; layers it lacks start as the identity.

    What reads taps that the other lacks starts with zeros there, so that it starts as the other.
    """
    try:
        weights = load_file(Path(folder) / "drafter.safetensors")
    except Exception as error:
        raise UserError(f"warm start: {folder} does not load ({str(error).splitlines()[0]}); train it first") from error
    own = drafter.state_dict()
    width = drafter.target.hidden_size
    for name in ("fc.weight", "mask_pair"):  # columns [embedding; taps; f_t]
        if name in own and name in weights and own[name].shape[1] > weights[name].shape[1] == 2 * width:
            embedding, last = weights[name].split(width, 1)
            taps = torch.zeros(len(last), own[name].shape[1] - 2 * width, dtype=last.dtype)
            weights[name] = torch.cat([embedding, taps, last], 1)
    shared = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    if not shared:
        raise UserError(f"warm start: {folder} shares no tensor with a {drafter.spec.kind} drafter")
    fresh = [n for n in own if n not in shared and n.endswith(("o_proj.weight", "down_proj.weight"))]
    drafter.load_state_dict({**own, **shared, **{name: torch.zeros_like(own[name]) for name in fresh}})


def masks_at(drafter: Drafter, step: int, steps: int) -> int:
    """Masks a group carries after `step` steps: with a curriculum the slots join evenly over its share of the steps.

    k = 4, curriculum = 0.5, 8 steps: slots 1 2 3 4 4 4 4 4.
    """
    joined = int(drafter.k * step / max(1.0, drafter.spec.curriculum * steps)) if drafter.spec.curriculum else drafter.k
    return max(0, min(drafter.masks, joined - drafter.first_slot))


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
    Raises `UserError` before the first step for rows from which nothing can be learned.
    """
    if spec.train is None:
        raise UserError(f"drafter {spec.kind}: the profile gives no training budget (drafters.*.train)")
    budget = spec.train if steps is None else dataclasses.replace(spec.train, steps=steps)
    held, rows = as_batch(held_out), as_batch(rows, device)
    check_rows(rows, target.vocab_size, target.context, ahead=2)
    torch.manual_seed(seed)
    drafter = drafters.build(spec, target)
    if warm_start_from is not None:
        warm_start(drafter, warm_start_from)
    n = rows["input_ids"].shape[1]
    run = compiled(target.features, budget, device)
    if budget.compile and device.type == "cuda":
        for body in (m for m in drafter.children() if isinstance(m, Layers)):
            body.compile()

    @functools.lru_cache(maxsize=1)  # `count` and each part of the step's batch ask for the same
    def layout(step: int) -> tuple[Tensor, Tensor, list[int]]:
        masks = masks_at(drafter, step - 1, budget.steps)
        draws = generator(seed, step)
        depth, anchor = groups.drop(n - 1, masks, spec.keep, spec.keep_min, draws, spec.anchors)
        return depth.to(device), anchor.to(device), torch.bincount(depth).tolist()

    def count(batch: Batch, step: int) -> list[Tensor]:
        return tallies(drafter, batch, *layout(step)[1:])

    def loss(batch: Batch, step: int, totals: list[Tensor]) -> tuple[Tensor, Metrics]:
        features = teacher(target, batch, spec.taps, run)
        value, parts = group_loss(drafter, batch, features, *layout(step), totals)
        metrics: Metrics = {}
        for slot, (nats, matches, valid) in enumerate(parts):
            metrics |= {f"loss_{slot}": (nats, valid), f"match_{slot}": (matches, valid)}
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
