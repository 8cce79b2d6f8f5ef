"""Figures and coloured text. One function a figure: data frames in, a matplotlib `Figure` out; `save` writes it.

Nothing here changes matplotlib's global state. A method keeps its colour, marker, dash and hatch in every figure, so
chosen that they differ in greyscale too: a parallel drafter is dark and solid, its older sibling light and dashed.
"""

from __future__ import annotations

import functools
import html
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import HTML, Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.io.formats.style import Styler

from psnb import decode, groups, manifest
from psnb.decode import Generation
from psnb.measure import BASELINES

SOLID, DASHED, DOTTED = (), (4, 2), (1, 1.5)
STYLES: dict[str, tuple[str, str, tuple, str]] = {  # colour, marker, dashes, hatch
    "plain": ("#808080", "P", DOTTED, ""),
    "hf_generate": ("#b3b3b3", "X", DOTTED, "oo"),
    "hf_static": ("#d0d0d0", "v", DOTTED, "++"),
    "medusa": ("#f0b040", "s", DASHED, "//"),
    "medusa-ps": ("#a63603", "D", SOLID, "xx"),
    "eagle": ("#74b9e8", "^", DASHED, ".."),
    "eagle-ps": ("#08519c", "o", SOLID, ""),
}
TREES: dict[str, tuple[str, str, tuple, str]] = {
    "chain": ("#808080", "s", DOTTED, ""),
    "static": ("#74b9e8", "^", DASHED, ""),
    "best_first": ("#08519c", "o", SOLID, ""),
    "dynamic": ("#000000", "D", SOLID, ""),
}
SPARE = [("#1b7837", "v", SOLID, "--"), ("#762a83", "p", DASHED, "++"), ("#000000", "h", SOLID, "||")]
PARTS = {"draft_ms": "draft", "verify_ms": "verify", "walk_ms": "walk", "commit_ms": "commit", "host_ms": "host"}
WHOLE = "one graph"
PART_STYLES = {
    "draft": ("#08519c", ""),
    "verify": ("#bdd7e7", "//"),
    "walk": ("#1b7837", "\\\\"),
    "commit": ("#f0b040", "xx"),
    "host": ("#d9d9d9", ".."),
    WHOLE: ("#9ecae1", "//"),
}
LABELS = {
    "tokens_per_step": "tokens per target step (own token included)",
    "speedup_vs_plain": "speedup over plain decoding (x)",
    "speedup_vs_hf": "speedup over transformers' generate (x)",
    "accept_cond": "P(slot i accepted | slots before it accepted)",
    "accept_uncond": "P(slots 0..i all accepted)",
}


# --- helpers --------------------------------------------------------------------------------------------------------


def pick(summary: pd.DataFrame, metric: str | Sequence[str] | None = None, **where: Any) -> pd.DataFrame:
    """Rows of a summary (DESIGN 7's columns) with that metric (or those) and `column=value` for each of `where`."""
    where |= {} if metric is None else {"metric": [metric] if isinstance(metric, str) else list(metric)}
    keep = pd.Series(True, summary.index)
    for column, value in where.items():
        keep &= summary[column].isin(value) if isinstance(value, list | tuple) else summary[column] == value
    return summary[keep]


def by_slot(summary: pd.DataFrame, metric: str, **where: Any) -> pd.DataFrame:
    """Rows `metric`_0, `metric`_1, ... with a column `slot`."""
    rows = pick(summary, summary.metric[summary.metric.str.fullmatch(rf"{metric}_\d+")].unique().tolist(), **where)
    return rows.assign(slot=rows.metric.str.rsplit("_", n=1).str[-1].astype(int)).sort_values("slot", kind="stable")


