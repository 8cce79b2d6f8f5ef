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
import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from psnb import drafters, groups, manifest
from psnb.decode import Settings
from psnb.drafters import Drafter
from psnb.errors import UserError
from psnb.fit import Batch
from psnb.profile import DrafterSpec, nearest
from psnb.respond import cuts, write
from psnb.study import Study
from psnb.target import Target, as_batch
from psnb.train import slots, teacher, train_drafter
from psnb.verify import gumbel

COLUMNS = (
    *("batch", "variant", "seed", "steps", "rows", "tokens", "seconds", "step_ms"),
    *("k", "metric", "value", "low", "high", "n"),
)
ROW = 2**20  # positions of noise that a row of text owns
ROWS = 256  # texts that are judged, at most: so far positions stay below 2^28, the noise's limit
NAME = "recipe.csv"
BASE = "eagle-ps"  # the drafter that the grid varies


@dataclass(frozen=True)
class Variant:
    """A drafter spec that differs from the base in `changes` (of DrafterSpec), trained on the corpus or `responses`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    responses: str = "corpus"

    def spec(self, base: DrafterSpec, steps: int) -> DrafterSpec:
        """The base with the changes and a budget of `steps`; `learning_rate` and `optimizer` are the budget's."""
        changes = dict(self.changes)
        budget = {"steps": steps, "evaluate_every": 0}
        budget |= {name: changes.pop(name) for name in ("learning_rate", "optimizer") if name in changes}
        return dataclasses.replace(base, **changes, train=dataclasses.replace(base.train, **budget))


GRID = (
    Variant("base"),
    Variant("1 layer", {"layers": 1}),
    Variant("2 layers", {"layers": 2}),
    Variant("4 layers", {"layers": 4}),
    Variant("warm start", {"warm_start": "eagle"}),
    Variant("slot_decay 0.7", {"slot_decay": 0.7}),
    Variant("slot_decay 0.9", {"slot_decay": 0.9}),
    Variant("slot_decay 1", {"slot_decay": 1.0}),
    Variant("keep 1", {"keep": 1.0}),
    Variant("keep 0.7, 0.2", {"keep": 0.7, "keep_min": 0.2}),
    Variant("keep 0.6, 0.15", {"keep": 0.6, "keep_min": 0.15}),
    Variant("taps 2 5", {"taps": [2, 5]}),
    Variant("shared masks", {"mask_mode": "shared"}),
    Variant("feature loss 0.1", {"feature_weight": 0.1}),
    Variant("hard labels", {"labels": "hard"}),
    Variant("no streak", {"streak_weight": 0.0}),
    Variant("curriculum 0.5", {"curriculum": 0.5}),
    Variant("target's text", {}, "target"),
    Variant("rate 3e-3", {"learning_rate": 3e-3}),
    Variant("adamw", {"optimizer": "adamw"}),
    Variant("no link", {"link": 0}),
)


# --- judging ------------------------------------------------------------------------------------------------------


