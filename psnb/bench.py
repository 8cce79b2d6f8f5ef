"""The table of one machine in one run: plain decoding, transformers' own, every drafter of a profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from psnb import manifest, measure
from psnb.engine import Engines
from psnb.errors import UserError
from psnb.measure import ARM, Arm
from psnb.profile import DrafterSpec, nearest

if TYPE_CHECKING:
    from psnb.study import Study

SHOWN = {
    "tokens_per_second": "tokens/s",
    "tokens_per_step": "tokens/step",
    "speedup_vs_plain": "x plain",
    "speedup_vs_hf": "x generate",
    "first_token_ms": "first token, ms",
}


def arms(lengths: dict[str, int], nodes: int, specs: dict[str, DrafterSpec]) -> list[Arm]:
    """Baselines, then each drafter with a chain of its k and with its own tree of `nodes` nodes (0: chains alone).

    {"eagle": 5, "eagle-ps": 8}, 16 -> the three baselines, 2 chains, a dynamic and a best-first tree. `specs` are the
    drafters' own.
    """
    baselines = ("plain", "hf_generate", "hf_static")
    made = measure.chains({name: [0] for name in baselines} | {name: [k] for name, k in lengths.items()})
    grown = {name: [[k, nodes]] for name, k in lengths.items() if nodes}
    return made + measure.trees(grown, specs)


def spread(families: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts, the families in turn: ["a", "a", "b"], 2 -> [0, 2]."""
    place = pd.Series(families).groupby(list(families)).cumcount()
    return place.sort_values(kind="stable").index[:count].tolist()


def run(
    study: Study,
    *,
    methods: Sequence[str] = (),
    k: int = 5,
    nodes: int = 0,
    prompts: int = 8,
    tokens: int = 64,
    temperatures: Sequence[float] = (0.0, 0.7),
    repeats: int = 1,
) -> dict[str, Any]:
    """Measure; see `table`. `rows` are summary.csv's, over all prompts, and the time to the first token.

    Raises `UserError` for a method that the profile does not have, and for counts below 1.
    """
    least = {"k": (k, 1), "prompts": (prompts, 1), "tokens": (tokens, 2), "repeats": (repeats, 1)}
    for name, (count, bound) in least.items():  # the first token is the prompt's pass, so one token alone has no speed
        if count < bound:
            raise UserError(f"{name} = {count}: give {bound} or more")
    if nodes < 0 or not all(0 <= t < math.inf for t in temperatures):
        raise UserError(f"nodes = {nodes}, temperatures = {list(temperatures)}: none may be below 0")
    wrong = [name for name in methods if name not in study.profile.drafters]
    if wrong:
        raise UserError(f"unknown drafter {wrong[0]!r}; {nearest(wrong[0], study.profile.drafters)}")
    study.check_files(models=["target", *(methods or study.profile.drafters)])
    study = study.fastest()
    target = study.target()
    drafters = {name: study.drafter(name) for name in methods or study.profile.drafters}
    every = study.prompts()
    chosen = every.select(spread(every["family"], prompts))
    cuda = target.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    longest = min(max(map(len, chosen["input_ids"])) + max(measure.WARM, tokens), target.context)
    # made here, to be asked how long they captured
    engines = Engines(target, drafters, length=longest) if measure.engine_plays(target) else None
    lengths = {name: min(k, drafter.k) for name, drafter in drafters.items()}
    for name, length in lengths.items():
        if length < k:
            manifest.say(f"{name}: drafts {length} tokens, not {k}: it was trained for no more")
    plan = arms(lengths, nodes, {name: drafter.spec for name, drafter in drafters.items()})
    budget = {"temperatures": temperatures, "max_new_tokens": tokens, "repeats": repeats}
    seed = study.profile.seed
    runs = measure.run(target, drafters, chosen, arms=plan, seed=seed, label="bench", engines=engines, **budget)
    rows = measure.summary(runs, "bench")
    first = runs.groupby([*ARM, "temperature"], sort=False)["prefill_s"].median()
    lines = [
        measure._row("bench", arm, temperature, "first_token_ms", 1e3 * seconds, len(chosen), "ms")
        for (*arm, temperature), seconds in first.items()
    ]
    return {
        "profile": study.profile.name,
        "dtype": study.profile.dtype,
        "revision": manifest.revision(study.root),
        "machine": manifest.machine(),
        "budget": {**budget, "prompts": len(chosen), "k": k, "nodes": nodes, "seed": seed},
        "capture_seconds": engines.capture_seconds if engines else 0.0,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "rows": pd.concat([rows[rows["task"] == "all"], pd.DataFrame(lines)], ignore_index=True).to_dict("records"),
    }


def table(found: dict[str, Any]) -> pd.DataFrame:
    """What `run` found, a line a way of decoding and temperature."""
    rows = pd.DataFrame(found["rows"]).fillna({"tree": "", "k": 0, "nodes": 0})
    index = ["temperature", "method", "tree", "k", "nodes"]
    wide = rows.pivot_table(index=index, columns="metric", values="value", sort=False)
    made = wide[[name for name in SHOWN if name in wide]].rename(columns=SHOWN).reset_index()
    ends = rows[rows["metric"] == "tokens_per_second"].set_index(index)[["low", "high"]].reindex(wide.index)
    made.insert(6, "95 %", ["" if a != a else f"{a:.1f} to {b:.1f}" for a, b in ends.itertuples(index=False)])
    return made.astype({"k": int, "nodes": int}).round(2)


def write(found: dict[str, Any], path: Path) -> None:
    """`run`'s result as JSON; NaN becomes null."""
    clean = [{name: None if value != value else value for name, value in row.items()} for row in found["rows"]]
    manifest.write_json(path, {**found, "rows": clean})
