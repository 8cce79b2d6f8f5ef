"""What the numbers say: headline, goals, claims; the report page and README's results block.

Every sentence with a number in it is made from `summary.csv` (columns: DESIGN section 7); none is typed by hand.
"""

from __future__ import annotations

import base64
import html as escaping
import io
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

from psnb import manifest
from psnb.errors import UserError
from psnb.measure import COLUMNS
from psnb.plots import at_best, order, pick, shape_name, with_k

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

SPEEDUP, DRAFT_TIMES, LENGTHS = "04_speedup", "03_draft_times", "03_draft_length"  # stages of summary.csv
LOSSLESS, COST = "05_losslessness", "07_cost"
Goal = tuple[str, str, float, float | None]  # what, at most or at least or above, the bound, measured
MIDDLE = 0.7  # the temperature at which the study states its main numbers
SIBLINGS = {"eagle-ps": "eagle", "medusa-ps": "medusa"}
LARGE = ("llama-2-7b x 1", "llama-2-13b x 1")  # where reading the weights is most of a plain step


# --- numbers --------------------------------------------------------------------------------------------------------


def load(path: Path) -> pd.DataFrame:
    """summary.csv as a frame. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; `psnb run` measures it")
    numbers = {column: [""] for column in ("k", "nodes", "temperature", "value", "low", "high", "n")}
    return with_k(pd.read_csv(path, keep_default_na=False, na_values=numbers))


def value(summary: pd.DataFrame, metric: str, method: str, **where: Any) -> float | None:
    """One number: the row measured on the most prompts; None where there is none."""
    rows = pick(summary, metric, method=method, **where).sort_values("n")
    return None if rows.empty else float(rows.value.iloc[-1])


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def best(summary: pd.DataFrame, temperature: float = MIDDLE) -> pd.DataFrame:
    """The whole-set rows of the speedup notebook at one temperature, each method at its best draft shape there."""
    return at_best(pick(summary, stage=SPEEDUP, task="all", temperature=temperature))


def _spread(row: pd.Series) -> str:
    return f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})"


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a method at its best draft shape: tokens per step, tokens/s, speedup a temperature with its interval."""
    rows = at_best(pick(summary, stage=SPEEDUP, task="all"))
    temperatures = sorted(rows.temperature.dropna().unique())
    middle = min(temperatures, key=lambda t: abs(t - MIDDLE), default=MIDDLE)
    table = []
    for method in order(rows.method):
        own = rows[rows.method == method]
        line: dict[str, Any] = {"method": method, "draft": shape_name(*own.iloc[0][["k", "tree", "nodes"]])}
        steps = value(own, "tokens_per_step", method, temperature=middle)
        rate = value(own, "tokens_per_second", method, temperature=middle)
        line[f"tokens per step, T = {middle:g}"] = "1.00" if steps is None else f"{steps:.2f}"
        line[f"tokens/s, T = {middle:g}"] = "" if rate is None else f"{rate:.0f}"
        for t in temperatures:
            found = pick(own, "speedup_vs_plain", temperature=t)
            line[f"x plain, T = {t:g}"] = "1" if method == "plain" else _spread(found.iloc[0]) if len(found) else ""
        over = value(own, "speedup_vs_hf", method, temperature=middle)
        line[f"x generate, T = {middle:g}"] = "1" if method == "hf_generate" else "" if over is None else f"{over:.2f}"
        table.append(line)
    return pd.DataFrame(table)


def drafting(summary: pd.DataFrame) -> pd.DataFrame:
    """How drafting time grows: method, shortest and longest draft length, draft_ms at both, their ratio."""
    rows = pick(with_k(summary), "draft_ms", stage=DRAFT_TIMES).sort_values("k")
    table = []
    for method in order(rows.method):
        own = rows[rows.method == method]
        first, last = own.iloc[0], own.iloc[-1]
        table.append((method, first.k, last.k, first.value, last.value, last.value / first.value))
    return pd.DataFrame(table, columns=["method", "k_min", "k_max", "ms_at_k_min", "ms_at_k_max", "ratio"])


