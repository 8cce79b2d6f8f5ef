"""Figures and coloured text. One function a figure: data frames in, a matplotlib `Figure` out; `save` writes it.

Nothing here changes matplotlib's global state. A method keeps its colour, marker, dash and hatch in every figure, so
chosen that they differ in greyscale too: a parallel drafter is dark and solid, its older sibling light and dashed.
Only a method without a place in `STYLES` takes a spare look. Trees and parts of a round have colours of no method.
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
from matplotlib.ticker import LogFormatter, MaxNLocator
from pandas.io.formats.style import Styler

from psnb import decode, groups, manifest
from psnb.decode import Generation
from psnb.measure import BASELINES

SOLID, DASHED, DOTTED = (), (4, 2), (1, 1.5)
STYLES: dict[str, tuple[str, str, tuple, str]] = {  # colour, marker, dashes, hatch
    "plain": ("#808080", "P", DOTTED, ""),
    "plain_float32": ("#4d4d4d", "*", DOTTED, "**"),
    "hf_generate": ("#b3b3b3", "X", DOTTED, "oo"),
    "hf_static": ("#d0d0d0", "v", DOTTED, "++"),
    "medusa": ("#f0b040", "s", DASHED, "//"),
    "medusa-ps": ("#a63603", "D", SOLID, "xx"),
    "eagle": ("#74b9e8", "^", DASHED, ".."),
    "eagle-ps": ("#08519c", "o", SOLID, ""),
    "eagle-ps-alone": ("#1b7837", "p", SOLID, "--"),
}
TREES: dict[str, tuple[str, str, tuple, str]] = {
    "chain": ("#c2a5cf", "s", DOTTED, ""),
    "static": ("#de77ae", "^", DASHED, ""),
    "best_first": ("#762a83", "o", SOLID, ""),
    "dynamic": ("#40004b", "D", SOLID, ""),
}
SPARE = [("#b2182b", "<", SOLID, "--"), ("#35978f", ">", DASHED, "++"), ("#000000", "h", SOLID, "||")]
PARTS = {"draft_ms": "draft", "verify_ms": "verify", "walk_ms": "walk", "commit_ms": "commit", "host_ms": "host"}
WHOLE = "one graph"
PART_STYLES = {
    "draft": ("#54278f", ""),
    "verify": ("#bcbddc", "//"),
    "walk": ("#c51b8a", "\\\\"),
    "commit": ("#fa9fb5", "xx"),
    "host": ("#252525", ".."),
    WHOLE: ("#9e9ac8", "//"),
}
LABELS = {
    "tokens_per_step": "tokens per target step (own token included)",
    "speedup_vs_plain": "speedup over plain decoding (x)",
    "accept_cond": "P(slot i accepted | slots before it accepted)",
    "accept_uncond": "P(slots 0..i all accepted)",
}
CURVES = {"loss": "training loss", "heldout_nats": "held-out text"}
WIDE = 0.45  # the 95 % interval of a share of about 20 rounds


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
    """Methods (or kinds of trees) in the fixed order of the figures, those that have no place in it last."""
    known = [*STYLES, *TREES]
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


def _panels(names: Iterable[str], width: float, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    """A panel a name, side by side in that width (inches); for no name one that says that nothing was measured."""
    count = len(list(names))
    figure, axes = _axes(count or 1, **kwargs, width=max(3.0, width / max(count, 1)))
    if not count:
        _nothing(axes[0, 0])
    return figure, axes[0]


def _nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)


def _lines(ax: Axes, frame: pd.DataFrame, x: str, y: str, dodge: float = 0.0) -> None:
    """One line a method with its 95 % interval (columns low and high), each moved by `dodge` along x from the last."""
    if frame.empty:
        return _nothing(ax)
    styles = _style(order(frame.method))
    places = {method: i - (len(styles) - 1) / 2 for i, method in enumerate(styles)}
    frame = frame.assign(**{x: frame[x] + dodge * frame.method.map(places)})
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
    if frame.empty:
        return _nothing(ax)
    styles, places = _style(order(frame.method)), list(dict.fromkeys(frame[x]))
    palette = {m: s[0] for m, s in styles.items()}
    sns.barplot(
        frame, x=x, y=y, hue="method", order=places, hue_order=list(styles), palette=palette, saturation=1,
        errorbar=None, ax=ax,
    )  # fmt: skip
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
    """A frame for reading: no index, few digits, nothing in place of what is missing; a seed is a name."""

    def shown(cell: Any) -> str:
        if isinstance(cell, bool | np.bool_):
            return "yes" if cell else "no"
        if isinstance(cell, float):
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
        return f"{cell:,}" if isinstance(cell, int | np.integer) else html.escape(str(cell))

    left = {"selector": "th, td", "props": "text-align: left; white-space: normal"}
    formats = {name: str if name == "seed" and pd.api.types.is_integer_dtype(frame[name]) else shown for name in frame}
    return frame.style.hide(axis="index").format(formats, na_rep="").set_table_styles([left])


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
    title = "packed rows: a shade is a document" + (", white is padding" if (documents < 0).any() else "")
    left.set(title=title, xlabel="position in the row (tokens)", ylabel="row")
    one = documents[row]
    sees = (one[:, None] == one[None]) & np.tri(len(one), dtype=bool) & (one >= 0)
    right.imshow(np.where(sees, one[:, None] % 4, np.nan), cmap="YlGnBu", vmin=-0.6, vmax=4.5, interpolation="nearest")
    right.set(title=f"row {row}: which key (x) a query (y) sees", xlabel="key position", ylabel="query position")
    for ax in (left, right):
        ax.grid(False)
    return figure


@_themed
def training_curves(training: pd.DataFrame, metrics: Sequence[str] = ("loss",)) -> Figure:
    """One panel a stage: the metrics against tokens seen. `training` has columns stage, step, tokens, metric, value.

    The target's loss is nats per token; a drafter's is a sum of its own, of which `loss_<slot>` is nats per token.
    """
    rows = training[training.metric.isin(metrics)]
    stages = list(dict.fromkeys(rows.stage))
    rows, label = _in_tokens(rows)
    own = training.metric.str.fullmatch(r"loss_\d+").any()
    slots = any(m.startswith("loss_") for m in metrics)
    unit = "loss (slots: nats per token)" if own and slots else "loss (each drafter's own)" if own else "nats per token"
    figure, axes = _panels(stages, width=9, height=3.4)
    for ax, stage in zip(axes, stages, strict=False):
        part = rows[rows.stage == stage]
        shown = [m for m in metrics if (part.metric == m).any()]
        palette = dict(zip(shown, sns.color_palette("viridis", len(shown) + 1), strict=False))
        sns.lineplot(
            part, x="seen", y="value", hue="metric", style="metric", hue_order=shown, style_order=shown,
            palette=palette, errorbar=None, ax=ax,
        )  # fmt: skip
        rare = part[part.groupby("metric").metric.transform("size") < 20]
        ax.scatter(rare.seen, rare.value, color=rare.metric.map(palette).tolist(), s=25)
        handles = ax.get_legend_handles_labels()[0]
        ax.legend(handles, [CURVES.get(m, m.replace("loss_", "slot ")) for m in shown], title="")
        if len(metrics) == 1:
            ax.get_legend().remove()
        ax.set(title=stage, xlabel=label, ylabel=unit if ax is axes[0] else "")
    return figure


def _in_tokens(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows with a column `seen`, their tokens in a unit that suits the most of them, and the axis' label."""
    most = rows.tokens.max() if len(rows) else 0
    scale, unit = (1e6, " (millions)") if most >= 1e6 else (1e3, " (thousands)") if most >= 1e4 else (1.0, "")
    return rows.assign(seen=rows.tokens / scale), f"tokens seen{unit}"


