"""Group-wise training of a drafter against the frozen target (DESIGN section 2)."""

from __future__ import annotations

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
from psnb.errors import UserError
from psnb.fit import Batch, Metrics, Row, compiled_layers, fit, generator, main_process
from psnb.profile import DrafterSpec
from psnb.target import Target, as_batch, check_rows

if TYPE_CHECKING:
    from datasets import Dataset

LOGITS = 2**26  # entries of a table of logits held at once
ALONE = 4  # in training one of so many linked rows does not hear of the token before it, for candidates come from these


class Slots(NamedTuple):
    """Which rows draft which slot, and what they are judged by: J rows in all."""

    sizes: list[int]  # rows of each of the S slots
    slot: Tensor  # [J]
    anchor: Tensor  # [J]
    place: Tensor  # [J] where the teacher's logits for it stand
    valid: Tensor  # bool [B, J]
    hidden: Tensor  # [B, J, H]; [B, n - 1, H] where all slots read the same rows (Medusa's heads)

    def parts(self) -> Sequence[Tensor]:
        """The hidden rows of each slot, anchor by anchor."""
        if self.hidden.shape[1] < len(self.slot):
            return [self.hidden] * len(self.sizes)
        return self.hidden[:, self.slot.argsort(stable=True)].split(self.sizes, 1)

    def table(self, values: Tensor, n: int) -> Tensor:
        """values [B, J] -> [B, S, n]: by slot and anchor, 0 where there is no row."""
        made = values.new_zeros(len(values), len(self.sizes), n)
        made[:, self.slot, self.anchor] = values
        return made


@torch.no_grad()
def teacher(target: Target, batch: Batch, taps: Sequence[int] = ()) -> Tensor:
    """The frozen target's features of packed rows: batch of [B, n] -> [B, n, (1 + taps) * H], documents kept apart."""
    document = batch["document"]
    mask = groups.causal(document)
    return target.features(batch["input_ids"], groups.positions(document), mask, taps=taps)


def judged(drafter: Drafter, batch: Batch, depth: Tensor, anchor: Tensor, counts: list[int]) -> Slots:
    """What each slot is judged by, from the rows alone (`hidden` is empty).

    depth, anchor [R] over the n - 1 anchors that know x_{t+1}; counts[d] rows have depth d. Slot i of anchor t is held
    against the target's logits at t + 1 + i. It is valid where x_{t+2+i} lies in the anchor's document and, with a
    loss mask, is selected. Depths that are absent leave out the last slots.
    """
    document = batch["document"]
    n = document.shape[1]
    chosen = batch["loss_mask"].bool() if "loss_mask" in batch else document >= 0
    if drafter.masks:
        sizes = counts[-drafter.first_slot :]
        slot, anchor = depth[-sum(sizes) :] + drafter.first_slot, anchor[-sum(sizes) :]
    else:  # every slot is drafted from the real rows: Medusa's heads, EAGLE's first pass
        heads = drafter.k if drafter.spec.kind == "medusa" else 1
        sizes = counts[:1] * heads
        slot = torch.arange(heads, device=depth.device).repeat_interleave(counts[0])
        anchor = anchor.repeat(heads)
    token = anchor + 2 + slot
    inside, token = token < n, token.clamp(max=n - 1)
    valid = inside & (document[:, token] == document[:, anchor]) & chosen[:, token]
    return Slots(sizes, slot, anchor, token - 1, valid, document.new_empty(0, 0, 0))


def tallies(drafter: Drafter, batch: Batch, depth: Tensor, anchor: Tensor, counts: list[int]) -> Tensor:
    """What `group_sums` are divided by, [2, S]: valid rows of each slot, and chains that reach it.

    A chain reaches a slot where its anchor's masks are kept and its tokens valid up to there.
    """
    made = judged(drafter, batch, depth, anchor, counts)
    valid = made.table(made.valid, batch["document"].shape[1])
    return torch.stack([valid.sum((0, 2)), valid.cumprod(1).sum((0, 2))])