def text(
    target: Target, rows: Batch, prefix: int, temperature: float, seed: int, graph: bool = False, most: int = ROWS
) -> Batch:
    """What the target writes after prompts from rows [R, n], `most` at most: input_ids, document [R', n], prefix [R'].

    A prompt is the first `prefix` tokens of a row that begins with so long a document; of rows with a loss mask
    (chats), whatever `respond.cuts` finds in at most n / 2 tokens. document is 0, and -1 after an end token; row r is
    written in the noise of (seed, r * ROW + position).
    """
    ids, document = rows["input_ids"].cpu(), rows["document"].cpu()
    length = ids.shape[1]
    if "loss_mask" in rows:
        parts = zip(ids, document.numpy(), rows["loss_mask"].cpu().numpy(), strict=True)
        found = [row[begin:end].tolist() for row, *where in parts for begin, end in cuts(*where, prefix)]
        prompts = [prompt for prompt in found if len(prompt) <= length // 2][:most]
    else:
        prompts = ids[(document[:, :prefix] == 0).all(1), :prefix].tolist()[:most]
    if not prompts:
        raise UserError(f"no row begins with a document of {prefix} tokens, and none holds a chat: lower prefix")
    how = {"length": ROW, "temperature": temperature, "seed": seed, "graph": graph}
    more = write(target, prompts, range(len(prompts)), length - max(map(len, prompts)), **how)
    made = {"input_ids": torch.zeros(len(prompts), length, dtype=torch.long)}
    made["document"] = torch.full_like(made["input_ids"], -1)
    for r, (prompt, after) in enumerate(zip(prompts, more, strict=True)):
        whole = torch.tensor(prompt + after)
        made["input_ids"][r, : len(whole)], made["document"][r, : len(whole)] = whole, 0
    return made | {"prefix": torch.tensor([len(prompt) for prompt in prompts])}


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
        made = slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1), alone=1)
        before, tokens = ids[:, 1:], []
        for slot, hidden in enumerate(made.parts()[:k]):
            if drafter.link is not None:  # here every token is a candidate, in a draft the best few
                hidden = drafter.link(hidden, drafter.target.embed(before))
            before = pick(hidden, slot)
            tokens.append(before)
        return torch.stack(tokens, -1)
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
    drafter: Drafter, rows: Batch, ks: Sequence[int], temperature: float, seed: int, sharpen: float, size: int = 4
) -> dict[int, list[list[int]]]:
    """Of chains of each k, per row of `text`, the accepted counts of coupled decoding's rounds.

    The longest chains are drafted: a shorter one is the beginning of a longer one.
    """
    device, vocab, k = drafter.target.device, drafter.target.vocab_size, max(ks)
    n = rows["input_ids"].shape[1]
    found: dict[int, list[list[int]]] = {length: [] for length in ks}
    for start in range(0, len(rows["input_ids"]), size):
        batch = {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}
        ids, count = batch["input_ids"], len(batch["input_ids"])
        worth = gumbels(seed, torch.arange(start, start + count, device=device), n, vocab) * temperature
        tokens = drafted(drafter, batch, k, worth, sharpen)
        at = torch.arange(n - 1, device=device)[:, None] + 2 + torch.arange(k, device=device)
        match = (tokens == ids[:, at.clamp(max=n - 1)]) & (at < n)
        accepted = match.int().cumprod(-1).sum(-1).cpu().numpy()
        ends = (batch["document"] >= 0).sum(1).tolist()
        for r, prefix in enumerate(batch["prefix"].tolist()):
            for length, counts in found.items():
                counts.append(walk(accepted[r], prefix, ends[r], length))
    return found


def gumbels(seed: int, rows: Tensor, n: int, vocab: int) -> Tensor:
    """The noise of n positions of some rows of text: rows [B] -> [B, n, V]."""
    at = rows[:, None] * ROW + torch.arange(n, device=rows.device)
    return gumbel(seed, at.flatten(), vocab).view(len(rows), n, vocab)


def tokens_per_step(counts: Sequence[Sequence[int]], draws: int = 1000) -> tuple[float, float, float, int]:
    """Per row the accepted counts of its rounds -> (mean tokens a round, 95 % bootstrap interval over rows, rounds)."""
    table = np.array([(len(row), len(row) + sum(row)) for row in counts], dtype=float)
    pick = np.random.default_rng(0).integers(len(table), size=(draws, len(table)))
    low, high = np.percentile(np.divide(*table[pick].sum(1).T[::-1]), [2.5, 97.5])
    return table[:, 1].sum() / table[:, 0].sum(), low, high, int(table[:, 0].sum())


def judge(drafter: Drafter, written: Batch, ks: Sequence[int], temperature: float, seed: int) -> list[dict]:
    """Rows k, metric, value, low, high, n: tokens_per_step of coupled chains of each k on `text`."""
    found = []
    sharpen = Settings().sharpen
    for k, counts in rounds(drafter, written, ks, temperature, seed, sharpen).items():
        values = zip(("value", "low", "high", "n"), tokens_per_step(counts), strict=True)
        found.append({"k": k, "metric": "tokens_per_step", **dict(values)})
    return found