def lossless(summary: pd.DataFrame) -> pd.DataFrame:
    """Against plain decoding, a row a method, tree and temperature: tokens compared, mismatches, numeric ties."""
    kinds = {
        "tokens_compared": "tokens compared",
        "greedy_mismatches": "mismatches",
        "coupled_mismatches": "mismatches",
    }
    kinds["numeric_ties"] = "numeric ties"
    rows = pick(summary, list(kinds)).assign(count=lambda r: r.metric.map(kinds))
    index = ["stage", "temperature", "method", "tree"]
    table = rows.pivot_table(index=index, columns="count", values="value", aggfunc="sum")
    return table.reindex(columns=dict.fromkeys(kinds.values())).fillna(0).astype(int).reset_index()


def divergences(beside: pd.DataFrame) -> pd.DataFrame:
    """Of `measure.against_plain`: generations, how many diverge, and the gap of the two best scores where they do."""
    by = beside.groupby(["temperature", "method", "tree"])
    return by.agg(
        generations=("differs", "size"),
        diverging=("differs", "sum"),
        median_gap=("gap", "median"),
        largest_gap=("gap", "max"),
    ).reset_index()


def rules(summary: pd.DataFrame) -> pd.DataFrame:
    """Tokens per step by method, tree and k: a column a rule."""
    rows = with_k(pick(summary, task="all"))
    rows = rows[rows.metric.str.endswith("tokens_per_step") & (rows.k > 0)]
    rule = rows.metric.str.removesuffix("tokens_per_step").str.strip("_").replace("", "coupled")
    return rows.assign(rule=rule).pivot(index=["method", "tree", "k"], columns="rule", values="value").reset_index()


def goals(summary: pd.DataFrame, gpu: bool = False, k: int = 5) -> pd.DataFrame:
    """What the study set out to show, on a CPU or on a GPU: goal, wanted, measured, met (yes, no or not measured)."""
    growth, counts, at = drafting(summary), lossless(summary), best(summary)
    ratios = growth.set_index("method").ratio
    span = (
        f"k = {growth.k_max.max():.0f} against {growth.k_min.min():.0f}"
        if len(growth)
        else "longest against shortest k"
    )
    same_k = pick(with_k(summary), task="all", temperature=MIDDLE, k=k, tree="chain")

    def over(rows: pd.DataFrame, metric: str) -> float | None:
        return ratio(*(value(rows, metric, method) for method in ("eagle-ps", "eagle")))

    table = []
    for name, rows in (("greedy", counts[counts.temperature == 0]), ("coupled", counts[counts.temperature > 0])):
        total = {column: f"{rows[column].sum():,}" for column in ("mismatches", "tokens compared", "numeric ties")}
        words = f"{total['mismatches']} in {total['tokens compared']} tokens, {total['numeric ties']} numeric ties"
        met = None if rows.empty else bool(rows.mismatches.sum() == 0)
        table.append((f"{name} output equals plain decoding: mismatches", "0", words, met))
    heat, flat, steep = f"T = {MIDDLE:g}", 1.15 if gpu else 1.3, 6 if gpu else 5
    own: list[Goal] = [
        (f"drafting time of eagle-ps, {span}", "at most", flat, ratios.get("eagle-ps")),
        (f"drafting time of eagle, {span}", "at least", steep, ratios.get("eagle")),
        (f"slot 0 acceptance, eagle-ps over eagle, k = {k}, {heat}", "at least", 0.97, over(same_k, "accept_cond_0")),
        (f"tokens per step, eagle-ps over eagle, k = {k}, {heat}", "at least", 0.9, over(same_k, "tokens_per_step")),
        (f"tokens per step, eagle-ps over eagle at equal drafting time, {heat}", "above", 1, _equal_time(summary)),
    ]
    if gpu:
        own += [*_sibling_goals(summary), *_cost_goals(summary)]
    else:
        speed = value(at, "speedup_vs_plain", "eagle-ps")
        own.append((f"eagle-ps at its best k over plain decoding, {heat}", "at least", 1.5, speed))
        over_eagle = over(at, "speedup_vs_plain")
        own.append((f"eagle-ps over eagle, each at its best k, {heat}", "above", 1, over_eagle))
    for what, sign, bound, found in (*own, *_tree_goals(summary)):
        met = (
            None
            if found is None
            else {"at most": found <= bound, "at least": found >= bound, "above": found > bound}[sign]
        )
        table.append((what, f"{sign} {bound:g}", "" if found is None else f"{found:.3g}", met))
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [(*line, words[met]) for *line, met in table]
    return pd.DataFrame(rows, columns=["goal", "wanted", "measured", "met"])


