"""What the numbers say: headline, goals, claims; the report page and README's results block.

Every sentence with a number in it is made from `summary.csv` (columns: DESIGN section 7); none is typed by hand.
"""

from __future__ import annotations

import base64
import html as escaping
import io
import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

from psnb import manifest, measure
from psnb.errors import UserError
from psnb.measure import ARM, BASELINES, COLUMNS, PLAIN32, Arm
from psnb.plots import at_best, order, pick, shape_name, with_k

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

SPEEDUP, DRAFT_TIMES, LENGTHS = "04_speedup", "03_draft_times", "03_draft_length"  # stages of summary.csv
LOSSLESS, TOYS, COST = "05_losslessness", "05_toys", "07_cost"
Found = tuple[float, float, float] | None  # value, low, high; the value three times where no interval is known
Claim = tuple[str, str, str, str]  # what is claimed, where, what was measured, verdict
Goal = tuple[str, str, float, Found]  # what, at most or at least or above, the bound, measured
MIDDLE = 0.7  # the temperature at which the study states its main numbers
SIBLINGS = {"eagle-ps": "eagle", "medusa-ps": "medusa"}
LARGE = ("llama-2-7b x 1", "llama-2-13b x 1")  # where reading the weights is most of a plain step
Runs = dict[str, pd.DataFrame]  # `measure.run`'s rows behind the stages of a summary
TABLES = {SPEEDUP: ("04_runs",), LENGTHS: ("03_runs",), LOSSLESS: ("05_rules", "05_sizes")}  # where they lie


# --- numbers --------------------------------------------------------------------------------------------------------


def load(path: Path) -> pd.DataFrame:
    """summary.csv as a frame. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; `psnb run` measures it")
    numbers = {column: [""] for column in ("k", "nodes", "temperature", "value", "low", "high", "n")}
    return with_k(pd.read_csv(path, keep_default_na=False, na_values=numbers))


def line(summary: pd.DataFrame, metric: str, method: str, **where: Any) -> pd.Series | None:
    """One row: that measured on the most prompts; None where there is none."""
    rows = pick(summary, metric, method=method, **where).sort_values("n")
    return None if rows.empty else rows.iloc[-1]


def _number(row: pd.Series | None) -> Found:
    if row is None:
        return None
    at, low, high = row[["value", "low", "high"]].astype(float)
    return (at, at, at) if math.isnan(low) or math.isnan(high) else (at, low, high)


def found(summary: pd.DataFrame, metric: str, method: str, **where: Any) -> Found:
    """The number of `line` with its interval."""
    return _number(line(summary, metric, method, **where))


def value(summary: pd.DataFrame, metric: str, method: str, **where: Any) -> float | None:
    """`found` without its interval."""
    row = found(summary, metric, method, **where)
    return None if row is None else row[0]


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def over(above: Found, below: Found) -> Found:
    """A ratio with its interval, as if the two were independent: on the same prompts it is narrower than that."""
    if above is None or below is None or not below[0]:
        return None
    at = above[0] / below[0]
    if min(above[1], below[1]) <= 0:
        return at, at, at
    (a, a_low, a_high), (b, b_low, b_high) = (tuple(map(math.log, ends)) for ends in (above, below))
    return at, at / math.exp(math.hypot(a - a_low, b_high - b)), at * math.exp(math.hypot(a_high - a, b - b_low))


def runs(results: Path) -> Runs:
    """The generations behind the rows of summary.csv, by stage, as far as their tables lie beside it."""
    wanted = {*ARM, "temperature", "prompt", "repeat", "tokens", "decode_s", "histogram", "stopped"}
    made = {}
    for stage, names in TABLES.items():
        paths = [path for name in names if (path := results / f"{name}.csv").is_file()]
        tables = [pd.read_csv(path, usecols=lambda name: name in wanted, keep_default_na=False) for path in paths]
        if tables:
            made[stage] = pd.concat(tables).drop_duplicates(
                [*ARM, "temperature", "prompt", "repeat"], ignore_index=True
            )
    return made


def beside(runs: Runs, above: pd.Series | None, below: pd.Series | None) -> Found:
    """The ratio of two rows of a summary with its interval: paired by prompt where their generations are known."""
    if above is None or below is None:
        return None
    table = runs.get(above["stage"])
    if table is not None and below["stage"] == above["stage"]:
        arms = []
        for row in (above, below):
            rule, metric = re.fullmatch(r"(?:(rejection|block)_)?(.*)", row["metric"]).groups()
            arms.append(Arm(row["method"], int(row["k"]), row["tree"], int(row["nodes"]), rule or "coupled"))
        metric = "tokens_per_second" if metric == "speedup_vs_plain" else metric
        paired = measure.beside(table, *arms, above["temperature"], metric)
        if paired is not None:
            return paired
    return over(_number(above), _number(below))


def met(sign: str, bound: float, measured: Found) -> str:
    """yes, no, undecided (the interval holds the bound), not measured."""
    if measured is None:
        return "not measured"
    low, high = ({"at most": x <= bound, "at least": x >= bound, "above": x > bound}[sign] for x in measured[1:])
    return "undecided" if low != high else "yes" if low else "no"


def temperatures(summary: pd.DataFrame) -> list[float]:
    """Those of the speedup notebook, ascending."""
    return sorted(pick(summary, stage=SPEEDUP, task="all").temperature.dropna().unique())


def nearest(summary: pd.DataFrame) -> float:
    """Of these the one nearest to `MIDDLE`, at which the main numbers are stated."""
    return min(temperatures(summary), key=lambda t: abs(t - MIDDLE), default=MIDDLE)


def best(summary: pd.DataFrame, temperature: float | None = None) -> pd.DataFrame:
    """The whole-set rows of the speedup notebook, each method with its best draft; at one temperature or at all.

    A method's best draft is one for all temperatures (`plots.at_best`), so that every table and figure has the same.
    """
    rows = at_best(pick(summary, stage=SPEEDUP, task="all"))
    return rows if temperature is None else pick(rows, temperature=temperature)


def draft_name(rows: pd.DataFrame, method: str) -> str:
    """A method with its draft in `best`'s rows: eagle-ps, best_first 32 (k = 8)."""
    own = rows[rows.method == method]
    shape = shape_name(*own.iloc[0][["k", "tree", "nodes"]]) if len(own) else ""
    return f"{method}, {shape}" if shape else method