# --- training -------------------------------------------------------------------------------------------------------


def train_variant(
    spec: DrafterSpec,
    target: Target,
    rows: Batch,
    held_out: Batch,
    written: Callable[[], Batch],
    folder: Path,
    *,
    seed: int,
    warm_start_from: Path | None,
    temperature: float,
    ks: Sequence[int] = (5, 8),
) -> list[dict]:
    """Train `spec` into `folder` and judge it on `written()`: rows of COLUMNS from `rows` on.

    seconds: of the whole training, with its compilation; step_ms: median over the logged stretches of steps.
    """
    how = {"seed": seed, "device": target.device, "warm_start_from": warm_start_from}
    train_drafter(spec, target, rows, held_out, folder, **how)
    log = pd.read_csv(folder / "training.csv")
    times = log[log.metric == "seconds"]
    about = {
        "rows": len(rows["input_ids"]),
        "tokens": int(log.tokens.max()),
        "seconds": round(times.value.iloc[-1], 1),
        "step_ms": round(1e3 * (times.value.diff() / times.step.diff()).median(), 1),
    }
    last = log[(log.step == log.step.max()) & log.metric.str.startswith("accept_")]
    found = last[["metric", "value"]].to_dict("records")
    lengths = sorted({min(k, spec.k) for k in ks})
    found += judge(drafters.load(folder, target), written(), lengths, temperature, seed=0)
    return [about | row for row in found]


def load(study: Study) -> pd.DataFrame:
    """The rows of results/<profile>/recipe.csv, of this study or as shipped; empty if there are none."""
    for folder in (study.results, study.root / "results" / study.profile.name):
        if study.uses(folder / NAME).is_file():
            return pd.read_csv(folder / NAME, dtype={"batch": str})
    return pd.DataFrame(columns=COLUMNS)