def _equal_time(summary: pd.DataFrame) -> float | None:
    """Tokens per step of eagle-ps' best chain over those of the longest chain that eagle drafts in the same time."""
    times = pick(with_k(summary), "draft_ms", stage=DRAFT_TIMES).set_index(["method", "k"]).value
    rows = pick(with_k(summary), "tokens_per_step", stage=LENGTHS, tree="chain", task="all", temperature=MIDDLE)
    steps = rows.set_index(["method", "k"]).value
    if not {"eagle", "eagle-ps"} <= {*steps.index.get_level_values(0)} & {*times.index.get_level_values(0)}:
        return None
    ours = steps["eagle-ps"].idxmax()
    able = [k for k in steps["eagle"].index if times["eagle"].get(k, 0) <= times["eagle-ps"].get(ours, 0)]
    return steps["eagle-ps"][ours] / steps["eagle"][max(able, default=min(steps["eagle"].index))]


def _sibling_goals(summary: pd.DataFrame) -> list[Goal]:
    """Each parallel drafter (`eagle-ps`, `eagle-ps-alone`, ...) over its sibling in speed at their best, all tasks."""
    made: list[Goal] = []
    rows = pick(summary, "speedup_vs_plain", stage=SPEEDUP)
    for kind, bound in (("medusa-ps", 1.62), ("eagle-ps", 1.25)):
        methods = dict.fromkeys([kind, *order(m for m in rows.method if m.startswith(f"{kind}-"))])
        for method, t in product(methods, sorted(rows.temperature.dropna().unique())):
            at, other = best(summary, t), SIBLINGS[kind]
            found = ratio(*(value(at, "speedup_vs_plain", m) for m in (method, other)))
            made.append((f"{method} over {other}, each at its best draft, T = {t:g}", "at least", bound, found))
    return made


def _most(values: pd.Series) -> float | None:
    return None if values.dropna().empty else float(values.max())


def _cost_goals(summary: pd.DataFrame) -> list[Goal]:
    """Of every shape in notebook 7, at batch 1: how close a plain step and a round come to what they could be."""
    rows, made = pick(summary, stage=COST), []
    for task in [task for task in rows.task.dropna().unique() if str(task).endswith(" x 1")]:
        of = pick(rows, task=task)
        drafted = of[~of.method.isin(("plain", "hf_static", "hf_generate"))]
        step = {m: value(of, "round_ms", m) for m in ("plain", "hf_static")}
        arm = ["method", "tree", "k", "nodes"]
        host, whole = (pick(drafted, metric).set_index(arm).value for metric in ("host_ms", "round_ms"))
        gaps = pick(drafted, "sum_gap").value.abs()
        if task in LARGE:
            share = value(of, "floor_share", "plain")
            made.append((f"{task}: reading the weights, share of a plain step", "at least", 0.8, share))
        made += [
            (
                f"{task}: transformers' compiled step over a plain step",
                "at least",
                1,
                ratio(step["hf_static"], step["plain"]),
            ),
            (f"{task}: a round beside the sum of its parts, largest gap", "at most", 0.05, _most(gaps)),
            (f"{task}: the host's share of a round, largest", "at most", 0.02, _most(host / whole)),
        ]
    return made