def siblings(summary: pd.DataFrame, kind: str) -> list[str]:
    """The parallel drafters of a kind that the speedup notebook timed: `eagle-ps` first, then `eagle-ps-alone`, ..."""
    return order(m for m in pick(summary, stage=SPEEDUP).method if m == kind or m.startswith(f"{kind}-"))


def _static(summary: pd.DataFrame) -> list[str]:
    """How fast transformers' compiled generation is where notebook 7 timed it, by model."""
    rows = pick(summary, "speedup_vs_plain", stage=COST, method="hf_static")
    rows = rows[rows.task.astype(str).str.endswith(" x 1")]
    return [
        f"transformers' compiled generation ({row.task.removesuffix(' x 1')}, notebook 7) is {row.value:.2f} times as "
        "fast as plain decoding"
        for row in rows.itertuples()
    ]


def _at(texts: dict[float, str]) -> str:
    """{T: text} as `text at T = 0, text at T = 0.7`."""
    return ", ".join(f"{text} at T = {t:g}" for t, text in texts.items())


def _heats(them: Sequence[float]) -> str:
    return "T = " + ", ".join(f"{t:g}" for t in them)


def _spread(row: Sequence[float]) -> str:
    """The interval too, where there is one."""
    return f"{row[0]:.2f} ({row[1]:.2f} to {row[2]:.2f})" if row[1] < row[2] else f"{row[0]:.2f}"


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a method at its best draft shape: tokens per step, tokens/s, speedup a temperature with its interval."""
    rows, middle = best(summary), nearest(summary)
    asked = pick(rows, "tokens_per_second", method="hf_generate", temperature=middle).n.max()  # often fewer prompts
    fewer = asked < rows.n.max()  # not where either is NaN
    generate = f"x generate, T = {middle:g}" + (f" ({asked:.0f} prompts)" if fewer else "")
    table = []
    for method in order(rows.method):
        own = rows[rows.method == method]
        line: dict[str, Any] = {"method": method, "draft": shape_name(*own.iloc[0][["k", "tree", "nodes"]])}
        steps = value(own, "tokens_per_step", method, temperature=middle)
        rate = value(own, "tokens_per_second", method, temperature=middle)
        line[f"tokens per step, T = {middle:g}"] = "1.00" if steps is None else f"{steps:.2f}"
        line[f"tokens/s, T = {middle:g}"] = "" if rate is None else f"{rate:.0f}"
        for t in temperatures(summary):
            speed = found(own, "speedup_vs_plain", method, temperature=t)
            line[f"x plain, T = {t:g}"] = "1" if method == "plain" else _spread(speed) if speed else ""
        against = found(own, "speedup_vs_hf", method, temperature=middle)
        if not pd.isna(asked):
            line[generate] = "1" if method == "hf_generate" else _spread(against) if against else ""
        table.append(line)
    return pd.DataFrame(table)


def shapes(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a draft of notebook 7 at the larger shapes, batch 1: tokens per step, of each shape a round and x plain."""
    rows = pick(summary, stage=COST)
    rows = rows[rows.task.isin(LARGE)].fillna({"tree": "", "k": 0, "nodes": 0})
    named = {"tokens_per_step": "tokens per step", "round_ms": "ms a round", "speedup_vs_plain": "x plain"}
    table = []
    for method in order(rows.method):
        for (k, tree, nodes), own in rows[rows.method == method].groupby(["k", "tree", "nodes"], sort=False):
            line = {"method": method, "draft": shape_name(k, tree, nodes), named["tokens_per_step"]: ""}
            for task, metric, found in own[own.metric.isin(named)][["task", "metric", "value"]].itertuples(index=False):
                of = "" if metric == "tokens_per_step" else f"{task.removesuffix(' x 1')}, "
                line[of + named[metric]] = f"{found:.2f}"
            table.append(line)
    return pd.DataFrame(table).fillna("")


def _batched(summary: pd.DataFrame) -> str:
    """Of larger batches, if there were any, what the drafters are worth: the range over the larger shapes."""
    rows = pick(summary, "speedup_vs_plain", stage=COST)
    names = rows.task.str.extract(r"(?P<shape>.+) x (?P<batch>\d+)$")
    rows = rows.assign(batch=names.batch.astype(float), shape=names["shape"])
    rows = rows[(rows.batch > 1) & ~rows.method.isin(BASELINES) & (rows["shape"] + " x 1").isin(LARGE)]
    said = []
    for batch, part in rows.groupby("batch"):
        ends = part.groupby("method").value.agg(["min", "max"])
        each = ", ".join(f"`{m}` {ends['min'][m]:.2f} to {ends['max'][m]:.2f}" for m in order(ends.index))
        said.append(f"at batch {batch:.0f}, over the shapes: {each}")
    return f"; *x plain* {'; '.join(said)}" if said else ""