def with_k(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with integers k and nodes, 0 for the baselines, whether it comes from memory or from a file."""
    numbers = {name: pd.to_numeric(summary[name]).fillna(0).astype(int) for name in ("k", "nodes")}
    return summary.assign(**numbers, tree=summary.tree.fillna(""))


def shape_name(k: int, tree: str, nodes: int) -> str:
    """How a draft is laid out, in words: k = 4, or best_first 16 (k = 8)."""
    return "" if not k else f"k = {k:g}" if tree in ("", "chain") else f"{tree} {nodes:g} (k = {k:g})"


def at_best(summary: pd.DataFrame) -> pd.DataFrame:
    """Of every method the rows of one draft shape: the one with the highest mean speedup over plain decoding."""
    summary, shape = with_k(summary), ["tree", "k", "nodes"]
    speed = pick(summary, "speedup_vs_plain", task="all").groupby(["method", *shape]).value.mean()
    best = {method: part.idxmax()[1:] for method, part in speed.groupby("method")}
    own = zip(summary.method, summary.tree, summary.k, summary.nodes, strict=True)
    keep = [best.get(method, tuple(rest)) == tuple(rest) for method, *rest in own]
    return summary[pd.Series(keep, summary.index, dtype=bool)]


def order(methods: Iterable[str]) -> list[str]:
    """Methods in the fixed order of the figures, those that have no place in it last."""
    known = list(STYLES)
    return sorted(dict.fromkeys(methods), key=lambda m: (known.index(m) if m in known else len(known), m))


def _style(methods: Sequence[str]) -> dict[str, tuple[str, str, tuple, str]]:
    spare = iter(SPARE * (1 + len(methods) // len(SPARE)))
    return {method: STYLES.get(method) or TREES.get(method) or next(spare) for method in methods}


def _themed(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        look = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook", font_scale=0.85)}
        with mpl.rc_context({**look, "hatch.linewidth": 0.6, "axes.titlesize": 11}):
            return draw(*args, **kwargs)

    return wrapper


def _axes(
    columns: int = 1, width: float = 5.0, height: float = 3.6, rows: int = 1, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _lines(ax: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """One line a method with its 95 % interval (columns low and high)."""
    styles = _style(order(frame.method))
    sns.lineplot(
        frame, x=x, y=y, hue="method", style="method", hue_order=list(styles), style_order=list(styles),
        palette={m: s[0] for m, s in styles.items()}, markers={m: s[1] for m, s in styles.items()},
        dashes={m: s[2] for m, s in styles.items()}, errorbar=None, markersize=7, ax=ax,
    )  # fmt: skip
    for method, part in frame.groupby("method"):
        ax.errorbar(part[x], part[y], yerr=_interval(part, y), fmt="none", ecolor=styles[method][0], capsize=3, lw=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title="")


def _bars(ax: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Grouped bars by method with their 95 % intervals (columns low and high)."""
    styles, places = _style(order(frame.method)), list(dict.fromkeys(frame[x]))
    palette = {m: s[0] for m, s in styles.items()}
    sns.barplot(
        frame, x=x, y=y, hue="method", order=places, hue_order=list(styles), palette=palette, errorbar=None, ax=ax
    )
    for i, (container, (method, style)) in enumerate(zip(ax.containers, styles.items(), strict=False)):
        for bar in container:
            bar.set(hatch=style[3], edgecolor="white", linewidth=0)
        part = frame[frame.method == method].set_index(x).reindex(places)
        centres = np.arange(len(places)) + (i - (len(styles) - 1) / 2) * 0.8 / len(styles)
        ax.errorbar(centres, part[y], yerr=_interval(part, y), fmt="none", ecolor="black", capsize=2, lw=0.8)
    ax.legend(title="")
    ax.set_xlabel("")


def _interval(part: pd.DataFrame, y: str) -> np.ndarray:
    """Lengths [2, n] of the error bars below and above the values."""
    return np.abs(np.stack([part[y] - part.low, part.high - part[y]])).astype(float)


def save(figure: Figure, folder: Path, name: str, caption: str) -> Image:
    """Write `name`.png and `name`.svg with the caption below the picture; return the picture for the notebook.

    The caption states units, sample size and profile. Raises UserError where the folder cannot be written.
    """
    text = textwrap.fill(caption, int(15 * figure.get_figwidth()))
    figure.text(0.01, -0.02, text, va="top", fontsize=8.5, color="#333333")
    pictures = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": name}):  # the same figure gives the same file
            meta = {"Date": None} if kind == "svg" else None
            figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=meta)
        pictures[kind] = buffer.getvalue()
        with manifest.replacing(Path(folder) / f"{name}.{kind}") as temporary:
            temporary.write_bytes(pictures[kind])
    width = int.from_bytes(pictures["png"][16:20])  # of the PNG header, in pixels
    return Image(pictures["png"], width=width * 2 // 3, alt=caption)


def table(frame: pd.DataFrame) -> Styler:
    """A frame for reading: no index, few digits, nothing in place of what is missing."""

    def shown(cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
        return f"{cell:,}" if isinstance(cell, int | np.integer) else html.escape(str(cell))

    left = {"selector": "th, td", "props": "text-align: left; white-space: normal"}
    return frame.style.hide(axis="index").format(shown, na_rep="").set_table_styles([left])


# --- data and training ----------------------------------------------------------------------------------------------


@_themed
def packed(documents: np.ndarray, row: int = 0) -> Figure:
    """Packed rows `documents` [rows, length] (-1 is padding) as strips, and who sees whom in one of them."""
    figure, axes = _axes(2, width=5, height=3.8, width_ratios=[3, 2])
    left, right = axes[0]
    shades = np.where(documents < 0, np.nan, documents % 4)
    left.imshow(shades, aspect="auto", cmap="YlGnBu", vmin=-0.6, vmax=4.5, interpolation="nearest")
    for y, line in enumerate(documents):
        left.vlines(np.flatnonzero(np.diff(line)) + 0.5, y - 0.5, y + 0.5, color="black", lw=1)
    left.hlines(np.arange(len(documents) - 1) + 0.5, -0.5, documents.shape[1] - 0.5, color="white", lw=2)
    left.set(title="packed rows: a shade is a document", xlabel="position in the row (tokens)", ylabel="row")
    one = documents[row]
    sees = (one[:, None] == one[None]) & np.tri(len(one), dtype=bool) & (one >= 0)
    right.imshow(np.where(sees, one[:, None] % 4, np.nan), cmap="YlGnBu", vmin=-0.6, vmax=4.5, interpolation="nearest")
    right.set(title=f"row {row}: which key (x) a query (y) sees", xlabel="key position", ylabel="query position")
    for ax in (left, right):
        ax.grid(False)
    return figure


@_themed
def training_curves(training: pd.DataFrame, metrics: Sequence[str] = ("loss",)) -> Figure:
    """One panel a stage: the metrics against tokens seen. `training` has columns stage, step, tokens, metric, value."""
    stages = [s for s, part in training.groupby("stage", sort=False) if part.metric.isin(metrics).any()]
    figure, axes = _axes(len(stages) or 1, width=max(3.2, 9 / max(len(stages), 1)), height=3.4)
    for ax, stage in zip(axes[0], stages, strict=False):
        part = training[(training.stage == stage) & training.metric.isin(metrics)]
        part = part.assign(millions=part.tokens / 1e6)
        shown = [m for m in metrics if (part.metric == m).any()]
        palette = dict(zip(shown, sns.color_palette("viridis", len(shown) + 1), strict=False))
        sns.lineplot(
            part, x="millions", y="value", hue="metric", style="metric", hue_order=shown, style_order=shown,
            palette=palette, errorbar=None, ax=ax,
        )  # fmt: skip
        rare = part[part.groupby("metric").metric.transform("size") < 20]
        ax.scatter(rare.millions, rare.value, color=rare.metric.map(palette).tolist(), s=25)
        ax.legend(title="")
        ax.set(title=stage, xlabel="tokens seen (millions)", ylabel="loss" if ax is axes[0, 0] else "")
    return figure


@_themed
def slot_curves(training: pd.DataFrame) -> Figure:
    """One panel a drafter: acceptance of each slot, given the slots before it, while it trains."""
    slots = by_slot(training, "accept_cond")
    stages = list(dict.fromkeys(slots.stage))
    figure, axes = _axes(len(stages) or 1, width=max(2.6, 10 / max(len(stages), 1)), height=3.4, sharey=True)
    for ax, stage in zip(axes[0], stages, strict=False):
        part = slots[slots.stage == stage]
        count = int(part.slot.max()) + 1
        sns.lineplot(
            part.assign(millions=part.tokens / 1e6), x="millions", y="value", hue="slot", errorbar=None, legend=False,
            palette=sns.color_palette("viridis_r", count + 1)[1:], marker="o", markersize=4, ax=ax,
        )  # fmt: skip
        for slot, line in part.groupby("slot"):
            end = (line.tokens.iloc[-1] / 1e6, line.value.iloc[-1])
            ax.annotate(str(slot), end, (4, -3), textcoords="offset points", fontsize=8)
        ax.set(title=stage, xlabel="tokens seen (millions)", ylabel=LABELS["accept_cond"], ylim=(0, 1))
    return figure


@_themed
def group_mask(n: int, k: int) -> Figure:
    """The attention mask of group-wise training for n anchors and k slots, as `groups` has it, with position ids."""
    rows = groups.layout(n, k - 1)
    sees = groups.mask(*rows, torch.zeros(1, n, dtype=torch.long))[0, 0].numpy()
    depth, anchor = (part.numpy() for part in rows)
    size, small = n * k, n * k <= 12
    side = min(6.0, max(2.4, 0.25 * size))
    figure, axes = _axes(1, width=side + 1.6, height=side + 1.4)
    ax = axes[0, 0]
    own = (depth[None] > 0) & sees  # a mask row of the own group; the others are real tokens
    ax.imshow(np.where(sees, 1 + own, np.nan), cmap=mpl.colors.ListedColormap(["#9ecae1", "#08519c"]), vmin=1, vmax=2)
    if small:
        for (y, x), seen in np.ndenumerate(sees):
            ax.text(x, y, int(seen), ha="center", va="center", color="white" if own[y, x] else "black", fontsize=9)
    for edge in range(n, size, n):
        ax.axhline(edge - 0.5, color="black", lw=1.2)
        ax.axvline(edge - 0.5, color="black", lw=1.2)
    names = [f"({d},{t})" for d, t in zip(depth, anchor, strict=False)]
    ax.set_xticks(range(size), names, rotation=90, fontsize=8)
    ax.set_yticks(
        range(size), [f"{name}  pos {d + t}" for name, d, t in zip(names, depth, anchor, strict=False)], fontsize=8
    )
    title = f"n = {n} anchors, k = {k} slots\nlight: a real token, dark: a mask of its own group"
    ax.set(title=title, xlabel="key row (depth, anchor)", ylabel="query row, position id")
    ax.grid(False)
    return figure


# --- measurements ---------------------------------------------------------------------------------------------------


@_themed
def draft_time(times: pd.DataFrame) -> Figure:
    """Time to draft k tokens against k; columns method, k, draft_ms, low, high. Right: relative to k = 1."""
    figure, axes = _axes(2, width=4.6)
    first = times[times.k == times.k.min()].set_index("method").draft_ms
    scale = times.method.map(first)
    _lines(axes[0, 0], times, "k", "draft_ms")
    relative = times.assign(**{c: times[c] / scale for c in ("draft_ms", "low", "high")})
    _lines(axes[0, 1], relative, "k", "draft_ms")
    ks = np.sort(times.k.unique())
    axes[0, 1].plot(ks, ks / ks.min(), color="#999999", lw=1, ls=":", label="linear in k")
    axes[0, 1].legend(title="")
    axes[0, 0].set(xlabel="draft length k", ylabel="time to draft k tokens (ms)", ylim=(0, None))
    axes[0, 1].set(xlabel="draft length k", ylabel=f"relative to k = {ks.min()} (x)", ylim=(0, None))
    return figure


@_themed
def acceptance(summary: pd.DataFrame, **where: Any) -> Figure:
    """Acceptance by slot, conditional and cumulative. `where` selects rows, for example task="all", temperature=0.7."""
    figure, axes = _axes(2, width=4.6)
    for ax, metric in zip(axes[0], ("accept_cond", "accept_uncond"), strict=False):
        _lines(ax, by_slot(summary, metric, **where), "slot", "value")
        ax.set(xlabel="slot i", ylabel=LABELS[metric], ylim=(0, 1))
    return figure


@_themed
def against_k(summary: pd.DataFrame, model: pd.DataFrame | None = None, **where: Any) -> Figure:
    """tokens_per_step and speedup against k with intervals; `model` (method, k, predicted) is drawn as broad lines."""
    figure, axes = _axes(2, width=4.6)
    for ax, metric in zip(axes[0], ("tokens_per_step", "speedup_vs_plain"), strict=False):
        rows = with_k(pick(summary, metric, tree="chain", **where))
        _lines(ax, rows, "k", "value")
        ax.set(xlabel="draft length k", ylabel=LABELS[metric])
        ax.axhline(1, color="#4d4d4d", lw=1, ls=":")
        if metric == "speedup_vs_plain" and model is not None:
            for method, part in pick(model, tree="chain").groupby("method"):
                colour = _style([method])[method][0]
                ax.plot(part.k, part.predicted, color=colour, lw=4, alpha=0.3, label=f"{method}: model")
        ax.legend().remove()
    _legend_right(axes[0, -1])
    return figure


@_themed
def against_nodes(summary: pd.DataFrame, **where: Any) -> Figure:
    """tokens_per_step and speedup against the nodes of a draft: trees with intervals, chains (k nodes) dotted."""
    figure, axes = _axes(2, width=4.6)
    for ax, metric in zip(axes[0], ("tokens_per_step", "speedup_vs_plain"), strict=False):
        rows = with_k(pick(summary, metric, **where))
        rows = rows[rows.k > 0]
        _lines(ax, rows[rows.tree != "chain"], "nodes", "value")
        for method, part in rows[rows.tree == "chain"].groupby("method"):
            ax.plot(part.nodes, part.value, color=_style([method])[method][0], ls=":", label=f"{method}: chain")
        ax.set(xlabel="drafted nodes N", ylabel=LABELS[metric])
        ax.axhline(1, color="#4d4d4d", lw=1, ls=":")
        ax.legend().remove()
    _legend_right(axes[0, -1])
    return figure


@_themed
def tree_kinds(summary: pd.DataFrame, **where: Any) -> Figure:
    """tokens_per_step against N, a panel a drafter: its own tree, the static tree, and its chain (k nodes)."""
    rows = with_k(pick(summary, "tokens_per_step", **where))
    rows = rows[rows.k > 0]
    methods = order(rows.method)
    figure, axes = _axes(len(methods), width=max(2.8, 11 / max(len(methods), 1)), height=3.4, sharey=True)
    for ax, method in zip(axes[0], methods, strict=False):
        part = rows[rows.method == method]
        _lines(ax, part.assign(method=part.tree).sort_values("nodes"), "nodes", "value")
        ax.set(title=method, xlabel="drafted nodes N", ylabel=LABELS["tokens_per_step"] if ax is axes[0, 0] else "")
        ax.legend(title="", fontsize=8)
    return figure


@_themed
def draft_tree(one: decode.Round, tokenizer: Any) -> Figure:
    """A draft tree as it was verified: a column a slot, accepted nodes and the way to them dark."""
    parent, deepest = one.parent, {0: 0}
    children: dict[int, list[int]] = {}
    for node, above in enumerate(parent, start=1):
        children.setdefault(above, []).append(node)
        deepest[node] = deepest[above] + 1
    place: dict[int, float] = {}

    def put(row: int, top: float) -> float:
        """Leaves take a line each, a parent stands beside its first child; returns the next free line."""
        below = top
        for child in children.get(row, []):
            below = put(child, below)
        place[row] = top
        return max(below, top + 1)

    lines = put(0, 0.0)
    figure, axes = _axes(1, width=1.6 * (max(deepest.values()) + 1), height=0.27 * lines + 0.6)
    ax = axes[0, 0]
    for row in place:
        dark = row in one.path
        if row:
            above = parent[row - 1]
            ax.plot(
                [deepest[above], deepest[row]], [place[above], place[row]],
                color="#08519c" if dark else "#c0c0c0", lw=2 if dark else 1, zorder=1,
            )  # fmt: skip
        text = repr(tokenizer.decode([one.drafted[row - 1]]))[1:-1] if row else "root"
        look = {"boxstyle": "round,pad=0.25", "fc": "#08519c" if dark else "#ffffff", "ec": "#808080", "lw": 0.6}
        ax.text(
            deepest[row], place[row], text.replace("$", r"\$"), ha="center", va="center", fontsize=8,
            color="white" if dark else "black", bbox=look, zorder=2,
        )  # fmt: skip
    ax.set(xlim=(-0.5, max(deepest.values()) + 0.5), ylim=(lines - 0.4, -0.6))
    ax.set_axis_off()
    return figure


@_themed
def speedups(summary: pd.DataFrame, metric: str = "speedup_vs_plain") -> Figure:
    """One bar a method (at its best k) and temperature, over the whole prompt set, with 95 % intervals."""
    rows = pick(at_best(summary), metric, task="all").sort_values("temperature")
    rows = rows[rows.method != "plain"].assign(at=lambda r: r.temperature.map("T = {:g}".format))
    figure, axes = _axes(1, width=8, height=3.8)
    _bars(axes[0, 0], rows, "at", "value")
    axes[0, 0].set(ylabel=LABELS[metric])
    axes[0, 0].axhline(1, color="black", lw=1)
    _legend_right(axes[0, 0])
    return figure


@_themed
def per_task(summary: pd.DataFrame, metric: str = "speedup_vs_plain") -> Figure:
    """One panel a temperature: a bar a method (at its best k) and task family."""
    rows = pick(at_best(summary), metric)
    rows = rows[(rows.task != "all") & ~rows.method.isin(BASELINES)]
    temperatures = sorted(rows.temperature.unique())
    figure, axes = _axes(1, rows=len(temperatures) or 1, width=9, height=2.5, sharex=True, sharey=True)
    for ax, temperature in zip(axes[:, 0], temperatures, strict=False):
        _bars(ax, rows[rows.temperature == temperature].sort_values("task"), "task", "value")
        ax.axhline(1, color="black", lw=1)
        ax.set(title=f"T = {temperature:g}", ylabel="")
        ax.get_legend().remove()
    if len(temperatures):
        _legend_right(axes[0, 0])
    figure.supylabel(LABELS[metric], fontsize=10)
    return figure


@_themed
def cost_split(summary: pd.DataFrame, temperature: float) -> Figure:
    """What one round costs, in milliseconds by part, and how many tokens it yields; one bar a method and shape.

    Where a round is one CUDA graph its parts are not known apart, and it is one bar.
    """
    summary, shape = with_k(summary), ["method", "k", "tree", "nodes"]
    rows = pick(summary, list(PARTS), task="all", temperature=temperature)
    table = rows.assign(part=rows.metric.map(PARTS)).pivot_table(index=shape, columns="part", values="value")
    table = table.reindex(columns=[p for p in PARTS.values() if p in table]).fillna(0.0)
    if "draft" not in table or not table.draft.any():
        table = table.rename(columns={"verify": WHOLE})
    table = table.loc[:, table.any()]
    table = table.loc[[i for m in order(table.index.get_level_values(0)) for i in table.index if i[0] == m]]
    tokens = pick(summary, "tokens_per_step", task="all", temperature=temperature).set_index(shape).value
    figure, axes = _axes(1, width=8, height=0.45 * len(table) + 1.3)
    ax, left = axes[0, 0], np.zeros(len(table))
    names = [_way(*index) for index in table.index]
    for part in table:
        colour, hatch = PART_STYLES[part]
        ax.barh(names, table[part], left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=part)
        left += table[part].to_numpy()
    for y, (index, total) in enumerate(zip(table.index, left, strict=False)):
        if total:
            each = tokens.get(index, 1.0)
            ax.text(total, y, f"  {each:.2f} tokens: {total / each:.2f} ms a token", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="time of one round (ms)", xlim=(0, 1.5 * left.max() if len(left) else 1))
    ax.grid(axis="y", visible=False)
    _legend_right(ax)
    return figure


@_themed
def against_batch(frame: pd.DataFrame) -> Figure:
    """Tokens a second and speedup over plain decoding against the batch size: columns of `cost.speeds`, a line each."""
    figure, axes = _axes(2, width=4.6)
    frame = frame.assign(method=[_way(*line) for line in frame[["method", "k", "tree", "nodes"]].to_numpy()])
    shown = {"tokens_per_second": "tokens/s, all sequences", "speedup": LABELS["speedup_vs_plain"]}
    for ax, (column, label) in zip(axes[0], shown.items(), strict=True):
        sns.lineplot(frame, x="batch", y=column, hue="method", style="method", markers=True, errorbar=None, ax=ax)
        ax.set(xlabel="batch size", ylabel=label, xscale="log", xticks=frame.batch.unique())
        ax.set_xticklabels([f"{b:g}" for b in frame.batch.unique()])
        ax.get_legend().remove()
    axes[0, 1].legend(title="", fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))  # once, and off the lines
    axes[0, 1].axhline(1, color="#4d4d4d", lw=1, ls=":")
    return figure


@_themed
def against_tokens(frames: dict[str, pd.DataFrame], goal: float) -> Figure:
    """Speedup as a function of tokens_per_step, a panel a shape (`cost.speeds` at batch 1); dots: what was recorded."""
    figure, axes = _axes(len(frames), width=4.6, sharey=True)
    for ax, (name, frame) in zip(axes[0], frames.items(), strict=True):
        frame = frame[(frame.batch == 1) & (frame.k > 0)]
        lines = zip(sns.color_palette("colorblind", len(frame)), frame.to_dict("records"), strict=True)
        for i, (colour, line) in enumerate(lines):
            slope, most = line["speedup"] / line["tokens_per_step"], line["k"] + 1
            label = _way(line["method"], line["k"], line["tree"], line["nodes"])
            ax.plot([1, most], [slope, slope * most], color=colour, ls=("-", "--", ":", "-.")[i % 4], label=label)
            ax.plot(line["tokens_per_step"], line["speedup"], "o", color=colour)
        ax.axhline(goal, color="#4d4d4d", lw=1, ls=":", label=f"{goal:g}: the paper's")
        ax.set(title=name, xlabel=LABELS["tokens_per_step"], ylabel=LABELS["speedup_vs_plain"])
        ax.legend(title="", fontsize=7)
    return figure


def _way(method: str, k: int, tree: str, nodes: int) -> str:
    return f"{method}, {shape_name(k, tree, nodes)}" if k else method


def _legend_right(ax: Axes) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, title="")