def _tree_goals(summary: pd.DataFrame) -> list[Goal]:
    """Goals of trees and rules: (goal, sign, bound, measured)."""
    rows = pick(with_k(summary), stage=LOSSLESS, task="all")
    at = rows[(rows.temperature - MIDDLE).abs() < 0.01]

    def steps(frame: pd.DataFrame, method: str, metric: str = "tokens_per_step", **where: Any) -> float | None:
        found = pick(frame, metric, method=method, **where).value
        return None if found.empty else float(found.max())

    chain, best = steps(at, "eagle-ps", tree="chain"), steps(at, "eagle-ps", tree="best_first", nodes=16)
    static = pick(at, "tokens_per_step", method="eagle-ps", tree="static").set_index("nodes").value
    own = pick(at, "tokens_per_step", method="eagle-ps", tree="best_first").set_index("nodes").value
    least = (own / static).dropna()
    hot, heat = rows[rows.temperature == 1.0], f"T = {MIDDLE:g}"
    goals: list[Goal] = [
        (f"tokens per step of eagle-ps, best_first 16 over chain, {heat}", "at least", 1.15, ratio(best, chain)),
        (
            f"tokens per step of eagle-ps, best_first over static of the same size, the lowest, {heat}",
            "at least",
            1,
            float(least.min()) if len(least) else None,
        ),
    ]
    for method in ("eagle", "eagle-ps"):
        coupled = steps(hot, method, tree="chain")
        sampled = steps(hot, method, "rejection_tokens_per_step", tree="chain")
        goals.append(
            (
                f"tokens per step of {method}, coupled chain over rejection, T = 1",
                "at least",
                0.88,
                ratio(coupled, sampled),
            )
        )
        kind = "dynamic" if method == "eagle" else "best_first"
        chains = [steps(hot, method, f"{rule}tokens_per_step", tree="chain") for rule in ("", "rejection_", "block_")]
        top = max((x for x in chains if x is not None), default=None)
        tree = steps(hot, method, tree=kind, nodes=16)
        goals.append(
            (
                f"tokens per step of {method}, coupled tree of 16 over its best chain, T = 1",
                "above",
                1,
                ratio(tree, top),
            )
        )
    costs = pick(rows, ["tree_ms", "forward_ms"], nodes=16).groupby("metric").value.max()
    share = ratio(costs.get("tree_ms"), costs.get("forward_ms"))
    goals.append(("building and following a tree of 16 nodes, share of the target's forward", "at most", 0.1, share))
    return goals


def split(summary: pd.DataFrame, method: str, other: str, temperature: float = MIDDLE) -> str:
    """Why one method is faster or slower than another: tokens a round times rounds a second, by part of the round."""
    at = best(summary, temperature)
    parts = ("draft", "verify", "commit", "host")
    times = {m: {p: value(at, f"{p}_ms", m) or 0.0 for p in parts} for m in (method, other)}
    rounds = {m: sum(times[m].values()) for m in times}
    speed = ratio(*(1.0 if m == "plain" else value(at, "speedup_vs_plain", m) for m in (method, other)))
    if speed is None or not all(rounds.values()):
        return ""
    tokens = {m: value(at, "tokens_per_step", m) or 1.0 for m in times}
    shapes = at.drop_duplicates("method").set_index("method")[["k", "tree", "nodes"]]
    names = {m: m if m == "plain" else f"{m} ({shape_name(*shapes.loc[m])})" for m in times}
    costs = [" + ".join(f"{times[m][p]:.2f} {p}" for p in parts if times[m][p] >= 0.005) for m in times]
    apart = any(times[m]["draft"] for m in times)  # not where a round is one graph
    first, second = (f" ({cost})" if apart else "" for cost in costs)
    return (
        f"{names[method]} runs at {speed:.2f}x the speed of {names[other]} at T = {temperature:g}: a round yields "
        f"{tokens[method]:.2f} tokens against {tokens[other]:.2f} and costs {rounds[method]:.2f} ms{first} "
        f"against {rounds[other]:.2f} ms{second}."
    )


# --- rows of summary.csv ----------------------------------------------------------------------------------------------