def notes(summary: pd.DataFrame, runs: pd.DataFrame | None = None) -> list[str]:
    """What must be known to read `headline`: prompts, baselines, and how much plain decoding repeats itself.

    `runs` are `measure.run`'s rows (04_runs.csv), which tell how many generations stopped because of it.
    """
    rows = best(summary)
    if rows.empty:
        return []
    speeds = pick(rows, "speedup_vs_plain")
    said = [
        f"Speedups are ratios of total tokens per decode second, with 95 % bootstrap intervals over "
        f"{'the' if speeds.empty else f'{speeds.n.max():.0f}'} prompts. Each drafter has one draft: k tokens in a row, "
        f"or a tree of so many nodes, k deep{_chosen(summary)}.",
        "*x plain* is against plain decoding in the same engine; tokens per step counts the target's own token, and a "
        "text's last round whole.",
    ]
    heat = nearest(summary)
    wide = value(rows, "speedup_vs_plain", PLAIN32, temperature=heat)
    if wide is not None:
        text = f"`{PLAIN32}` is plain decoding in float32, {wide:.2f} times as fast at T = {heat:g}"
        speed = value(rows, "speedup_vs_plain", "eagle-ps", temperature=heat)
        said.append(f"{text}; against it `eagle-ps` is {speed / wide:.2f} x." if speed else f"{text}.")
    few = pick(rows, "tokens_per_second", method="hf_generate").n.max()
    if not pd.isna(few):
        said.append(f"*x generate* is against `transformers`' `generate`, on {few:.0f} prompts.")
    said += [f"{each[:1].upper()}{each[1:]}." for each in _static(summary)]
    repeated = {}
    if runs is not None and "stopped" in runs:
        plain = runs[runs.method == "plain"]
        repeated = (plain.stopped == "repeat").groupby(plain.temperature).mean().to_dict()
        what = "generations that were stopped because they repeat themselves"
    else:
        repeated = pick(rows, "repeated_8gram_share", method="plain").set_index("temperature").value.to_dict()
        what = "tokens that end an 8-gram generated before"
    if any(repeated.values()):
        shares = _at({t: f"{share:.0%}" for t, share in sorted(repeated.items())})
        said.append(f"Share of plain decoding's {what} (repeated text is easy to draft): {shares}.")
    return said


def _chosen(summary: pd.DataFrame) -> str:
    """Where a drafter's draft was chosen, and among how many."""

    def drafts(stage: str) -> pd.Series:
        rows = with_k(pick(summary, "tokens_per_step", stage=stage, task="all"))
        rows = rows[rows.k > 0].drop_duplicates(["method", "k", "tree", "nodes"])
        return rows.groupby("method").size()

    here, before = drafts(SPEEDUP), drafts(LENGTHS)
    if (here > 1).any():
        which, tried = "the fastest over the temperatures", here
    elif (before > 1).any():
        heat = pick(summary, "tokens_per_step", stage=LENGTHS).temperature.max()
        which, tried = f"the fastest of notebook 3's at T = {heat:g}", before
    else:
        return ""
    of = ", ".join(f"`{method}` {tried[method]}" for method in order(here.index) if method in tried)
    return f" ({which}; tried were, of {of})"


def drafting(summary: pd.DataFrame) -> pd.DataFrame:
    """How drafting time grows: method, shortest and longest draft length, draft_ms at both, their ratio.

    in_rounds: the ratio within the rounds of whole generations, where they were timed by part: there a drafter also
    reads what the round before accepted, which is more in longer drafts.
    """
    rows = pick(with_k(summary), "draft_ms", stage=DRAFT_TIMES).sort_values("k")
    whole = pick(with_k(summary), "draft_ms", stage=LENGTHS, task="all", tree="chain").set_index(["method", "k"]).value
    table = []
    for method in order(rows.method):
        own = rows[rows.method == method]
        first, last = own.iloc[0], own.iloc[-1]
        inside = ratio(*(whole.get((method, k)) for k in (last.k, first.k)))
        table.append((method, first.k, last.k, first.value, last.value, last.value / first.value, inside))
    columns = ["method", "k_min", "k_max", "ms_at_k_min", "ms_at_k_max", "ratio", "in_rounds"]
    made = pd.DataFrame(table, columns=columns)
    return made if made.in_rounds.notna().any() else made.drop(columns="in_rounds")


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
    """Tokens per step by method, tree and k: a column a rule, with 95 % intervals where there are any."""
    rows = with_k(pick(summary, task="all"))
    rows = rows[rows.metric.str.endswith("tokens_per_step") & (rows.k > 0)]
    rule = rows.metric.str.removesuffix("tokens_per_step").str.strip("_").replace("", "coupled")
    texts = [f"{at:.2f}" if math.isnan(low) else _spread((at, low, high)) for at, low, high in _ends(rows)]
    table = rows.assign(rule=rule, text=texts).pivot(index=["method", "tree", "k"], columns="rule", values="text")
    return table.fillna("").reset_index()


def _ends(rows: pd.DataFrame) -> np.ndarray:
    return rows[["value", "low", "high"]].to_numpy(float)


def drafting_goals(summary: pd.DataFrame, gpu: bool = False) -> dict[str, Goal]:
    """What drafting time is expected to do from the shortest draft to the longest, by method.

    One pass: nearly nothing. `eagle`, a pass a token: grow with k, by this share of the ratio of the lengths at least.
    """
    times, growth = pick(with_k(summary), "draft_ms", stage=DRAFT_TIMES), drafting(summary)
    flat, share = (1.15, 6 / 8) if gpu else (1.3, 5 / 8)
    made: dict[str, Goal] = {}
    for method in dict.fromkeys(["eagle-ps", *order(m for m in growth.method if m.startswith("eagle-ps-")), "eagle"]):
        own, least = growth[growth.method == method], ("at most", flat)
        if own.empty:
            span, measured = "longest against shortest k", None
            least = least if method != "eagle" else ("at least", 8 * share)
        else:
            first, last = int(own.k_min.iloc[0]), int(own.k_max.iloc[0])
            span = f"k = {last} against {first}"
            measured = over(*(found(times, "draft_ms", method, k=k) for k in (last, first)))
            least = least if method != "eagle" else ("at least", share * last / first)
        expected = " (expected: a pass a token)" if method == "eagle" else ""
        made[method] = (f"drafting time of {method}, {span}{expected}", *least, measured)
    return made