@_themed
def slot_curves(training: pd.DataFrame) -> Figure:
    """One panel a drafter: acceptance of each slot, given the slots before it, while it trains.

    The number of a slot stands beside the end of its line; drafters without rows are named below the panels.
    """
    slots, label = _in_tokens(by_slot(training, "accept_cond").dropna(subset="value"))
    stages = [stage for stage in dict.fromkeys(training.stage) if (slots.stage == stage).any()]
    figure, axes = _panels(stages, width=10, height=3.4, sharey=True)
    colours = sns.color_palette("viridis_r", int(slots.slot.max() if len(slots) else 0) + 2)[1:]
    for ax, stage in zip(axes, stages, strict=False):
        ends = {}
        for slot, line in slots[slots.stage == stage].groupby("slot"):
            ax.plot(line.seen, line.value, color=colours[slot], marker="o", markersize=4)
            ends[slot] = line.value.iloc[-1]
        for (slot, _), y in zip(
            sorted(ends.items(), key=lambda end: end[1]), _apart(sorted(ends.values())), strict=True
        ):
            ax.text(
                1.02, y, str(slot), color=colours[slot], transform=ax.get_yaxis_transform(), va="center", fontsize=9
            )
        ax.set(title=stage, xlabel=label, ylabel=LABELS["accept_cond"] if ax is axes[0] else "", ylim=(0, 1))
    drafters = training[training.metric == "loss_0"].stage.unique()
    if stages and (without := [stage for stage in drafters if stage not in stages]):
        figure.supxlabel(f"not measured while training: {', '.join(without)}", fontsize=9)
    return figure