def run(
    study: Study,
    variants: Sequence[Variant] = GRID,
    steps: int = 1000,
    seeds: Sequence[int] = (2410, 2411),
    prefix: int = 32,
    temperature: float = 0.7,
    base: str = BASE,
    ks: Sequence[int] = (5, 8),
    texts: int = ROWS,
    batch: str = "",
) -> pd.DataFrame:
    """Trains every variant with every seed, `steps` each; rows that results/<profile>/recipe.csv has are kept.

    base: the drafter that is varied; another one than BASE stands before its variants' names. Each is judged in chains
    of `ks` on `texts` texts. batch: what the rows are filed under (empty: the steps); "full" for trainings that are
    meant to be compared at equal minutes. A drafter that a variant starts from is trained first, if it is not there.
    Raises UserError.
    """
    if base not in study.profile.drafters:
        raise UserError(f"unknown drafter {base!r}; {nearest(base, study.profile.drafters)}")
    if not 0 < texts <= ROWS:
        raise UserError(f"texts = {texts}: between 1 and {ROWS} can be judged")
    if min(ks) < 1:
        raise UserError(f"ks = {list(ks)}: chains have 1 token or more")
    spec = study.profile.drafters[base]
    specs = {variant.name: variant.spec(spec, steps) for variant in variants}
    for name, varied in specs.items():
        if varied.warm_start not in ("", *study.profile.drafters):
            raise UserError(f"{name}: no drafter {varied.warm_start!r} to start from in this profile; leave it out")
    study = study.for_training()
    path = study.results / NAME
    done = pd.read_csv(path, dtype={"batch": str}) if path.is_file() else pd.DataFrame(columns=COLUMNS)
    target = study.target()
    warm = {start: study.checkpoint(start) for start in {varied.warm_start for varied in specs.values()} - {""}}
    for start in warm:
        study.drafter(start)
    train, held_out = (as_batch(rows) for rows in study._training_rows())
    held_out = {column: rows[:ROWS] for column, rows in held_out.items()}
    given = {"corpus": train}
    graph = target.device.type == "cuda"
    written = functools.cache(lambda: text(target, held_out, prefix, temperature, seed=0, graph=graph, most=texts))
    for seed, variant in itertools.product(seeds, variants):
        label = variant.name if base == BASE else f"{base}, {variant.name}"
        name = {"batch": batch or f"{steps} steps", "variant": label, "seed": seed, "steps": steps}
        if (done[list(name)] == list(name.values())).all(axis=1).any():
            continue
        if variant.responses not in given:
            data = dataclasses.replace(study.profile.data, responses=variant.responses)
            answered = dataclasses.replace(study, profile=dataclasses.replace(study.profile, data=data))
            given[variant.responses] = as_batch(answered._training_rows(base)[0])
        manifest.say(f"recipe: {label}, seed {seed}, {steps} steps")
        with tempfile.TemporaryDirectory() as folder:
            varied = specs[variant.name]
            made = train_variant(
                varied, target, given[variant.responses], held_out, written, Path(folder),
                seed=seed, warm_start_from=warm.get(varied.warm_start), temperature=temperature, ks=ks,
            )  # fmt: skip
        rows = pd.DataFrame([name | row for row in made]).reindex(columns=COLUMNS)
        done = pd.concat([done, rows], ignore_index=True) if len(done) else rows
        manifest.write_frame(path, done)
    return done


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a training: tokens_per_step of its shortest chains, what it gains on its batch's `base`, and its cost.

    The base of `medusa-ps, X` is `medusa-ps, base`, where there is one.

    A batch is what was trained on the same rows for the same steps; only within one are differences the recipe's.
    """
    taus = frame[frame.metric == "tokens_per_step"]
    taus = taus[taus.k == taus.groupby(["batch", "variant", "seed"]).k.transform("min")]
    others = [name.removesuffix("base") for name in taus.variant.unique() if name.endswith(", base")]
    bases = [next((own for own in others if name.startswith(own)), "") + "base" for name in taus.variant]
    means = taus.groupby(["batch", "variant"]).value.mean()
    taus = taus.assign(gain=taus.value - means.reindex(pd.MultiIndex.from_arrays([taus.batch, bases])).to_numpy())
    names = ["batch", "variant", "seed", "steps", "rows", "tokens", "step_ms", "k", "value", "low", "high", "gain"]
    return taus[names].rename(columns={"value": "tokens_per_step"}).sort_values("tokens_per_step", ignore_index=True)


def main(words: Sequence[str] | None = None) -> None:
    """The command line: the whole grid of a profile."""
    parser = argparse.ArgumentParser(prog="python -m psnb.recipe", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--output", default="", help="folder for results/ (default: the project's)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2410, 2411])
    parser.add_argument("--base", default=BASE, help="the drafter to vary (default: %(default)s)")
    parser.add_argument("--ks", type=int, nargs="+", default=[5, 8], help="lengths of the chains that are judged")
    parser.add_argument("--texts", type=int, default=ROWS, help="texts they are judged on (default: %(default)s)")
    parser.add_argument("--batch", default="", help='what the rows are filed under (default: "N steps")')
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants by name (default: all)")
    given = parser.parse_args(words)
    try:
        how = {"base": given.base, "ks": given.ks, "texts": given.texts, "batch": given.batch}
        run(Study.open(given.profile, given.output), select(given.only), given.steps, given.seeds, **how)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def select(names: Sequence[str]) -> list[Variant]:
    """Variants of the grid by name, all for none. Raises UserError for an unknown one."""
    known = {variant.name: variant for variant in GRID}
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"unknown variant {wrong[0]!r}; {nearest(wrong[0], known)}")
    return [known[name] for name in names] or list(GRID)


if __name__ == "__main__":
    main()