def slots(
    drafter: Drafter,
    batch: Batch,
    features: Tensor,
    depth: Tensor,
    anchor: Tensor,
    counts: list[int],
    alone: int = 0,
) -> Slots:
    """The drafter's training forward: the rows that draft, by slot.

    features [B, n, (1 + taps) * H]; depth, anchor [R], counts as in `judged`. With a link the row of slot i of anchor t
    hears of the text's x_{t+1+i}; alone: but for one in so many (0: all hear, 1: none).
    """
    ids, document = batch["input_ids"], batch["document"]
    place = groups.positions(document)[:, anchor] + depth
    attention = groups.structure if drafter.spec.attention == "structured" else groups.mask
    mask = attention(depth, anchor, document[:, :-1])
    hidden = drafter.rows(features[:, :-1], ids[:, 1:], depth, anchor, place, mask)
    made = judged(drafter, batch, depth, anchor, counts)
    hidden = hidden[:, -len(made.slot) :]
    if drafter.link is not None and alone != 1:
        heard = drafter.link(hidden, drafter.target.embed(ids[:, made.place]))
        hidden = torch.where(((made.anchor + made.slot) % alone == 0)[:, None], hidden, heard) if alone else heard
    return made._replace(hidden=hidden)


def _measure(z: Tensor, w: Tensor, at: Tensor, token: Tensor, hard: bool, slopes: int) -> tuple[Tensor, ...]:
    """Drafter's logits z [b, j, V], the target's w [b, m, V], those of row j at at[j]; the text's tokens [b, j].

    Returns nats, log_q, match [b, j] and the first `slopes` of two [b, j, V]: of nats (q - p) and, for the streak, of
    log_q (onehot - q) with respect to z.
    """
    w, log_q = w[:, at], z.float().log_softmax(-1)
    q, token = log_q.exp(), token[..., None]
    own = log_q.gather(-1, token).squeeze(-1)
    one = torch.arange(z.shape[-1], device=z.device) == token
    p = one.float() if hard else w.float().softmax(-1)
    nats = -own if hard else -(p * log_q).sum(-1)
    found = nats, own, z.argmax(-1) == w.argmax(-1)
    if slopes > 0:
        found += ((q - p).to(z.dtype),)
    if slopes > 1:
        found += ((one.float() - q).to(z.dtype),)
    return found


@functools.cache
def _compiled_measure() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_measure, dynamic=True)