def goals(summary: pd.DataFrame, gpu: bool = False, dtype: str = "float32", runs: Runs | None = None) -> pd.DataFrame:
    """What the study set out to show, on a CPU or on a GPU: goal, wanted, measured (95 % interval), met (see `met`).

    `dtype` is the format in which the study's target was compared with plain decoding. With `runs` intervals of ratios
    are paired by prompt.
    """
    counts, at, k, runs = lossless(summary), best(summary, MIDDLE), 5, runs or {}
    same_k = pick(with_k(summary), stage=LENGTHS, task="all", temperature=MIDDLE, k=k, tree="chain")

    def versus(rows: pd.DataFrame, metric: str) -> Found:
        return beside(runs, *(line(rows, metric, method) for method in ("eagle-ps", "eagle")))

    table = []
    for of, toy in (("random toy models in float64", True), (f"the target in {dtype}", False)):
        part = counts[(counts.stage == TOYS) == toy]
        for name, rows in (("greedy", part[part.temperature == 0]), ("coupled", part[part.temperature > 0])):
            total = {column: f"{rows[column].sum():,}" for column in ("mismatches", "tokens compared", "numeric ties")}
            words = f"{total['mismatches']} in {total['tokens compared']} tokens, {total['numeric ties']} numeric ties"
            equal = "not measured" if rows.empty else "no" if rows.mismatches.sum() else "yes"
            what = f"{name} output equals plain decoding, {of}: mismatches"
            table.append((what, "0", "" if rows.empty else words, equal))
    heat = f"T = {MIDDLE:g}"
    own: list[Goal] = [
        *drafting_goals(summary, gpu).values(),
        (f"slot 0 acceptance, eagle-ps over eagle, k = {k}, {heat}", "at least", 0.97, versus(same_k, "accept_cond_0")),
        (f"tokens per step, eagle-ps over eagle, k = {k}, {heat}", "at least", 0.9, versus(same_k, "tokens_per_step")),
        (
            f"tokens per step, eagle-ps over eagle at equal drafting time, {heat}",
            "above",
            1,
            _equal_time(summary, runs),
        ),
    ]
    if gpu:
        own += [*_sibling_goals(summary, runs), *_cost_goals(summary)]
    else:
        what, speed = "plain decoding", found(at, "speedup_vs_plain", "eagle-ps")
        wide = line(at, "speedup_vs_plain", PLAIN32)
        if wide is not None and wide["value"] > 1:
            what, speed = "plain decoding in float32", beside(runs, line(at, "speedup_vs_plain", "eagle-ps"), wide)
        own.append((f"eagle-ps with its best draft over {what}, {heat}", "at least", 1.5, speed))
        against = versus(at, "speedup_vs_plain")
        own.append((f"eagle-ps over eagle, each with its best draft, {heat}", "above", 1, against))
    for what, sign, bound, measured in (*own, *_tree_goals(summary, gpu, runs)):
        table.append((what, f"{sign} {bound:.3g}", _shown(measured), met(sign, bound, measured)))
    return pd.DataFrame(table, columns=["goal", "wanted", "measured", "met"])


def _shown(measured: Found) -> str:
    if measured is None:
        return ""
    at, low, high = measured
    return f"{at:.3g}" if low == high else f"{at:.3g} ({low:.3g} to {high:.3g})"


def _point(number: float | None) -> Found:
    """A number that has no interval."""
    return None if number is None else (number, number, number)


def _equal_time(summary: pd.DataFrame, runs: Runs) -> Found:
    """Tokens per step of eagle-ps' best chain over those of the longest chain that eagle drafts in the same time."""
    times = pick(with_k(summary), "draft_ms", stage=DRAFT_TIMES).set_index(["method", "k"]).value
    rows = pick(with_k(summary), "tokens_per_step", stage=LENGTHS, tree="chain", task="all", temperature=MIDDLE)
    steps = rows.set_index(["method", "k"]).value
    if not {"eagle", "eagle-ps"} <= {*steps.index.get_level_values(0)} & {*times.index.get_level_values(0)}:
        return None
    ours = steps["eagle-ps"].idxmax()
    able = [k for k in steps["eagle"].index if times["eagle"].get(k, 0) <= times["eagle-ps"].get(ours, 0)]
    theirs = max(able, default=min(steps["eagle"].index))
    pairs = ("eagle-ps", ours), ("eagle", theirs)
    return beside(runs, *(line(rows, "tokens_per_step", method, k=k) for method, k in pairs))


def _sibling_goals(summary: pd.DataFrame, runs: Runs) -> list[Goal]:
    """Each parallel drafter (`eagle-ps`, `eagle-ps-alone`, ...) over its sibling in speed at their best, all tasks."""
    made: list[Goal] = []
    for kind, bound in (("medusa-ps", 1.62), ("eagle-ps", 1.25)):
        for method, t in product(siblings(summary, kind), temperatures(summary)):
            at, other = best(summary, t), SIBLINGS[kind]
            speed = beside(runs, *(line(at, "speedup_vs_plain", m) for m in (method, other)))
            made.append((f"{method} over {other}, each with its best draft, T = {t:g}", "at least", bound, speed))
    return made


def _most(values: pd.Series) -> Found:
    return None if values.dropna().empty else _point(float(values.max()))