# --- coloured text --------------------------------------------------------------------------------------------------

PRE = "white-space:pre-wrap;font-family:monospace;font-size:13px;line-height:1.65;max-height:40em;overflow:auto"


def slot_colours(count: int) -> list[str]:
    """Light to dark: slot 0 is the lightest, so the order also reads in greyscale."""
    return sns.color_palette("YlGnBu", count + 1).as_hex()[:count]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text each token adds to the text before it (some tokenizers drop a token's leading space on its own)."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        pieces.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return pieces


def _span(text: str, background: str = "", title: str = "", border: str = "") -> str:
    """One token. A newline inside a marked token is shown as an arrow before it breaks the line."""
    shown = html.escape(text).replace("\n", "\u21b5\n") if background or border else html.escape(text)
    style = f"background:{background};color:{_ink(background)};border-radius:3px;" if background else ""
    style += f"box-shadow:inset 0 0 0 1px {border};" if border else ""
    return f'<span style="{style}" title="{html.escape(title)}">{shown}</span>' if style else shown


def _ink(background: str) -> str:
    red, green, blue = mpl.colors.to_rgb(background)
    return "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#000000"


def _block(text: str, note: str) -> HTML:
    return HTML(f'<div style="{PRE}">{text}</div><small>{note}</small>')


def tokens_html(text: str, tokenizer: Any) -> HTML:
    """A text with a border around every token; the token's id is its tooltip."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = (
        _span(piece, border="#888888", title=f"id {i}") for i, piece in zip(ids, _pieces(tokenizer, ids), strict=False)
    )
    return _block("".join(spans), f"{len(ids)} tokens, {len(text.encode())} bytes")


def loss_mask_html(ids: Sequence[int], mask: Sequence[int], tokenizer: Any) -> HTML:
    """A dialogue in which the tokens that the loss counts are coloured, the others plain."""
    spans = (
        _span(piece, "#fdd49e", f"id {i}: counted") if counted else _span(piece)
        for i, counted, piece in zip(ids, mask, _pieces(tokenizer, ids), strict=False)
    )
    return _block("".join(spans), f"{sum(map(bool, mask))} of {len(ids)} tokens are counted")


def coloured(generation: Generation, tokenizer: Any) -> HTML:
    """The prompt in grey, then every accepted draft token in its slot's colour; the target's own tokens stay plain.

    A token's tooltip names its round and slot.
    """
    slots = max([r.accepted if r.parent else len(r.drafted) for r in generation.rounds] or [0])
    colours, pieces = slot_colours(slots), _pieces(tokenizer, generation.tokens)
    counts, place = [0] * slots, {}
    for number, one in enumerate(generation.rounds):
        for slot in range(min(one.accepted, len(pieces) - one.start)):
            place[one.start + slot] = (number, slot)
            counts[slot] += 1
    spans = [
        _span(piece, colours[place[i][1]], f"round {place[i][0]}, slot {place[i][1]}") if i in place else _span(piece)
        for i, piece in enumerate(pieces)
    ]
    legend = " ".join(_span(f" slot {i}: {n} ", colours[i]) for i, n in enumerate(counts))
    prompt = html.escape(tokenizer.decode(generation.prompt))
    note = f"{len(pieces)} tokens"
    if slots:
        note = f"accepted draft tokens: {legend} &nbsp; the target's own: {len(pieces) - sum(counts)}. {note}"
        note += f" in {len(generation.rounds)} rounds, {generation.tokens_per_step:.2f} tokens per step"
    return _block(f'<span style="color:#888888">{prompt}</span>{"".join(spans)}', note)


# --- explorer -------------------------------------------------------------------------------------------------------


def explore(target: Any, drafter: Any, name: str, prompt: str, k: int, temperature: float, length: int = 64) -> HTML:
    """Generate from a prompt and show the coloured text with its time."""
    ids = target.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    settings = decode.Settings(k=k, temperature=temperature, max_new_tokens=length)
    result = decode.speculative(target, drafter, ids, settings)
    seconds = result.decode_seconds
    speed = (len(result.tokens) - 1) / seconds if seconds else 0.0  # the first token belongs to the prefill
    note = f"{name}, k = {k}, T = {temperature:g}: {1e3 * seconds:.0f} ms, {speed:.0f} tokens a second"
    return HTML(coloured(result, target.tokenizer).data + f"<br><small>{note}</small>")


def explorer(target: Any, drafters: dict[str, Any], prompt: str, k: int = 5, temperature: float = 0.7) -> Any:
    """Widgets to try a prompt, a drafter, k and T; where nobody can move them, the picture of one result."""
    name = list(drafters)[-1]
    if not manifest.live():
        return explore(target, drafters[name], name, prompt, min(k, drafters[name].k), temperature)
    import ipywidgets as widgets  # opens a channel to the front end, so only where there is one

    text = widgets.Textarea(prompt, description="prompt", layout=widgets.Layout(width="90%", height="9em"))
    which = widgets.Dropdown(options=list(drafters), value=name, description="drafter")
    length = widgets.IntSlider(k, 1, max(d.k for d in drafters.values()), description="k")
    heat = widgets.FloatSlider(temperature, min=0.0, max=1.5, step=0.1, description="T")
    button, shown = widgets.Button(description="generate", button_style="primary"), widgets.HTML()

    def generate(_: Any) -> None:
        button.disabled = True
        try:
            drafter = drafters[which.value]
            k = min(length.value, drafter.k)
            shown.value = explore(target, drafter, which.value, text.value, k, heat.value).data
        except Exception as error:  # shown where the reader looks; the widget stays usable
            shown.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            button.disabled = False

    button.on_click(generate)
    generate(None)
    return widgets.VBox([text, widgets.HBox([which, length, heat, button]), shown])


@_themed
def recipe(trainings: pd.DataFrame) -> Figure:
    """One row a variant, one panel a batch of `recipe.compare`'s table: tokens per step, 95 % intervals over rows."""
    batches = list(dict.fromkeys(trainings.sort_values("tokens").batch))
    heights = [trainings[trainings.batch == batch].variant.nunique() for batch in batches]
    figure = Figure(figsize=(8, 0.9 + 0.32 * sum(heights) + 0.3 * len(batches)), layout="constrained")
    axes = figure.subplots(len(batches) or 1, 1, squeeze=False, gridspec_kw={"height_ratios": heights or [1]})[:, 0]
    for ax, batch in zip(axes, batches, strict=False):
        part = trainings[trainings.batch == batch]
        places = {variant: i for i, variant in enumerate(dict.fromkeys(part.variant))}
        y = part.variant.map(places)
        ax.errorbar(
            part.tokens_per_step, y, xerr=_interval(part, "tokens_per_step"), fmt="o", color="#08519c", capsize=3
        )
        if (base := part[part.variant == "base"].tokens_per_step).size:
            ax.axvline(base.mean(), color="#808080", ls=":")
        ax.set(yticks=list(places.values()), yticklabels=list(places), title=batch, ylim=(-0.6, len(places) - 0.4))
    axes[-1].set_xlabel(LABELS["tokens_per_step"])
    return figure