def _pieces(place: Tensor, batch: int, n: int, vocab: int) -> Iterator[tuple[slice, slice | Tensor, slice]]:
    """Cut B rows, each with logits for J rows [J] of n positions, so that a piece's logits are at most LOGITS entries.

    Yields (batch rows, index of the rows that draft, the teacher's positions they need).
    """
    count = len(place)
    wide = max(1, min(count, LOGITS // vocab))
    tall = max(1, LOGITS // (vocab * wide))
    cuts: list[tuple[slice | Tensor, slice]] = [(slice(0, count), slice(0, n))]
    if wide < count:  # in the order of the positions, so that a piece needs few of them
        cuts, order = [], place.argsort(stable=True)
        first, last = (place[order[i::wide]].tolist() for i in (0, wide - 1))
        last.append(n - 1)
        for index, low, high in zip(order.split(wide), first, last, strict=False):
            cuts.append((index, slice(low, high + 1)))
    for start in range(0, batch, tall):
        for index, span in cuts:
            yield slice(start, start + tall), index, span


class _Vocabulary(torch.autograd.Function):
    """`score` for drafters with the target's frozen projection: the gradient is made with the loss, piece by piece.

    With q = softmax(z), z = W h: d nats / dh = W^T (q - p), d log_q / dh = W^T (onehot - q).
    """

    @staticmethod
    def forward(
        ctx: Any, target: Target, features: Tensor, ids: Tensor, place: Tensor, spec: DrafterSpec, hidden: Tensor
    ) -> tuple[Tensor, ...]:
        weight = target.model.get_output_embeddings().weight
        measure = _compiled_measure() if ids.is_cuda else _measure
        streak, hard = spec.streak_weight > 0, spec.labels == "hard"
        shape = hidden.shape[:2]
        values = [ids.new_empty(shape, dtype=kind) for kind in (torch.float, torch.float, torch.bool)]
        slopes = [torch.empty_like(hidden) for _ in range(1 + streak)] if ctx.needs_input_grad[-1] else []
        for rows, index, span in _pieces(place, *ids.shape, target.vocab_size):
            z, at = target.logits(hidden[rows, index]), place[index]
            wanted = target.logits(features[rows, span])  # once a position, whichever slots need it
            made = measure(z, wanted, at - span.start, ids[rows, at + 1], hard, len(slopes))
            for table, value in zip(values, made, strict=False):
                table[rows, index] = value
            weight = weight.to(z.dtype)
            for table, slope in zip(slopes, made[3:], strict=False):
                table[rows, index] = (slope @ weight).to(table.dtype)
        ctx.mark_non_differentiable(values[2])
        ctx.save_for_backward(*slopes)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = [grad[..., None] * slope for grad, slope in zip(grads, ctx.saved_tensors, strict=False)]
        return *(None,) * 5, sum(found[1:], found[0])


def score(drafter: Drafter, batch: Batch, features: Tensor, made: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Hold the rows that draft against the target's vocabulary, no more than LOGITS logits at a time.

    batch of [B, n], features [B, n, (1 + taps) * H] -> each [B, J]: nats, the cross entropy to the target's
    distribution or to the text's token; log_q, the log probability of the text's token; match, whether the arg max is
    the target's.
    """
    target, ids, spec = drafter.target, batch["input_ids"], drafter.spec
    if drafter.frozen_head:
        return _Vocabulary.apply(target, features, ids, made.place, spec, made.hidden)

    def piece(h: Tensor, f: Tensor, token: Tensor, slot: int) -> tuple[Tensor, ...]:
        z, at = drafter.logits(h, slot), torch.zeros(1, dtype=torch.long, device=h.device)
        return measure(z[:, None], target.logits(f)[:, None], at, token[:, None], spec.labels == "hard", 0)

    # a trained projection: the logits of a piece are made again in the backward pass
    measure = _compiled_measure() if ids.is_cuda else _measure
    found: list[list[Tensor]] = [[], [], []]
    size = max(1, 4 * LOGITS // target.vocab_size)  # a piece is some sixty operations: of fewer ones a GPU waits less
    for slot, (h, place) in enumerate(zip(made.parts(), made.place.split(made.sizes), strict=True)):
        given = [x.flatten(0, 1).split(size) for x in (h, features[:, place], ids[:, place + 1])]
        parts = [checkpoint(piece, *part, slot, use_reentrant=False) for part in zip(*given, strict=True)]
        for table, values in zip(found, zip(*parts, strict=True), strict=True):
            table.append(torch.cat(values).view(h.shape[:2]))
    nats, log_q, match = (torch.cat(table, 1) for table in found)
    return nats, log_q, match


def group_sums(
    drafter: Drafter, batch: Batch, features: Tensor, depth: Tensor, anchor: Tensor, counts: list[int]
) -> dict[str, Tensor]:
    """What the loss is made of, each summed over the valid rows of a slot, [S].

    nats: CE(target's distribution, drafter); gap: SmoothL1(features); streak: prod_{j <= m} q_j(x_j) of the chains that
    reach slot m, x the text's own continuation (SpecDiff-2); match: arg maxes that agree; rows: valid rows.
    """
    spec, n = drafter.spec, batch["document"].shape[1]
    made = slots(drafter, batch, features, depth, anchor, counts, ALONE)
    valid = made.table(made.valid, n)
    nats, log_q, match = (made.table(values, n) for values in score(drafter, batch, features, made))
    sums = {"nats": nats * valid, "match": match & valid, "rows": valid}
    if spec.feature_weight:
        shared = made.hidden.shape[1] < len(made.slot)
        hidden = (torch.cat(list(made.parts()), 1) if shared else made.hidden).float()
        expected = features[:, made.place, -hidden.shape[-1] :].float()
        sums["gap"] = made.table(F.smooth_l1_loss(hidden, expected, reduction="none").mean(-1), n) * valid
    if spec.streak_weight:
        sums["streak"] = log_q.cumsum(1).exp() * valid.cumprod(1)
    return {name: table.sum((0, 2)).float() for name, table in sums.items()}


def group_loss(
    drafter: Drafter,
    batch: Batch,
    features: Tensor,
    depth: Tensor,
    anchor: Tensor,
    counts: list[int],
    totals: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its `group_sums`.

    Weighted mean over slots, slot i weighing slot_decay^i, of ce_weight * nats + feature_weight * gap, less
    streak_weight times the sum over m of the mean streak of slot m: SpecDiff-2's expected accepted prefix.
    `totals` are the `tallies` of the whole batch, of which this one is a part; by default its own.
    """
    spec = drafter.spec
    sums = group_sums(drafter, batch, features, depth, anchor, counts)
    totals = tallies(drafter, batch, depth, anchor, counts) if totals is None else totals
    rows, chains = totals.clamp(min=1)
    weights = spec.slot_decay ** torch.arange(len(rows), device=rows.device)
    loss = spec.ce_weight * sums["nats"]
    if spec.feature_weight:
        loss = loss + spec.feature_weight * sums["gap"]
    loss = (weights / weights.sum() * loss / rows).sum()
    if spec.streak_weight:
        loss = loss - spec.streak_weight * (sums["streak"] / chains).sum()
    return loss, sums


@torch.no_grad()
def acceptance(drafter: Drafter, rows: Batch, size: int = 4) -> dict[str, float]:
    """Greedy acceptance on given text, no generation: rows of [R, n] -> accept_cond_i, accept_uncond_i.

    Slot i counts as accepted where the arg max of drafter and target agree. EAGLE shows slot 0 only (its later slots
    need its own rollout). A cheap guide while training, not a result: results come from decoding.
    """
    n = rows["input_ids"].shape[1]
    device = drafter.target.device
    depth, anchor = (part.to(device) for part in groups.layout(n - 1, drafter.masks))
    totals: Tensor | float = 0.0
    for start in range(0, len(rows["input_ids"]), size):
        batch = {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}
        features = teacher(drafter.target, batch, drafter.spec.taps)
        made = slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1))
        valid, match = (made.table(x, n) for x in (made.valid, score(drafter, batch, features, made)[2]))
        alive = (match & valid).cumprod(1).bool()
        tried = torch.cat([valid[:, :1], alive[:, :-1] & valid[:, 1:]], 1)
        chains = valid.cumprod(1)  # with a loss mask a slot may count where one before it does not
        totals = totals + torch.stack([x.sum((0, 2)) for x in (alive, tried, chains)])
    hits, tries, judgements = totals
    values = {}
    for slot in range(len(hits)):
        values[f"accept_cond_{slot}"] = (hits[slot] / tries[slot].clamp(min=1)).item()
        values[f"accept_uncond_{slot}"] = (hits[slot] / judgements[slot].clamp(min=1)).item()
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
    state: Path | None = None,
) -> None:
    """Train a drafter on packed rows (data.pack); write it, spec.json and training.csv to `folder`.

    The target is frozen; its features are computed on the fly.
    A run that was killed goes on from what stands in `state`.
    Raises `UserError` before the first step for rows from which nothing can be learned.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if spec.train is None:
        raise UserError(f"drafter {spec.kind}: the profile gives no training budget (drafters.*.train)")
    held, rows = as_batch(held_out), as_batch(rows, device)
    check_rows(rows, target.vocab_size, target.context, ahead=2)
    torch.manual_seed(seed)
    drafter = drafters.build(spec, target)
    if warm_start_from is not None:
        warm_start(drafter, warm_start_from)
    n = rows["input_ids"].shape[1]

    @functools.lru_cache(maxsize=1)  # `count` and each part of the step's batch ask for the same
    def layout(step: int) -> tuple[Tensor, Tensor, list[int]]:
        masks = masks_at(drafter, step - 1, spec.train.steps)
        draws = generator(seed, step)
        depth, anchor = groups.drop(n - 1, masks, spec.keep, spec.keep_min, draws, spec.anchors)
        there = (part.to(device, non_blocking=True) for part in (depth, anchor))  # the host goes on
        return *there, torch.bincount(depth).tolist()

    def count(batch: Batch, step: int) -> Tensor:
        return tallies(drafter, batch, *layout(step))

    def loss(batch: Batch, step: int, totals: Tensor) -> tuple[Tensor, Metrics]:
        features = teacher(target, batch, spec.taps)
        value, sums = group_loss(drafter, batch, features, *layout(step), totals)
        metrics: Metrics = {}
        for slot, (nats, matches, rows) in enumerate(zip(sums["nats"], sums["match"], sums["rows"], strict=True)):
            metrics |= {f"loss_{slot}": (nats, rows), f"match_{slot}": (matches, rows)}
        return value, metrics

    with compiled_layers([target.model.base_model, *drafter.children()], spec.train, device):
        lines = fit(
            drafter,
            loss,
            rows,
            spec.train,
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