def _cost_goals(summary: pd.DataFrame) -> list[Goal]:
    """Of every shape in notebook 7, at batch 1: how close a plain step and a round come to what they could be."""
    rows, made = pick(summary, stage=COST), []
    for task in [task for task in rows.task.dropna().unique() if str(task).endswith(" x 1")]:
        of, name = pick(rows, task=task), f"{task.removesuffix(' x 1')} at batch 1"
        drafted = of[~of.method.isin(BASELINES)]
        step = {m: value(of, "round_ms", m) for m in ("plain", "hf_static")}
        arm = ["method", "tree", "k", "nodes"]
        host, whole = (pick(drafted, metric).set_index(arm).value for metric in ("host_ms", "round_ms"))
        gaps = pick(drafted, "sum_gap").value.abs()
        if task in LARGE:
            share = _point(value(of, "floor_share", "plain"))
            made.append((f"{name}: reading the weights, share of a plain step", "at least", 0.8, share))
        static = _point(ratio(step["hf_static"], step["plain"]))
        made += [
            (f"{name}: transformers' compiled step over a plain step", "at least", 1, static),
            (f"{name}: a round beside the sum of its parts, largest gap", "at most", 0.05, _most(gaps)),
            (f"{name}: the host's share of a round, largest", "at most", 0.02, _most(host / whole)),
        ]
    return made


def _tree_goals(summary: pd.DataFrame, gpu: bool, runs: Runs) -> list[Goal]:
    """Goals of trees and rules: (goal, sign, bound, measured). On a GPU trees are the engine's, timed in notebook 7."""
    rows = pick(with_k(summary), stage=LOSSLESS, task="all")
    at, hot, heat = rows[(rows.temperature - MIDDLE).abs() < 0.01], rows[rows.temperature == 1.0], f"T = {MIDDLE:g}"

    def most(frame: pd.DataFrame, method: str, metric: str | list[str] = "tokens_per_step", **where: Any):
        some = pick(frame, metric, method=method, **where)
        return None if some.empty else some.loc[some.value.idxmax()]

    sizes = at[(at.method == "eagle-ps") & (at.tree == "static")].nodes.unique()
    pairs = [[most(at, "eagle-ps", tree=tree, nodes=n) for tree in ("best_first", "static")] for n in sizes]
    same = min((each for pair in pairs if (each := beside(runs, *pair))), default=None)
    wide = beside(runs, most(at, "eagle-ps", tree="best_first", nodes=16), most(at, "eagle-ps", tree="chain"))
    made: list[Goal] = [
        (f"tokens per step of eagle-ps, best_first 16 over chain, {heat}", "at least", 1.15, wide),
        (
            f"tokens per step of eagle-ps, best_first over static of the same size, the lowest, {heat}",
            "at least",
            1,
            same,
        ),
    ]
    for method, kind in (("eagle", "dynamic"), ("eagle-ps", "best_first")):
        rules = [f"{rule}tokens_per_step" for rule in ("", "rejection_", "block_")]
        rule = beside(runs, *(most(hot, method, each, tree="chain") for each in rules[:2]))
        grown = beside(runs, most(hot, method, tree=kind, nodes=16), most(hot, method, rules, tree="chain"))
        made += [
            (f"tokens per step of {method}, coupled chain over rejection, T = 1", "at least", 0.88, rule),
            (f"tokens per step of {method}, coupled tree of 16 over its best chain, T = 1", "above", 1, grown),
        ]
    if gpu:
        return made
    costs = pick(rows, ["tree_ms", "forward_ms"], nodes=16).groupby("metric").value.max()
    share = _point(ratio(costs.get("tree_ms"), costs.get("forward_ms")))
    return [
        *made,
        ("building and following a tree of 16 nodes, share of the target's forward", "at most", 0.1, share),
    ]


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
        f"{tokens[method]:.2f} tokens against {tokens[other]:.2f} (a text's last round counted whole) and costs "
        f"{rounds[method]:.2f} ms{first} against {rounds[other]:.2f} ms{second}."
    )


# --- rows of summary.csv ----------------------------------------------------------------------------------------------