def _apart(places: Sequence[float], gap: float = 0.055) -> np.ndarray:
    """Rising places moved as little as it takes to be `gap` apart and within 0..1: isotonic regression."""
    blocks: list[tuple[float, int]] = []  # mean of the places less their gaps, and how many
    for i, place in enumerate(places):
        mean, count = place - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            last, many = blocks.pop()
            mean, count = (last * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    means = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    gaps = gap * np.arange(len(means))
    return np.clip(means, 0, 1 - gaps[-1]) + gaps


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
    """Time to draft k tokens against k; columns method, k, draft_ms, low, high. Right: relative to the smallest k.

    Methods stand a little apart along k, so that equal ones are seen.
    """
    figure, axes = _axes(2, width=4.6)
    left, right = axes[0]
    first = times.sort_values("k").drop_duplicates("method").set_index("method").draft_ms
    scale = times.method.map(first)
    _lines(left, times, "k", "draft_ms", dodge=0.06)
    relative = times.assign(**{c: times[c] / scale for c in ("draft_ms", "low", "high")})
    _lines(right, relative, "k", "draft_ms", dodge=0.06)
    if len(ks := np.sort(times.k.unique())):
        right.plot(ks, ks / ks.min(), color="#999999", lw=1, ls=":", label="linear in k")
    left.set(xlabel="draft length k", ylabel="time to draft k tokens (ms)", ylim=(0, None))
    right.set(xlabel="draft length k", ylabel=f"relative to k = {min(ks, default=1)} (x)", ylim=(0, None))
    _legend_right(right, left)
    return figure


@_themed
def acceptance(summary: pd.DataFrame, **where: Any) -> Figure:
    """Acceptance by slot, conditional and cumulative. `where` selects rows, for example task="all", temperature=0.7.

    The conditional share of a late slot stands on the few rounds that reach it: a line ends before the first slot
    whose interval is wider than `WIDE`, or has no width because hardly any round reached it.
    """
    figure, axes = _axes(2, width=4.6, sharex=True)
    for ax, metric in zip(axes[0], ("accept_cond", "accept_uncond"), strict=True):
        rows = by_slot(summary, metric, **where)
        if metric == "accept_cond":
            width = rows.high - rows.low
            few = ((width > WIDE) | (width == 0)) & (rows.slot > 0)  # every round reaches slot 0
            rows = rows[~few.groupby(rows.method).cummax()]
            ax.set_title(f"slots whose 95 % interval is narrower than {WIDE:g}", fontsize=9)
        _lines(ax, rows, "slot", "value")
        ax.set(xlabel="slot i", ylabel=LABELS[metric], ylim=(0, 1))
    _legend_right(axes[0, 1], axes[0, 0])
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
            own = pick(model, tree="chain")
            for method, style in _style(order(own.method)).items():
                part = own[own.method == method]
                ax.plot(part.k, part.predicted, color=style[0], lw=4, alpha=0.3, label=f"{method}: model")
    _legend_right(axes[0, 1], axes[0, 0])
    return figure


@_themed
def against_nodes(summary: pd.DataFrame, **where: Any) -> Figure:
    """tokens_per_step and speedup against the nodes of a draft: trees with intervals, chains (k nodes) dotted.

    Of several trees of a method with as many nodes (other depths) the fastest is shown.
    """
    figure, axes = _axes(2, width=4.6)
    found = with_k(pick(summary, ["tokens_per_step", "speedup_vs_plain"], **where))
    found, draft = found[found.k > 0], ["method", "tree", "nodes", "k"]
    fastest = pick(found, "speedup_vs_plain").sort_values("value").drop_duplicates(draft[:3], keep="last")
    found = found.merge(fastest[draft], on=draft)
    for ax, metric in zip(axes[0], ("tokens_per_step", "speedup_vs_plain"), strict=False):
        rows = pick(found, metric)
        _lines(ax, rows[rows.tree != "chain"], "nodes", "value")
        chains = rows[rows.tree == "chain"]
        for method, style in _style(order(rows.method)).items():
            if len(part := chains[chains.method == method]):
                ax.plot(part.nodes, part.value, color=style[0], ls=":", label=f"{method}: chain")
        ax.set(xlabel="drafted nodes N", ylabel=LABELS[metric])
        ax.axhline(1, color="#4d4d4d", lw=1, ls=":")
    _legend_right(axes[0, 1], axes[0, 0])
    return figure


@_themed
def tree_kinds(summary: pd.DataFrame, **where: Any) -> Figure:
    """tokens_per_step against N, a panel a drafter: its own tree, the static tree, and its chain (k nodes)."""
    rows = with_k(pick(summary, "tokens_per_step", **where))
    rows = rows[rows.k > 0]
    methods = order(rows.method)
    figure, axes = _panels(methods, width=11, height=3.4, sharey=True)
    for ax, method in zip(axes, methods, strict=False):
        part = rows[rows.method == method]
        part = part.assign(method=part.tree.replace("", "chain")).sort_values("nodes")
        _lines(ax, part, "nodes", "value", dodge=0.3)
        ax.set_xticks(sorted(part.nodes.unique()))
        ax.set(title=method, xlabel="drafted nodes N", ylabel=LABELS["tokens_per_step"] if ax is axes[0] else "")
    _legend_right(axes[-1], *axes[:-1])
    return figure


@_themed
def draft_tree(one: decode.Round, tokenizer: Any) -> Figure:
    """A draft tree as it was verified: a column a slot, accepted nodes and the way to them dark, spaces visible."""
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
    figure, axes = _axes(1, width=1.6 * (max(deepest.values()) + 1), height=0.27 * lines + 0.9)
    ax = axes[0, 0]
    for row in place:
        dark = row in one.path
        if row:
            above = parent[row - 1]
            ax.plot(
                [deepest[above], deepest[row]], [place[above], place[row]],
                color="#08519c" if dark else "#c0c0c0", lw=2 if dark else 1, zorder=1,
            )  # fmt: skip
        text = repr(tokenizer.decode([one.drafted[row - 1]]))[1:-1].replace(" ", "\u2423") if row else "root"
        look = {"boxstyle": "round,pad=0.25", "fc": "#08519c" if dark else "#ffffff", "ec": "#808080", "lw": 0.6}
        ax.text(
            deepest[row], place[row], text.replace("$", r"\$"), ha="center", va="center", fontsize=8,
            color="white" if dark else "black", bbox=look, zorder=2,
        )  # fmt: skip
    for depth in range(1, max(deepest.values()) + 1):
        ax.text(depth, -1, f"slot {depth - 1}", ha="center", va="center", fontsize=8, color="#4d4d4d")
    ax.set(xlim=(-0.5, max(deepest.values()) + 0.5), ylim=(lines - 0.4, -1.6))
    ax.set_axis_off()
    return figure


@_themed
def speedups(summary: pd.DataFrame) -> Figure:
    """One bar a method (at its best k) and temperature, over the whole prompt set, with 95 % intervals."""
    rows = pick(at_best(summary), "speedup_vs_plain", task="all").sort_values("temperature")
    rows = rows[rows.method != "plain"].assign(at=lambda r: r.temperature.map("T = {:g}".format))
    figure, axes = _axes(1, width=8, height=3.8)
    _bars(axes[0, 0], rows, "at", "value")
    axes[0, 0].set(ylabel=LABELS["speedup_vs_plain"])
    axes[0, 0].axhline(1, color="black", lw=1)
    _legend_right(axes[0, 0])
    return figure


@_themed
def per_task(summary: pd.DataFrame) -> Figure:
    """One panel a temperature: a bar a method (at its best k) and task family."""
    rows = pick(at_best(summary), "speedup_vs_plain")
    rows = rows[(rows.task != "all") & ~rows.method.isin(BASELINES)]
    temperatures = sorted(rows.temperature.unique())
    figure, axes = _axes(1, rows=len(temperatures) or 1, width=9, height=2.5, sharex=True, sharey=True)
    for ax, temperature in zip(axes[:, 0], temperatures, strict=False):
        _bars(ax, rows[rows.temperature == temperature].sort_values("task"), "task", "value")
        ax.axhline(1, color="black", lw=1)
        ax.set(title=f"T = {temperature:g}", ylabel="")
    if temperatures:
        _legend_right(axes[0, 0], *axes[1:, 0])
    else:
        _nothing(axes[0, 0])
    figure.supylabel(LABELS["speedup_vs_plain"], fontsize=10)
    return figure


@_themed
def cost_split(summary: pd.DataFrame, temperature: float) -> Figure:
    """What one round costs, in milliseconds by part, and how many tokens it yields; one bar a method and shape.

    Where a round is one CUDA graph its parts are not known apart, and it is one bar. Where the parts were timed alone
    and the whole round too (`round_ms`), a mark shows the whole. The time of a token is that of the whole generation: a
    text's last round counts whole in the tokens of a round, but not all of them are kept. A part of less than half a
    percent of every round is drawn, but not named.
    """
    summary, shape = with_k(summary), ["method", "k", "tree", "nodes"]
    rows = pick(summary, list(PARTS), task="all", temperature=temperature)
    table = rows.assign(part=rows.metric.map(PARTS)).pivot_table(index=shape, columns="part", values="value")
    table = table.reindex(columns=[p for p in PARTS.values() if p in table]).fillna(0.0)
    if "draft" not in table or not table.draft.any():
        table = table.rename(columns={"verify": WHOLE})
    table = table.loc[:, table.any()]
    table = table.loc[[i for m in order(table.index.get_level_values(0)) for i in table.index if i[0] == m]]
    metrics = ["tokens_per_step", "round_ms", "tokens_per_second"]
    of_round = pick(summary, metrics, task="all", temperature=temperature)
    known = of_round.groupby(["metric", *shape]).value.mean()
    figure, axes = _axes(1, width=8, height=0.45 * len(table) + 1.3)
    ax, left, total = axes[0, 0], np.zeros(len(table)), table.sum(axis=1).to_numpy()
    if table.empty:
        _nothing(ax)
        return figure
    names = [_way(*index) for index in table.index]
    for part in table:
        colour, hatch = PART_STYLES[part]
        label = part if (table[part] > 0.005 * total).any() else f"_{part}"  # matplotlib leaves out what begins so
        ax.barh(names, table[part], left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        left += table[part].to_numpy()
    whole = [known.get(("round_ms", *index)) for index in table.index]
    marked = [(ms, y) for y, ms in enumerate(whole) if ms is not None]
    if marked:
        ax.plot(*zip(*marked, strict=True), "k|", ms=12, mew=1.5, label="whole round")
    texts = []
    for y, index in enumerate(table.index):
        each, ms = known.get(("tokens_per_step", *index), 1.0), total[y] if whole[y] is None else whole[y]
        if ms:
            rate = known.get(("tokens_per_second", *index), 1e3 * each / ms)
            text = f"  {each:.2f} tokens; {1e3 / rate:.2f} ms a token"
            texts.append(ax.text(max(ms, total[y]), y, text, va="center", fontsize=8))
    ax.invert_yaxis()
    ax.set(xlabel="time of one round (ms)", xlim=(0, 1.5 * total.max()))
    ax.grid(axis="y", visible=False)
    _legend_right(ax)
    figure.draw_without_rendering()  # the layout, and so what part of the axis a label takes
    shares = [min(0.8, text.get_window_extent().width / ax.bbox.width) for text in texts]
    ax.set_xlim(0, 1.02 * max(text.get_position()[0] / (1 - share) for text, share in zip(texts, shares, strict=True)))
    return figure


@_themed
def against_batch(frame: pd.DataFrame) -> Figure:
    """Tokens a second and speedup over plain decoding against the batch size: columns of `cost.speeds`, a line each."""
    figure, axes = _axes(2, width=5.6)
    sizes = sorted(frame.batch.unique())
    shown = {"tokens_per_second": "tokens/s, all sequences (log scale)", "speedup": LABELS["speedup_vs_plain"]}
    for ax, (column, label) in zip(axes[0], shown.items(), strict=True):
        for name, part, look in _ways(frame):
            part = part.sort_values("batch")
            ax.plot(part.batch, part[column], **look, label=name)
        ax.set(xlabel="batch size (log scale)", ylabel=label, xscale="log")
        ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
        ax.set_xticks([], minor=True)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter("{x:,.0f}")
    axes[0, 0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # names some where a decade is none
    axes[0, 1].axhline(1, color="#4d4d4d", lw=1, ls=":")
    axes[0, 1].set_ylim(0, None)
    _legend_right(axes[0, 1])
    return figure


@_themed
def against_tokens(frames: dict[str, pd.DataFrame], goal: float) -> Figure:
    """Speedup as a function of tokens_per_step, a panel a shape (`cost.speeds` at batch 1); dots: what was recorded."""
    figure, axes = _panels(frames, width=4.2 * len(frames) + 2.6, height=3.6, sharey=True)
    for ax, (name, frame) in zip(axes, frames.items(), strict=False):
        ways = list(_ways(frame[(frame.batch == 1) & (frame.k > 0)]))
        for i, (label, part, look) in enumerate(ways):
            line, width = part.iloc[0], len(ways) + 0.5 - i  # so that of two alike both are seen
            slope, most = line.speedup / line.tokens_per_step, line.k + 1
            ax.plot([1, most], [slope, slope * most], **{**look, "marker": "", "lw": width})
            ax.plot(line.tokens_per_step, line.speedup, **look, label=label)
        ax.axhline(goal, color="#4d4d4d", lw=1, ls=":", label=f"{goal:g}: the paper's")
        label = LABELS["speedup_vs_plain"] if ax is axes[0] else ""
        ax.set(title=name, xlabel=LABELS["tokens_per_step"], ylabel=label)
    _legend_right(axes[-1], *axes[:-1])
    return figure


def _ways(frame: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Name, rows and look of every method and shape of `cost.speeds`' rows; a method's later shapes are hollow."""
    frame = with_k(frame)
    for method, (colour, marker, dashes, _) in _style(order(frame.method)).items():
        shapes = frame[frame.method == method].groupby(["k", "tree", "nodes"])
        for i, (shape, part) in enumerate(shapes):
            dash = ((0, dashes) if dashes else "-", ":", "-.")[i % 3]
            yield (
                _way(method, *shape),
                part,
                {"color": colour, "marker": marker, "ls": dash, "mfc": "white" if i else colour},
            )


def _way(method: str, k: int, tree: str, nodes: int) -> str:
    return f"{method}, {shape_name(k, tree, nodes)}" if k else method


def _legend_right(ax: Axes, *others: Axes) -> None:
    """One legend right of `ax` for it and the others, in whose axes there is then none."""
    named = {}
    for one in (*others, ax):
        named |= dict(zip(*reversed(one.get_legend_handles_labels()), strict=True))
        if one.get_legend():
            one.get_legend().remove()
    names = sorted(named, key=lambda name: list(TREES).index(name) if name in TREES else len(TREES))
    if names:
        where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        ax.legend([named[name] for name in names], names, **where, frameon=False, title="")


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


def explore(target: Any, drafter: Any, name: str, prompt: str, k: int, temperature: float) -> HTML:
    """Generate from a prompt and show the coloured text with its time."""
    ids = target.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    settings = decode.Settings(k=k, temperature=temperature, max_new_tokens=64, stop_tokens=target.stop_tokens)
    result = decode.speculative(target, drafter, ids, settings)
    seconds = result.decode_seconds
    speed = (len(result.tokens) - 1) / seconds if seconds else 0.0  # the first token belongs to the prefill
    note = f"{name}, k = {k}, T = {temperature:g}: {1e3 * seconds:.0f} ms, {speed:.0f} tokens a second, no engine"
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
        for variant, own in part.groupby("variant"):  # `medusa-ps, warm start` has its drafter's look
            colour, marker = STYLES.get(variant.split(",")[0], STYLES["eagle-ps"])[:2]
            lengths = _interval(own, "tokens_per_step")
            ax.errorbar(own.tokens_per_step, y[own.index], xerr=lengths, fmt=marker, color=colour, capsize=3)
        if (base := part[part.variant == "base"].tokens_per_step).size:
            ax.axvline(base.mean(), color="#808080", ls=":")
        ax.set(yticks=list(places.values()), yticklabels=list(places), title=batch, ylim=(-0.6, len(places) - 0.4))
        ax.set_xlabel(LABELS["tokens_per_step"])
    return figure