def rows(stage: str, lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Lines (method, metric, value, n, unit, ...) in the columns of summary.csv; what a line lacks stays empty."""
    return pd.DataFrame(lines, columns=COLUMNS).assign(stage=stage)


def draft_time_rows(times: pd.DataFrame, stage: str = DRAFT_TIMES) -> pd.DataFrame:
    """What `measure.draft_times` measured, in the columns of summary.csv."""
    named = times.rename(columns={"draft_ms": "value"}).assign(
        tree="chain", nodes=times.k, metric="draft_ms", unit="ms"
    )
    return rows(stage, named.to_dict("records"))


def tree_time_rows(times: pd.DataFrame, stage: str = LOSSLESS) -> pd.DataFrame:
    """What `measure.tree_times` measured, in the columns of summary.csv: tree_ms (build and follow) and forward_ms."""
    lines = [
        {"method": "plain", "tree": "best_first", "nodes": line["nodes"], "task": "all", "metric": metric, "unit": "ms"}
        | {"value": line["build_ms"] + line["walk_ms"] if metric == "tree_ms" else line[metric]}
        for line in times.to_dict("records")
        for metric in ("tree_ms", "forward_ms")
    ]
    return rows(stage, lines)


def training_rows(training: pd.DataFrame, stage: str) -> pd.DataFrame:
    """Tokens seen and time a step of every training, in the columns of summary.csv."""
    metrics = {"train_tokens": ("tokens", "tokens"), "train_step_ms": ("ms_a_step", "ms")}
    return rows(
        stage,
        [
            {"method": line["stage"], "metric": metric, "value": line[column], "n": line["steps"], "unit": unit}
            for line in training_cost(training).to_dict("records")
            for metric, (column, unit) in metrics.items()
        ],
    )


# --- claims ---------------------------------------------------------------------------------------------------------


def _versus(summary: pd.DataFrame, method: str) -> tuple[str, float | None]:
    """A parallel drafter beside its older sibling, over the temperatures: (text, speed ratio at the middle one)."""
    other, texts, middle = SIBLINGS[method], [], None
    for t in sorted(pick(summary, "speedup_vs_plain", stage=SPEEDUP).temperature.dropna().unique()):
        at = best(summary, t)
        speed = ratio(*(value(at, "speedup_vs_plain", m) for m in (method, other)))
        if speed is None:
            continue
        steps = [value(at, "tokens_per_step", m) for m in (other, method)]
        texts.append(f"T = {t:g}: {speed:.2f}x, tokens per step {steps[0]:.2f} -> {steps[1]:.2f}")
        middle = speed if middle is None or t == MIDDLE else middle
    return "; ".join(texts), middle


def _apart(summary: pd.DataFrame, method: str) -> str:
    """A caution where the two siblings' speedup intervals overlap."""
    rows = pick(best(summary), "speedup_vs_plain", method=[method, SIBLINGS[method]]).set_index("method")
    overlap = len(rows) == 2 and rows.low.max() <= rows.high.min()
    return "; the 95 % intervals of their speedups overlap" if overlap else ""


def claims(summary: pd.DataFrame, training: pd.DataFrame) -> pd.DataFrame:
    """Every claim of the paper that we may quote, its source, what was measured, and a verdict from the numbers."""
    table = []
    growth = drafting(summary).set_index("method")
    shown = {m: growth.ratio.get(m) for m in ("eagle-ps", "eagle")}
    text = "; ".join(f"{m}: {x:.2f}x from k = {growth.k_min[m]} to {growth.k_max[m]}" for m, x in shown.items() if x)
    linear = growth.k_max.get("eagle", 8) * 5 / 8
    held = [bool(shown["eagle-ps"] and shown["eagle-ps"] <= 1.3), bool(shown["eagle"] and shown["eagle"] >= linear)]
    verdict = ["does not hold here", "holds in part", "holds"][sum(held)] if all(shown.values()) else "not measured"
    table.append(
        (
            "the cost of parallel drafting is nearly flat in k, that of autoregressive drafting linear",
            "motivation",
            text,
            verdict,
        )
    )

    text, speed = _versus(summary, "medusa-ps")
    verdict = _faster(speed, 1.62, "the largest gain stated") + (_apart(summary, "medusa-ps") if speed else "")
    claim = (
        "ParallelSpec makes a baseline up to 62 % faster (its Medusa variant; secondary: accepted length 2.39 -> 3.31)"
    )
    table.append((claim, "abstract; parenthesis secondary", text, verdict))

    text, speed = _versus(summary, "eagle-ps")
    verdict = _faster(speed, 1.15, "the largest gain that reviewers read") + (
        _apart(summary, "eagle-ps") if speed else ""
    )
    table.append(("EAGLE + ParallelSpec is faster than EAGLE (at most about 15 %)", "secondary", text, verdict))

    rows = pick(best(summary), "speedup_vs_plain", method=list(SIBLINGS)).sort_values("value")
    text, verdict = "", "not measured"
    if len(rows):
        top = rows.iloc[-1]
        against = value(best(summary), "speedup_vs_hf", top.method)
        text = f"{top.method}, {shape_name(top.k, top.tree, top.nodes)}: {_spread(top)}x plain decoding" + (
            f", {against:.2f}x generate" if against else ""
        )
        verdict = "not comparable (another model, other prompts, another machine); shown for orientation"
    table.append(("2.84x overall, Llama-2-13B, Spec-Bench, batch 1", "abstract", text, verdict))

    cost = training_cost(training).set_index("stage")
    shares = [
        f"{stage} {seconds / cost.seconds['target']:.0%} ({cost.tokens[stage] / 1e6:.3g} M tokens)"
        for stage, seconds in cost.seconds.items()
        if stage != "target" and cost.seconds.get("target")
    ]
    text = f"of the target's own training time: {', '.join(shares)}" if shares else ""
    verdict = "not comparable: a target as small as this one makes its drafters dear" if shares else "not measured"
    table.append(("minimal training cost (one layer, group-wise training, distillation)", "abstract", text, verdict))
    return pd.DataFrame(table, columns=["claim", "source", "measured", "verdict"])


def _faster(speed: float | None, stated: float, what: str) -> str:
    if speed is None:
        return "not measured"
    if speed <= 1:
        return f"does not hold here: slower by {1 - speed:.0%}"
    return f"holds in direction: faster by {speed - 1:.0%}, {what} is {stated - 1:.0%}"


def training_cost(training: pd.DataFrame) -> pd.DataFrame:
    """What training took: stage, steps, tokens, seconds (0 where it was not recorded), ms a step."""
    rows = []
    for stage, part in training.groupby("stage", sort=False):
        seconds = part.value[part.metric == "seconds"].max() if (part.metric == "seconds").any() else 0.0
        rows.append((stage, int(part.step.max()), int(part.tokens.max()), seconds, 1e3 * seconds / part.step.max()))
    return pd.DataFrame(rows, columns=["stage", "steps", "tokens", "seconds", "ms_a_step"])


def shortfalls(summary: pd.DataFrame, gpu: bool = False) -> list[str]:
    """What did not come out as the paper or the goals say, each with the numbers that explain it."""
    said = []
    at = {row.goal: row for row in goals(summary, gpu).itertuples()}
    for what, row in at.items():
        if row.met == "no":
            said.append(f"**{what}**: wanted {row.wanted}, measured {row.measured}.")
    for method, other in (*SIBLINGS.items(), ("eagle-ps", "plain")):
        for t in sorted(pick(summary, "speedup_vs_plain", stage=SPEEDUP).temperature.dropna().unique()):
            rate = ratio(
                *(1.0 if m == "plain" else value(best(summary, t), "speedup_vs_plain", m) for m in (method, other))
            )
            if rate is not None and rate <= (1.5 if other == "plain" else 1):
                said.append(split(summary, method, other, t))
    return [text for text in said if text]


# --- tables as text -------------------------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; numbers are right-aligned."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (frame.columns, *frame.itertuples(index=False))]
    rule = ["---:" if re.match(r"[\d.]+( \(|$)", rows[-1][i]) else "---" for i in range(len(frame.columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def on_gpu(facts: dict[str, Any]) -> bool:
    """Whether the run of this manifest had a GPU."""
    return bool((facts.get("machine") or {}).get("gpu"))


def took(facts: dict[str, Any]) -> pd.DataFrame:
    """What a run took, from its manifest: stage, seconds, machine, and `all`, their sum.

    What a notebook or a training made on its way is in its seconds. Stages that ran side by side count in full.
    """
    made = {**facts.get("stages", {}), **facts.get("checkpoints", {})}
    alone = {name: about for name, about in made.items() if not (about.get("notebook") or about.get("within"))}
    rows = [(name, about["seconds"], about.get("machine", "")) for name, about in alone.items()]
    rows.append(("all", sum(seconds for _, seconds, _ in rows), ""))
    return pd.DataFrame(rows, columns=["stage", "seconds", "machine"])


def where(facts: dict[str, Any]) -> str:
    """The machine, the profile and the version of a run, in one line, from its manifest."""
    machine = facts.get("machine") or {}
    name = manifest.machine_name(machine) if {"gpu", "cpu", "cores"} <= set(machine) else "unknown machine"
    timed = facts.get("timing_dtype") or facts.get("dtype")
    parts = [f"profile {facts.get('profile', '?')}", name, f"timed in {timed}" if timed else ""]
    parts.append(facts.get("started", "")[:10])
    parts += [f"torch {machine['versions']['torch']}"] if "torch" in machine.get("versions", {}) else []
    return ", ".join(part for part in parts if part)


def marks(profile: str) -> tuple[str, str]:
    """The lines of README between which a profile's results stand."""
    return f"<!-- results of {profile}: begin -->", f"<!-- results of {profile}: end -->"


def asked(data: dict[str, Any]) -> str:
    """What the prompts of a profile's [data] are, in words."""
    if data.get("source", "code") == "code":
        return "held-out code"
    first = f"the questions of {Path(data['questions']).name}" if data.get("questions") else "held-out text"
    return f"{first} and held-out code" if data.get("held_out") else first


def readme_block(summary: pd.DataFrame, facts: dict[str, Any], profile: str) -> str:
    """What stands between README's marks: the figure and the headline table of a profile's results."""
    n = int(pick(summary, "speedup_vs_plain", stage=SPEEDUP, task="all").n.max())
    text = asked((facts.get("settings") or {}).get("data", {}))
    return "\n\n".join(
        (
            f"![Speedup over plain decoding by drafter and temperature](figures/{profile}/04_speedup.png)",
            markdown(headline(summary)),
            f"Speedups are ratios of total tokens per decode second, with 95 % bootstrap intervals over {n} prompts of "
            f"{text}, batch 1. *x plain* is against plain decoding in the same engine, *x generate* against "
            f"`transformers`' `generate`; tokens per step counts the target's own token. Measured: {where(facts)}.",
        )
    )


def readme(readme: Path, summary: Path) -> None:
    """Rewrites README's results block from a summary.csv and the manifest beside it. Raises UserError without marks."""
    text, summary = Path(readme).read_text(encoding="utf-8"), Path(summary)
    profile = summary.parent.name
    begin, end = marks(profile)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{readme}: wants one line {begin} and one line {end}")
    before, rest = text.split(begin)
    facts = manifest.RunManifest(summary.parent / "manifest.json").read()
    block = readme_block(load(summary), facts, profile)
    manifest.write_text(Path(readme), f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}")


# --- the page -------------------------------------------------------------------------------------------------------

TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{% block input_group %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}
{% block in_prompt %}{% endblock %}
{% block empty_in_prompt %}{% endblock %}
{% block output_area_prompt %}{% endblock %}
{% block stream_stdout %}<details class="log"><summary>log</summary>{{ super() }}</details>{% endblock %}
{% block stream_stderr %}<details class="log"><summary>log</summary>{{ super() }}</details>{% endblock %}
"""

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62em; margin: 0 auto }
body { padding: 1em } h1 { margin-top: 2.2em; border-bottom: 2px solid #08519c } h1:first-of-type { margin-top: .5em }
h2 { margin-top: 1.8em } img { max-width: 100% } img.math { max-width: none } p.math { text-align: center }
table { border-collapse: collapse; font-size: .88em; margin: .8em 0; display: block; overflow-x: auto }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { background: #f4f4f4 } pre { font-size: .82em; overflow-x: auto } code { font-size: .9em }
details > summary { cursor: pointer; color: #777; font-size: .8em }
.highlight { background: #f8f8f8; padding: .1em .8em } .warning { background: #fff3cd; padding: .5em 1em }
nav { background: #f4f6f9; padding: .6em 1.2em; columns: 2 20em } nav ul { margin: 0; padding-left: 1.1em }
"""


def formula(latex: str, size: float = 11) -> str:
    """LaTeX as an inline picture (SVG), readable without any script or network; its source is the alternative text."""
    picture = io.BytesIO()
    depth = math_to_image(f"${latex}$", picture, prop=FontProperties(size=size, math_fontfamily="cm"), format="svg")
    code = base64.b64encode(picture.getvalue()).decode()
    alt = escaping.escape(latex, quote=True)
    return (
        f'<img class="math" style="vertical-align:-{depth:.1f}pt" alt="{alt}" src="data:image/svg+xml;base64,{code}">'
    )


def formulas(text: str) -> str:
    """Markdown with every $...$ and $$...$$ replaced by its picture; code is left alone."""

    def picture(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        try:
            return (
                formula(match["inline"])
                if match["inline"]
                else f'<p class="math">{formula(match["shown"].strip(), 13)}</p>'
            )
        except (ValueError, RuntimeError):  # beyond mathtext: the source is better than nothing
            return f"<code>{escaping.escape(match['inline'] or match['shown'])}</code>"

    pattern = r"(?P<code>```.*?```|`[^`]*`)|\$\$(?P<shown>.+?)\$\$|\$(?P<inline>[^$\n]+)\$"
    return re.sub(pattern, picture, text, flags=re.DOTALL)


def _body(path: Path, exporter: HTMLExporter) -> tuple[str, list[tuple[int, str, str]]]:
    """An executed notebook as HTML, and its headings: (level, id, text)."""
    import nbformat

    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas(cell.source)
    body, _ = exporter.from_notebook_node(book)
    headings: list[tuple[int, str, str]] = []

    def anchor(match: re.Match) -> str:
        name = f"{path.stem}-{len(headings)}"
        headings.append((int(match[1]), name, re.sub(r"<[^>]+>", "", match[2]).strip()))
        return f'<h{match[1]} id="{name}">{match[2]}</h{match[1]}>'

    return re.sub(r"<h([12])[^>]*>(.*?)</h\1>", anchor, body, flags=re.DOTALL), headings


def html(notebooks: Sequence[Path], facts: dict[str, Any], path: Path) -> None:
    """One self-contained page: claims, headline and goals first, then the executed notebooks with their code folded.

    `facts` is the run's manifest; summary.csv lies beside `path`. No script, no network, pictures embedded.
    """
    from jinja2 import DictLoader  # these take seconds, which only the last notebook needs to wait
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(template_file="report.html.j2", extra_loaders=[DictLoader({"report.html.j2": TEMPLATE})])
    exporter.exclude_anchor_links = True
    parts = [_body(Path(notebook), exporter) for notebook in notebooks]
    front = _front(facts, Path(path).parent)
    contents = "".join(
        f'<li style="margin-left:{level - 1}em"><a href="#{name}">{text}</a></li>'
        for _, hs in parts
        for level, name, text in hs
    )
    colours = HtmlFormatter().get_style_defs(".highlight")
    title = escaping.escape(f"ParallelSpec, reproduced: {facts.get('profile', '')}")
    manifest.write_text(
        Path(path),
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{colours}'
        f"</style></head><body>\n<h1>{title}</h1>\n{front}\n<nav><ul>{contents}</ul></nav>\n"
        + "\n".join(f"<section>{body}</section>" for body, _ in parts)
        + "\n</body></html>\n",
    )


def _front(facts: dict[str, Any], results: Path) -> str:
    """The page's first part: where it was measured, warnings, claims (of the last notebook), headline, goals."""
    line = escaping.escape(where(facts))
    parts = [f"<p>{line}. <code>manifest.json</code> beside this page describes the run.</p>"]
    parts += [f'<p class="warning">{escaping.escape(text)}</p>' for text in facts.get("warnings", [])]
    tables = {}
    if (results / "claims.csv").is_file():
        tables["Claims of the paper"] = pd.read_csv(results / "claims.csv", keep_default_na=False)
    if (results / "summary.csv").is_file():
        summary = load(results / "summary.csv")
        found = goals(summary, on_gpu(facts))
        if (facts.get("settings") or {}).get("stages"):  # a profile of few notebooks
            found = found[found.met != "not measured"]
        tables |= {"Headline": headline(summary), "Goals": found}
    tables = {name: frame for name, frame in tables.items() if len(frame)}
    parts += [f"<h2>{name}</h2>{frame.to_html(index=False, border=0)}" for name, frame in tables.items()]
    return "\n".join(parts)