def rows(stage: str, lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Lines (method, metric, value, n, unit, ...) in the columns of summary.csv; what a line lacks stays empty."""
    return pd.DataFrame(lines, columns=COLUMNS).assign(stage=stage)


def draft_time_rows(times: pd.DataFrame) -> pd.DataFrame:
    """What `measure.draft_times` measured, in the columns of summary.csv."""
    named = times.rename(columns={"draft_ms": "value"}).assign(
        tree="chain", nodes=times.k, metric="draft_ms", unit="ms"
    )
    return rows(DRAFT_TIMES, named.to_dict("records"))


def tree_time_rows(times: pd.DataFrame) -> pd.DataFrame:
    """What `measure.tree_times` measured, in the columns of summary.csv: tree_ms (build and follow) and forward_ms."""
    lines = [
        {"method": "plain", "tree": "best_first", "nodes": line["nodes"], "task": "all", "metric": metric, "unit": "ms"}
        | {"value": line["build_ms"] + line["walk_ms"] if metric == "tree_ms" else line[metric]}
        for line in times.to_dict("records")
        for metric in ("tree_ms", "forward_ms")
    ]
    return rows(LOSSLESS, lines)


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


def _versus(summary: pd.DataFrame, method: str, other: str, stated: float, what: str, runs: Runs) -> tuple[str, str]:
    """A parallel drafter beside its older sibling at every temperature: (measured, verdict by the intervals)."""
    rows, texts, words, slow = best(summary), [], {}, []
    said: dict[str, list[float]] = {"faster": [], "slower": [], "undecided": []}
    for t in temperatures(summary):
        at = pick(rows, temperature=t)
        pair = [line(at, "speedup_vs_plain", m) for m in (method, other)]
        speed = beside(runs, *pair)
        if speed is None:
            continue
        steps = [value(at, "tokens_per_step", m) or math.nan for m in (other, method)]
        times = _spread(speed).replace(" ", "x ", 1)
        texts.append(f"T = {t:g}: {times}, tokens per step {steps[0]:.2f} -> {steps[1]:.2f}")
        word = "faster" if speed[1] > 1 else "slower" if speed[2] < 1 else "undecided"
        said[word].append(t)
        words[t] = word if word == "undecided" else f"{word} by {abs(speed[0] - 1):.0%}"
        if all(each["value"] < 1 for each in pair):
            slow.append(t)
    if not words:
        return "", "not measured"
    held, lost, rest = said.values()
    where = f" at {_heats(held or lost)}" if len(held or lost) < len(words) else ""
    verdict = f"holds in direction{where}" if held else f"does not hold here{where}"
    verdict += f": {_at(words)}" + (f"; {what} is {stated - 1:.0%}" if held else "")
    if not (held or lost):
        verdict = f"undecided at {_heats(rest)}"
    if slow:
        verdict += f"; both are slower than plain decoding at {_heats(slow)}"
    return f"{draft_name(rows, method)}, over {draft_name(rows, other)}: {'; '.join(texts)}", verdict


def claims(
    summary: pd.DataFrame, training: pd.DataFrame, facts: dict[str, Any] | None = None, runs: Runs | None = None
) -> pd.DataFrame:
    """Every claim of the paper that we may quote, its source, what was measured, and a verdict from the numbers.

    `facts` is the run's manifest: it tells machine, prompts, and what each drafter is. `runs`: see `goals`.
    """
    facts = facts or {}
    return pd.DataFrame(
        [
            _drafting_claim(summary, on_gpu(facts)),
            *_speed_claims(summary, facts, runs or {}),
            _best_claim(summary, facts),
            _cost_claim(training, facts),
        ],
        columns=["claim", "source", "measured", "verdict"],
    )


def _drafting_claim(summary: pd.DataFrame, gpu: bool) -> Claim:
    """Judged as the goals are, by the same bounds."""
    growth, expected = drafting(summary).set_index("method"), drafting_goals(summary, gpu)
    shown = [m for m, goal in expected.items() if goal[3]]
    text = "; ".join(f"{m}: {growth.ratio[m]:.2f}x from k = {growth.k_min[m]} to {growth.k_max[m]}" for m in shown)
    if "in_rounds" in growth and (inside := growth.in_rounds[shown].dropna()).size:
        whole = ", ".join(f"{m} {grown:.2f}x" for m, grown in inside.items())
        text += f" (the draft alone; in whole generations, where a drafter also reads what was accepted last: {whole})"
    held = {m: met(*goal[1:]) for m, goal in expected.items()}
    parts = [f"{m} {sign} {bound:.3g}: {held[m]}" for m, (_, sign, bound, _) in expected.items()]
    said = set(held.values())
    if "not measured" in said or said == {"yes"}:
        verdict = "not measured" if "not measured" in said else "holds"
    else:
        word = "holds in part" if "yes" in said else "undecided" if "undecided" in said else "does not hold here"
        verdict = f"{word} ({', '.join(parts)})"
    claim = "the cost of parallel drafting is nearly flat in k, that of autoregressive drafting linear"
    return claim, "motivation", text, verdict


def _speed_claims(summary: pd.DataFrame, facts: dict[str, Any], runs: Runs) -> list[Claim]:
    made = []
    for kind, stated, what, claim, source in (
        (
            "medusa-ps",
            1.62,
            "the largest gain stated",
            "ParallelSpec makes a baseline up to 62 % faster "
            "(its Medusa variant; secondary: accepted length 2.39 -> 3.31)",
            "abstract; parenthesis secondary",
        ),
        (
            "eagle-ps",
            1.15,
            "the largest gain that reviewers read",
            "EAGLE + ParallelSpec is faster than EAGLE (at most about 15 %)",
            "secondary",
        ),
    ):
        for method in siblings(summary, kind) or [kind]:
            text, verdict = _versus(summary, method, SIBLINGS[kind], stated, what, runs)
            if text and _drafter(facts, method).get("link"):
                verdict += f"; {method} has a link between its slots (notebook 2), which is this study's addition"
            made.append((claim, source, text, verdict))
    return made


def _drafter(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return ((facts.get("settings") or {}).get("drafters") or {}).get(name) or {}


def _best_claim(summary: pd.DataFrame, facts: dict[str, Any]) -> Claim:
    heat = nearest(summary)
    at = best(summary, heat)
    drafters = [m for kind in SIBLINGS for m in siblings(summary, kind)]
    rows = pick(at, "speedup_vs_plain", method=drafters).sort_values("value")
    text, verdict = "", "not measured"
    if len(rows):
        method = rows.method.iloc[-1]
        text = f"{draft_name(at, method)}, T = {heat:g}: {_spread(_ends(rows)[-1])}x plain decoding"
        against = pick(at, "speedup_vs_hf", method=method)
        if len(against):
            text += f", {_spread(_ends(against)[0])}x generate on {against.n.iloc[0]:.0f} prompts"
        text += "".join(f"; {each}" for each in _static(summary))
        data = (facts.get("settings") or {}).get("data")
        prompts = f", prompts: {asked(data)}" if data else ""
        path = str(((facts.get("settings") or {}).get("target") or {}).get("path") or "").lower()
        other = "another machine" if "llama-2-13b" in path else "another model and machine"
        verdict = f"not comparable ({other}{prompts}); shown for orientation"
    return "2.84x overall, Llama-2-13B, Spec-Bench, batch 1", "abstract", text, verdict


def _cost_claim(training: pd.DataFrame, facts: dict[str, Any]) -> Claim:
    """A drafter's training with that of what it starts from, beside the target's own."""
    cost = training_cost(training).set_index("stage")
    cards = {name: about.get("machine") for name, about in (facts.get("checkpoints") or {}).items()}
    own = cost.seconds.get("target")
    text, texts = "", []
    for name in cost.index.drop("target", errors="ignore") if own else ():
        line, starts = [name], []
        while (start := _drafter(facts, line[-1]).get("warm_start")) and start not in line and start in cost.index:
            line.append(start)
            starts.append(start)
        layers = _drafter(facts, name).get("layers")
        about = [f"{layers} layer{'s' if layers > 1 else ''}"] if layers else []
        about += [f"{cost.tokens[line].sum() / 1e6:.3g} M tokens"]
        about += [f"{cost.seconds[name] / own:.0%} without its start {', '.join(starts)}"] if starts else []
        if cards.get(name) and cards[name] != cards.get("target"):
            about.append(f"on {cards[name]}, the target on {cards.get('target') or 'another card'}")
        texts.append(f"{name} {cost.seconds[line].sum() / own:.0%} ({', '.join(about)})")
    if texts:
        text = f"of the target's own training time: {'; '.join(texts)}"
    verdict = "not comparable: beside so small a target its drafters are expensive" if texts else "not measured"
    return "minimal training cost (one layer, group-wise training, distillation)", "abstract", text, verdict


def training_cost(training: pd.DataFrame) -> pd.DataFrame:
    """What training took: stage, steps, tokens, seconds (0 where it was not recorded), ms a step."""
    rows = []
    for stage, part in training.groupby("stage", sort=False):
        seconds = part.value[part.metric == "seconds"].max() if (part.metric == "seconds").any() else 0.0
        rows.append((stage, int(part.step.max()), int(part.tokens.max()), seconds, 1e3 * seconds / part.step.max()))
    return pd.DataFrame(rows, columns=["stage", "steps", "tokens", "seconds", "ms_a_step"])


def shortfalls(summary: pd.DataFrame, gpu: bool = False, dtype: str = "float32", runs: Runs | None = None) -> list[str]:
    """What did not come out as the paper or the goals say, each with the numbers that explain it (see `goals`)."""
    said = [
        f"**{row.goal}**: wanted {row.wanted}, measured {row.measured}."
        for row in goals(summary, gpu, dtype, runs).itertuples()
        if row.met == "no"
    ]
    pairs = [(method, other) for kind, other in SIBLINGS.items() for method in siblings(summary, kind)]
    pairs += [(method, "plain") for method in siblings(summary, "eagle-ps")]
    for (method, other), t in product(pairs, temperatures(summary)):
        at = best(summary, t)
        rate = ratio(*(1.0 if m == "plain" else value(at, "speedup_vs_plain", m) for m in (method, other)))
        if rate is not None and rate <= 1:
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
    parts = [f"profile {facts.get('profile', '?')}", f"run on {name}", f"timed in {timed}" if timed else ""]
    parts.append(facts.get("started", "")[:10])
    parts += [f"torch {machine['versions']['torch']}"] if "torch" in machine.get("versions", {}) else []
    return ", ".join(part for part in parts if part)


def marks(profile: str) -> tuple[str, str]:
    """The lines of README between which a profile's results stand."""
    return f"<!-- results of {profile}: begin -->", f"<!-- results of {profile}: end -->"


def asked(data: dict[str, Any]) -> str:
    """What the prompts of a profile's [data] are, in words."""
    code = data.get("source", "code") == "code"
    if data.get("questions"):
        first = f"the questions of {Path(data['questions']).name}"
    else:
        first = "held-out code" if code else "held-out text"
    return f"{first} and held-out code" if data.get("held_out") and not code else first


def setting(facts: dict[str, Any]) -> str:
    """What was studied, in one sentence: the target, the text it was trained on, the prompts. From the manifest."""
    settings = facts.get("settings") or {}
    target, data = settings.get("target") or {}, settings.get("data") or {}
    if target.get("path"):
        model = f"The target is {target['path']}"
    elif target.get("train"):
        source = data.get("source", "code")
        text = "Python code" if source == "code" else ", ".join(Path(name.strip()).name for name in source.split(","))
        shape = f"a Llama of {target['layers']} layers and width {target['hidden_size']}"
        model = f"The target is {shape}, trained for this study on {text}"
    else:
        return ""
    return f"{model}; the prompts are {asked(data)}."


def readme_block(summary: pd.DataFrame, facts: dict[str, Any], profile: str, runs: pd.DataFrame | None = None) -> str:
    """What stands between README's marks: the figure and the headline table of a profile's results.

    Where the speedup notebook was not run, what the larger shapes would make of recorded rounds.
    """
    if best(summary).empty:
        said = [
            "Random weights; decisions are those that a trained model's rounds recorded, so this is the latency of a",
            "shape at that acceptance, not the quality of a model. Drafts are those that were fastest with that model,",
            f"whose steps are shorter. Batch 1{_batched(summary)}. Measured: {where(facts)}.",
        ]
        return f"{markdown(shapes(summary))}\n\n{' '.join(said)}"
    text = asked((facts.get("settings") or {}).get("data", {}))
    return "\n\n".join(
        (
            f"![Speedup over plain decoding by drafter and temperature](figures/{profile}/04_speedup.png)",
            markdown(headline(summary)),
            f"{' '.join(notes(summary, runs))} Prompts: {text}; batch 1. Measured: {where(facts)}.",
        )
    )


def readme(readme: Path, summary: Path) -> None:
    """Rewrites README's results block from a summary.csv and the manifest beside it.

    Raises UserError without marks, and where the speedup notebook has not been run.
    """
    text, summary = Path(readme).read_text(encoding="utf-8"), Path(summary)
    profile = summary.parent.name
    begin, end = marks(profile)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{readme}: wants one line {begin} and one line {end}")
    before, rest = text.split(begin)
    facts, rows = manifest.RunManifest(summary.parent / "manifest.json").read(), load(summary)
    if best(rows).empty and shapes(rows).empty:
        raise UserError(f"{summary} has no rows of {SPEEDUP}: run it first")
    block = readme_block(rows, facts, profile, runs(summary.parent).get(SPEEDUP))
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


TERMS = (  # what stands on the first page, and what it means
    ("secondary", "*secondary*: from readers or reviewers, not from the paper"),
    ("x plain", "*x plain*: times as fast as plain decoding in the same engine"),
    ("x generate", "*x generate*: times as fast as `transformers`' own `generate`"),
    ("tokens per step", "*tokens per step*: tokens that one pass of the target yields"),
    ("best_first", "*best_first N (k = d)*: a tree of N drafted tokens, at most d deep, chosen from one pass"),
    ("dynamic", "*dynamic N (k = d)*: such a tree grown level by level, a pass each"),
    ("static", "*static*: a tree of one shape for every text"),
    ("coupled", "*coupled*: sampling with noise fixed by seed and position, so that texts can be compared"),
    ("numeric tie", "*numeric tie*: two best scores closer than the number format can tell"),
)


def lead(summary: pd.DataFrame, facts: dict[str, Any], judged: pd.DataFrame) -> list[str]:
    """The page in a few sentences: what was studied and on which card, how fast, how many goals of `judged` are met."""
    title, machine = str(facts.get("title") or ""), facts.get("machine") or {}
    card = machine.get("gpu") or machine.get("cpu")
    said = [f"{title[:1].upper()}{title[1:]}." if title else "", f"It ran on {card}." if card else "", setting(facts)]
    heat, rows = nearest(summary), best(summary)
    for method in siblings(summary, "eagle-ps"):
        speed = found(rows, "speedup_vs_plain", method, temperature=heat)
        if not speed:
            continue
        text = f"At T = {heat:g} {draft_name(rows, method)}, decodes {_spread(speed)} times as fast as plain decoding"
        wide = value(rows, "speedup_vs_plain", PLAIN32, temperature=heat)
        text += f" ({speed[0] / wide:.2f} times as in float32)" if wide else ""
        pairs = {
            t: over(*(found(rows, "speedup_vs_plain", m, temperature=t) for m in (method, "eagle")))
            for t in temperatures(summary)
        }
        ratios = _at({t: f"{each[0]:.2f}" for t, each in pairs.items() if each})
        said.append(text + (f"; its speed over that of {draft_name(rows, 'eagle')}, is {ratios}." if ratios else "."))
    for task in [t for t in pick(summary, stage=COST).task.dropna().unique() if str(t).endswith(" x 1")]:
        of = pick(with_k(summary), "speedup_vs_plain", stage=COST, task=task).sort_values("value")
        if rows.empty and len(of := of[~of.method.isin(BASELINES)]):
            top = of.iloc[-1]
            shape = f"{top.method}, {shape_name(top.k, top.tree, top.nodes)}"
            name = task.removesuffix(" x 1")
            said.append(
                f"{name} at batch 1: {shape}, is fastest, {top.value:.2f} times as fast as plain decoding "
                "at the replayed acceptance."
            )
    counts = judged.met.value_counts()
    if len(counts):
        words = ("yes", "no", "undecided", "not measured")
        of = ", ".join(f"{counts[word]} {word}" for word in words if word in counts)
        said.append(f"Of {counts.sum()} goals: {of}.")
    return [text for text in said if text]


def _judged(summary: pd.DataFrame, facts: dict[str, Any], runs: Runs) -> pd.DataFrame:
    """The goals of a run; of a profile of few notebooks those that it measured."""
    table = goals(summary, on_gpu(facts), facts.get("dtype") or "float32", runs)
    return table[table.met != "not measured"] if (facts.get("settings") or {}).get("stages") else table


def _paragraph(sentences: Sequence[str]) -> str:
    text = escaping.escape(" ".join(sentences), quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"[*]([^*]+)[*]", r"<em>\1</em>", text)
    return f"<p>{text}</p>"


def _front(facts: dict[str, Any], results: Path) -> str:
    """The page's first part: where it was measured, warnings, summary, claims (of notebook 8), headline, goals."""
    line = escaping.escape(where(facts))
    parts = [f"<p>{line}. <code>manifest.json</code> beside this page describes the run.</p>"]
    parts += [f'<p class="warning">{escaping.escape(text)}</p>' for text in facts.get("warnings", [])]
    tables, below = {}, {}
    if (results / "claims.csv").is_file():
        told = pd.read_csv(results / "claims.csv", keep_default_na=False)
        few = (facts.get("settings") or {}).get("stages")  # a profile of few notebooks
        tables["Claims of the paper"] = told[told.verdict != "not measured"] if few else told
    if (results / "summary.csv").is_file():
        summary = load(results / "summary.csv")
        generations = runs(results)
        tables |= {"Headline": headline(summary), "Goals": _judged(summary, facts, generations)}
        parts.append(_paragraph(lead(summary, facts, tables["Goals"])))
        below["Headline"] = _paragraph(notes(summary, generations.get(SPEEDUP)))
        if tables["Goals"].measured.str.contains(" to ").any():
            about = ["Numbers in brackets are 95 % intervals; a goal whose bound lies within them is undecided."]
            about += ["Ratios of what was generated from the same prompts are paired by prompt."]
            below["Goals"] = _paragraph(about)
    tables = {name: frame for name, frame in tables.items() if len(frame)}
    shown = [
        f"<h2>{name}</h2>{frame.to_html(index=False, border=0)}{below.get(name, '')}" for name, frame in tables.items()
    ]
    terms = [meaning for term, meaning in TERMS if any(term in text for text in shown)]
    return "\n".join([*parts, *([_paragraph(["; ".join(terms) + "."])] if terms else []), *shown])
