"""Measuring: generations, acceptance, time, intervals, losslessness, the cost model (DESIGN section 7)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import GenerationConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

from psnb import decode, manifest
from psnb import drafters as models
from psnb.cache import KVCache
from psnb.decode import Generation, Sampler, Settings, Stops, autoregressive, speculative
from psnb.drafters import Drafter
from psnb.engine import Engine, Engines, Prompts, refuse, wait
from psnb.errors import UserError
from psnb.profile import DrafterSpec, TargetSpec, nearest
from psnb.target import Target, untrained
from psnb.tree import Plan, most
from psnb.verify import Noise, coupled_acceptance, coupled_bounds, perturb, warp

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = [
    "stage",
    "method",
    "tree",
    "k",
    "nodes",
    "task",
    "temperature",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "unit",
]
PLAIN32 = "plain_float32"  # plain decoding in float32, beside a study that is timed in another number format
BASELINES = ("plain", PLAIN32, "hf_generate", "hf_static")
ARM = ["method", "tree", "k", "nodes", "rule"]  # what tells one way of decoding from another
TIE = 1e-4  # two best scores closer than this are a numeric tie (DESIGN, invariant 4)
BOOTSTRAP = 1000
WARM = 6  # tokens of a generation that only warms up


@dataclass(frozen=True)
class Arm:
    """One way of decoding: a baseline, or a drafter with its tree and the rule that verifies it above T = 0."""

    method: str
    k: int = 0
    tree: str = ""
    nodes: int = 0
    rule: str = "coupled"

    def settings(self, **more: Any) -> Settings:
        return Settings(k=self.k or 1, tree=self.tree or "chain", nodes=self.nodes, rule=self.rule, **more)


def chains(lengths: dict[str, list[int]]) -> list[Arm]:
    """Arms of the given draft lengths by method; `[0]` for the baselines."""
    return [Arm(method, k, "chain" if k else "", k) for method, ks in lengths.items() for k in ks]


def trees(sizes: dict[str, list[list[int]]], specs: dict[str, DrafterSpec]) -> list[Arm]:
    """Arms of the drafters' own best trees, [depth k, nodes N] by name: of kind `eagle` they are grown, else known.

    specs: the drafters that there are; none drafts deeper than its k, and no grown tree has more nodes than it can.
    Raises UserError for what is no pair of numbers above 0.
    """
    found = []
    for name, pairs in sizes.items():
        if not all(isinstance(pair, list) and len(pair) == 2 and min(pair) >= 1 for pair in pairs):
            raise UserError(f"trees of {name}: {pairs}; give pairs [depth, nodes] of 1 or more, such as [[5, 8]]")
        if (spec := specs.get(name)) is None:
            continue
        for depth, nodes in pairs:
            k = min(depth, spec.k)
            grown = spec.kind == "eagle"
            found.append(Arm(name, k, "dynamic", min(nodes, most(k))) if grown else Arm(name, k, "best_first", nodes))
    return list(dict.fromkeys(found))


def drafted_arms(runs: pd.DataFrame, temperature: float, count: int = 0) -> list[Arm]:
    """The arms with a drafter in `run`'s rows at this temperature; with `count` each drafter's fastest ones.

    Raises UserError where the rows have none at this temperature.
    """
    rows = runs[~runs["method"].isin(BASELINES) & (runs["temperature"] == temperature)]
    if rows.empty:
        there = sorted(runs[~runs["method"].isin(BASELINES)]["temperature"].unique())
        cure = f"choose of {', '.join(f'{t:g}' for t in there)}" if there else "name some first"
        raise UserError(f"no drafts were recorded at T = {temperature:g}: {cure}")
    sums = rows.groupby(ARM, sort=False)[["tokens", "decode_s"]].sum()
    speed = sums["tokens"] / sums["decode_s"]
    if count:
        speed = speed.sort_values(ascending=False, kind="stable").groupby(level="method", sort=False).head(count)
    return [Arm(method, int(k), tree, int(nodes), rule) for method, tree, k, nodes, rule in speed.index]


def engine_plays(target: Target) -> bool:
    """Whether the engine is to decode: on a GPU, unless it refuses the target, which is then said."""
    if target.device.type != "cuda":
        return False
    try:
        refuse(target)
    except UserError as error:
        manifest.say(f"decoding without the engine: {error}")
        return False
    return True


class _Watch(StoppingCriteria):
    """Feeds `generate`'s tokens to the same stops as every method, and notes when the first one came."""

    def __init__(self, generation: Generation, settings: Settings) -> None:
        self.stops, self.at = Stops(generation, settings), len(generation.prompt)
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        tokens = input_ids[0, self.at + len(self.stops.of.tokens) :].tolist()
        self.first = self.first or time.perf_counter()
        self.stops.add(tokens)
        return torch.full((1,), self.stops.done, device=input_ids.device)


@torch.inference_mode()
def hf_generate(
    target: Target, prompt: Sequence[int], settings: Settings, cache: StaticCache | None = None
) -> Generation:
    """`transformers`' own `generate` with its dynamic cache: the baseline that the literature compares with.

    With a static `cache` it compiles its forward on a GPU: its fastest. Above T = 0 it samples with its own random
    numbers, so its text differs from the coupled one.
    """
    result = Generation(list(prompt))
    watch = _Watch(result, settings)
    ids = torch.tensor([list(prompt)], device=target.device)
    torch.manual_seed(settings.seed)
    more: dict[str, Any] = (
        {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    )
    if cache is not None:
        cache.reset()
        more["past_key_values"] = cache
    model, own = target.model, target.model.generation_config
    model.generation_config = GenerationConfig()  # a checkpoint's own may punish repetition, or search with beams
    began = time.perf_counter()
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.temperature > 0,
            eos_token_id=list(settings.stop_tokens) or None,
            pad_token_id=target.eos_token_id or 0,
            stopping_criteria=StoppingCriteriaList([watch]),
            **more,
        )
    finally:
        model.generation_config = own
    ended = time.perf_counter()
    result.seconds |= {"prefill": watch.first - began, "verify": ended - watch.first}
    return result


def generate(
    target: Target,
    drafters: dict[str, Drafter],
    method: str,
    prompt: Sequence[int],
    settings: Settings,
    engines: Engines | None = None,
    cache: StaticCache | None = None,
) -> Generation:
    """One generation by a method's name: plain, hf_generate, hf_static (in `cache`) or a drafter's."""
    if method in ("hf_generate", "hf_static"):
        return hf_generate(target, prompt, settings, cache if method == "hf_static" else None)
    if method != "plain" and method not in drafters:
        raise UserError(f"unknown method {method!r}; {nearest(method, [*BASELINES, *drafters])}")
    if engines is not None:
        return engines(method, prompt, settings)
    if method == "plain":
        return autoregressive(target, prompt, settings)
    return speculative(target, drafters[method], prompt, settings)


def run(
    target: Target,
    drafters: dict[str, Drafter],
    prompts: Dataset,
    *,
    arms: list[Arm],
    temperatures: Sequence[float],
    max_new_tokens: int,
    repeats: int = 1,
    hf_prompts: int | None = None,
    seed: int = 0,
    label: str = "generating",
    engines: Engines | None = None,
    compiled: bool = True,
    wide: Target | None = None,
) -> pd.DataFrame:
    """Generate with every arm x temperature on every prompt: one row a generation.

    At T = 0 all rules are one, so of arms that differ in it alone the first runs. Arms are interleaved prompt by
    prompt, in an order that rotates, and share one seed a (prompt, repeat). transformers' `generate`, which takes long,
    runs on the first `hf_prompts` of each family (None: all). `engines` decode in place of `decode`; on a GPU they are
    made where none are given, `compiled` or not: compiling takes seconds a way of decoding, and saves time alone.
    `wide` is the target in float32, which the method `plain_float32` asks for.
    Raises UserError where there is nothing to generate.
    """
    for name, count in {"temperatures": len(temperatures), "prompts": len(prompts), "repeats": repeats}.items():
        if count < 1:
            raise UserError(f"{label}: there are no {name}, so nothing to generate: give one at least")

    def one(arm: Arm, prompt: Sequence[int], settings: Settings) -> Generation:
        if arm.method == PLAIN32 and wide is not None:
            return autoregressive(wide, prompt, settings)
        return generate(target, drafters, arm.method, prompt, settings, engines, static)

    greedy = list({dataclasses.replace(arm, rule="coupled"): arm for arm in arms[::-1]}.values())[::-1]
    records = [prompts[i] for i in range(len(prompts))]
    families = pd.DataFrame(records)[["id", "family"]].groupby("family")
    generated = set(families.head(len(records) if hf_prompts is None else hf_prompts)["id"])
    lengths = {record["id"]: len(record["input_ids"]) + max(WARM, max_new_tokens) for record in records}
    longest = max(lengths.values())
    if engines is None and engine_plays(target):
        engines = Engines(target, drafters, compile_layers=compiled, length=min(longest, target.context))
    static = None
    if any(arm.method == "hf_static" for arm in arms):  # as long as is needed: it attends over all of it
        asked = generated | {records[0]["id"]}  # which warms up
        static = StaticCache(target.config, max(lengths[name] for name in asked))
    plan = [
        (temperature, repeat, index, record)
        for repeat, temperature in product(range(repeats), temperatures)
        for index, record in enumerate(records)
    ]
    for temperature, arm in product(temperatures if engines else (0.7,), arms):  # warm up, capture
        settings = arm.settings(max_new_tokens=WARM, temperature=temperature)
        one(arm, records[0]["input_ids"], settings)
    rows = []
    for temperature, repeat, index, record in manifest.progress(plan, label):
        able = arms if temperature else greedy
        turn = (index + repeat) % len(able)
        for arm in able[turn:] + able[:turn]:
            if arm.method in ("hf_generate", "hf_static") and record["id"] not in generated:
                continue
            settings = arm.settings(
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed + 7919 * repeat + index,
                stop_tokens=target.stop_tokens,
            )
            made = one(arm, record["input_ids"], settings)
            drafted = arm.method not in BASELINES
            histogram = np.bincount([r.accepted for r in made.whole_rounds], minlength=arm.k + 1)
            rows.append(
                {
                    **dataclasses.asdict(arm),
                    "temperature": temperature,
                    "task": record["family"],
                    "prompt": record["id"],
                    "repeat": repeat,
                    "seed": settings.seed,
                    "tokens": len(made.tokens) - 1,  # the first one belongs to the prefill
                    "rounds": len(made.rounds) if drafted else len(made.tokens) - 1,
                    "histogram": " ".join(map(str, histogram)) if drafted else "",
                    **{f"{part}_s": seconds for part, seconds in made.seconds.items()},
                    "decode_s": made.decode_seconds,
                    "stopped": made.stopped,
                    "repeated_8gram": made.repeated,
                    "output": " ".join(map(str, made.tokens)),
                }
            )
    return pd.DataFrame(rows)


def _weights(prompts: int, seed: int = 0) -> np.ndarray:
    """How often each prompt is drawn in each bootstrap sample: [1 + BOOTSTRAP, prompts]; row 0 is the data itself."""
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), BOOTSTRAP)
    return np.vstack([np.ones(prompts), draws])


def _interval(values: np.ndarray, n: int) -> tuple[float, float, float]:
    """values [1 + BOOTSTRAP], the first from the data: (value, low, high) of the 95 % interval; none of n = 1."""
    drawn = values[1:][np.isfinite(values[1:])] if n > 1 else []
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def _row(
    stage: str, arm: Sequence[Any], temperature: float, metric: str, value: float, n: int, unit: str
) -> dict[str, object]:
    """A line of summary.csv over all tasks, without an interval. Rules other than `coupled` prefix the metric."""
    method, tree, k, nodes, rule = arm
    shape = {"method": method, "tree": tree, "k": k or None, "nodes": nodes or None}
    metric = metric if rule == "coupled" else f"{rule}_{metric}"
    about = {"task": "all", "temperature": temperature, "metric": metric}
    return {"stage": stage, **shape, **about, "value": value, "n": n, "unit": unit}


def _histograms(part: pd.DataFrame, k: int) -> np.ndarray:
    """Rounds that accepted 0..k tokens, by generation: [generations, k + 1]."""
    return np.array([np.fromstring(h, int, sep=" ") for h in part["histogram"]]).reshape(len(part), k + 1)


def summary(runs: pd.DataFrame, stage: str) -> pd.DataFrame:
    """Every metric of `run`'s rows in the columns of summary.csv, by arm x temperature x task and all.

    A value is a ratio of sums (tokens / seconds, accepted / tried); its interval resamples prompts. Speedups pair the
    same prompts and repeats: `speedup_vs_plain` is the ratio of total tokens / total decode time,
    `speedup_mean_rate` Spec-Bench's ratio of mean tokens/s.
    """
    rows: list[dict[str, object]] = []
    runs = runs.assign(rate=runs["tokens"] / runs["decode_s"])
    for task in [*sorted(runs["task"].unique()), "all"]:
        of_task = runs if task == "all" else runs[runs["task"] == task]
        baselines = {
            (method, t): part.set_index(["prompt", "repeat"])
            for (method, t), part in of_task[of_task["method"].isin(BASELINES)].groupby(["method", "temperature"])
        }
        for (*arm, temperature), part in of_task.groupby([*ARM, "temperature"], sort=False):
            with np.errstate(divide="ignore", invalid="ignore"):
                for metric, values, n, unit in _metrics(part, arm[0], int(arm[2]), baselines, temperature):
                    value, low, high = _interval(values, n)
                    if np.isfinite(value):
                        row = _row(stage, arm, temperature, metric, value, n, unit)
                        rows.append({**row, "task": task, "low": low, "high": high})
    return pd.DataFrame(rows, columns=COLUMNS)


def _acceptance(counts: np.ndarray, n: int):
    """counts [1 + BOOTSTRAP, k + 1]: rounds that accepted exactly i. Yield (metric, values, prompts n, unit)."""
    reached = counts[:, ::-1].cumsum(1)[:, ::-1]  # at least i
    accepted = (counts * np.arange(counts.shape[1])).sum(1) / reached[:, 0]
    yield "tokens_per_step", 1 + accepted, n, "tokens"
    yield "accepted_per_step", accepted, n, "tokens"
    for i in range(counts.shape[1] - 1):
        yield f"accept_cond_{i}", reached[:, i + 1] / reached[:, i], n, "share"
        yield f"accept_uncond_{i}", reached[:, i + 1] / reached[:, 0], n, "share"


def _metrics(part: pd.DataFrame, method: str, k: int, baselines: dict, temperature: float):
    """Yield (metric, values [1 + BOOTSTRAP], prompts, unit) of one method's rows."""

    def by_prompt(frame: pd.DataFrame, columns: np.ndarray) -> np.ndarray:
        sums = pd.DataFrame(columns, index=frame["prompt"].to_numpy()).groupby(level=0, sort=True).sum().to_numpy()
        return _weights(len(sums)) @ sums  # [1 + BOOTSTRAP, columns]

    n = part["prompt"].nunique()
    names = ["tokens", "rounds", "decode_s", "draft_s", "verify_s", "commit_s", "host_s", "repeated_8gram"]
    sums = dict(zip(names, by_prompt(part, part[names].to_numpy(float)).T, strict=True))
    yield "tokens_per_second", sums["tokens"] / sums["decode_s"], n, "tokens/s"
    yield "repeated_8gram_share", sums["repeated_8gram"] / sums["tokens"], n, "share"
    if method not in ("hf_generate", "hf_static"):
        for name in ("draft", "verify", "commit", "host"):
            yield f"{name}_ms", 1e3 * sums[f"{name}_s"] / sums["rounds"], n, "ms/round"
    if k:
        yield from _acceptance(by_prompt(part, _histograms(part, k)), n)
    for baseline, name in (("plain", "speedup_vs_plain"), ("hf_generate", "speedup_vs_hf")):
        if method == baseline or (baseline, temperature) not in baselines:
            continue
        both = part.set_index(["prompt", "repeat"]).join(
            baselines[baseline, temperature][["tokens", "decode_s", "rate"]], rsuffix="_base", how="inner"
        ).reset_index()  # fmt: skip
        columns = ["tokens", "decode_s", "tokens_base", "decode_s_base", "rate", "rate_base"]
        t, s, t0, s0, rate, rate0 = by_prompt(both, both[columns].to_numpy(float)).T
        yield name, (t / s) / (t0 / s0), both["prompt"].nunique(), "x"
        if baseline == "plain":
            yield "speedup_mean_rate", rate / rate0, both["prompt"].nunique(), "x"


def beside(
    runs: pd.DataFrame, above: Arm, below: Arm, temperature: float, metric: str
) -> tuple[float, float, float] | None:
    """One arm's value over another's in `run`'s rows, on the prompts and repeats of both: (ratio, low, high).

    None where there are none, or nothing to divide by; of one prompt the interval is 0 to infinity.

    metric: tokens_per_second, tokens_per_step or accept_cond_i. Prompts are drawn with both their values (paired
    bootstrap), so that what is hard for both widens no interval.
    """
    sums = []
    for arm in (above, below):
        wanted = dataclasses.asdict(arm) | {"temperature": temperature}
        part = runs[(runs[list(wanted)] == pd.Series(wanted)).all(axis=1)].set_index(["prompt", "repeat"])
        if part.empty:
            return None
        if metric == "tokens_per_second":
            pairs = part[["tokens", "decode_s"]].to_numpy(float)
        else:
            reached = _histograms(part, arm.k)[:, ::-1].cumsum(1)[:, ::-1]  # at least i
            i = 0 if metric == "tokens_per_step" else int(metric.removeprefix("accept_cond_"))
            pairs = np.stack([reached.sum(1) if metric == "tokens_per_step" else reached[:, i + 1], reached[:, i]], 1)
        sums.append(pd.DataFrame(pairs, part.index))
    both = sums[0].join(sums[1], rsuffix="_below", how="inner").groupby(level="prompt").sum().to_numpy()
    if not len(both):
        return None
    a, a_of, b, b_of = (_weights(len(both)) @ both).T
    with np.errstate(divide="ignore", invalid="ignore"):
        value, low, high = _interval((a / a_of) / (b / b_of), len(both))
    if len(both) == 1:
        low, high = 0.0, np.inf
    return None if np.isnan([value, low, high]).any() or np.isinf(value) else (value, low, high)


@torch.inference_mode()
def gap(target: Target, prefix: Sequence[int], settings: Settings) -> float:
    """How far apart the two best (perturbed) scores of the next token after `prefix` lie."""
    ids = torch.tensor([list(prefix)], device=target.device)
    features = target.features(ids, torch.arange(ids.shape[1], device=target.device)[None], None)
    best = Sampler(target, settings).worth(target.logits(features[0, -1:]), len(prefix)).topk(2).values[0]
    return (best[0] - best[1]).item()


def toys(own: dict[str, Drafter], count: int, seed: int) -> tuple[Target, dict[str, Drafter], list[dict[str, Any]]]:
    """For proofs in float64: a random Llama, untrained drafters of the same names and kinds, and `count` prompts."""
    shape = TargetSpec(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context=256)
    toy = untrained(shape, 61, next(iter(own.values())).target.tokenizer, seed)
    torch.manual_seed(seed)
    made = {name: models.build(DrafterSpec(kind=d.spec.kind, k=4), toy).double().eval() for name, d in own.items()}
    prompts = [[(7 * i + j * j) % 61 for j in range(5 + i)] for i in range(count)]
    return toy, made, [{"id": str(i), "family": "random", "input_ids": ids} for i, ids in enumerate(prompts)]


def against_plain(runs: pd.DataFrame, target: Target, prompts: Sequence[Any]) -> pd.DataFrame:
    """Every drafted generation beside plain decoding's, token for token: the arm's columns, temperature, prompt,
    compared (tokens up to the first difference), differs, gap (of the two best scores there; see `gap`).

    For `greedy` and `coupled` verification: the other rules promise the distribution, not the tokens.
    """
    prompt_ids = {record["id"]: list(record["input_ids"]) for record in prompts}
    same = ["prompt", "repeat", "temperature"]
    plain = runs[runs["method"] == "plain"].set_index(same)["output"]
    drafted = runs[~runs["method"].isin(BASELINES) & ((runs["rule"] == "coupled") | (runs["temperature"] == 0))]
    rows = []
    for line in drafted.to_dict("records"):
        ours = [int(t) for t in line["output"].split()]
        theirs = [int(t) for t in plain[tuple(line[name] for name in same)].split()]
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        differs, wide = len(ours) != len(theirs) or at < len(ours), np.nan
        if at < min(len(ours), len(theirs)):
            settings = Settings(temperature=line["temperature"], seed=line["seed"])
            wide = gap(target, prompt_ids[line["prompt"]] + ours[:at], settings)
        kept = {name: line[name] for name in (*ARM, "temperature", "prompt")}
        rows.append({**kept, "compared": at, "differs": differs, "gap": wide})
    return pd.DataFrame(rows)


def lossless(runs: pd.DataFrame, target: Target, prompts: Sequence[Any], stage: str) -> pd.DataFrame:
    """Counts of `against_plain` in the columns of summary.csv, by arm and temperature.

    A difference where the two best scores lie within TIE is a numeric tie, any other a mismatch; what follows a
    difference is not compared.
    """
    rows: list[dict[str, object]] = []
    for (*arm, temperature), part in against_plain(runs, target, prompts).groupby([*ARM, "temperature"], sort=False):
        ties = int((part["differs"] & (part["gap"] < TIE)).sum())
        kind = "greedy_mismatches" if temperature == 0 else "coupled_mismatches"
        counts = {kind: int(part["differs"].sum()) - ties, "numeric_ties": ties, "tokens_compared": part.compared.sum()}
        for metric, value in counts.items():
            unit = "tokens" if metric == "tokens_compared" else "count"
            rows.append(_row(stage, arm, temperature, metric, value, part["prompt"].nunique(), unit))
    return pd.DataFrame(rows, columns=COLUMNS)


@torch.inference_mode()
def coupling(target: Target, drafter: Drafter, texts: Sequence[Sequence[int]], temperature: float) -> pd.DataFrame:
    """Slot 0 of a drafter with real rows on given texts: a row a position.

    Columns coupled (the formula of verify.coupled_acceptance), measured (whether target and drafter choose the same
    token with the same noise), rejection (1 - TV), low (its bound (1 - TV) / (1 + TV)).
    """
    parts = []
    for seed, text in enumerate(texts):
        ids = torch.tensor([list(text)], device=target.device)
        places = torch.arange(ids.shape[1], device=target.device)[None]
        features = target.features(ids, places, None, taps=drafter.spec.taps)
        cache = KVCache(drafter.spec.layers, ids.shape[1])
        rows = drafter.body.extend(drafter.fuse(features[:, :-1], ids[:, 1:]), cache)  # row t drafts x_{t+2}
        scores = [target.logits(features[0, 1:]), drafter.logits(rows[0], 0)]
        p, q = (warp(score, temperature).softmax(-1) for score in scores)
        noise = Noise(seed, target.vocab_size, target.dtype, target.device).rows(2, len(p))
        chosen = [perturb(score, temperature, noise).argmax(-1) for score in scores]
        low, high = coupled_bounds(p, q)
        columns = {"coupled": coupled_acceptance(p, q), "measured": (chosen[0] == chosen[1]).float()}
        parts.append(pd.DataFrame({k: v.tolist() for k, v in {**columns, "rejection": high, "low": low}.items()}))
    return pd.concat(parts, ignore_index=True)


def slot_marginals(
    target: Target,
    cache: KVCache,
    known: int,
    logits: Tensor,
    k: int,
    *,
    temperature: float,
    samples: int,
    draw: torch.Generator,
) -> Tensor:
    """Marginals [k, V] of the k tokens after the first `known` that `cache` holds; logits [1, V] are the first one's.

    Slot i averages p over `samples` continuations of i tokens drawn from p: probabilities, not counts, which spread
    less. The samples are branches of one tree, so the keys of what is known are held once. `cache` needs room for
    (k - 1) * samples rows and is left as it was.
    """
    held, p, made = cache.length, torch.empty(0), []
    own = torch.eye(samples, dtype=torch.bool, device=target.device)
    mask = (torch.arange(held, device=target.device) < known).expand(samples, held)
    for i in range(k):
        if i:
            tokens = torch.multinomial(p.expand(samples, -1), 1, generator=draw).T
            places = torch.full_like(tokens, known + i - 1)
            mask = torch.cat([mask, own], 1)  # a sample sees what is known and its own tokens
            logits = target.logits(target.features(tokens, places, mask[None, None], cache)[0])
        if temperature:
            p = warp(logits, temperature).softmax(-1)
        else:
            p = one_hot(logits.argmax(-1), logits.shape[-1]).float()
        made.append(p.mean(0))
    cache.crop(held)
    return torch.stack(made)


@torch.inference_mode()
def marginals(
    target: Target,
    texts: Sequence[Sequence[int]],
    k: int,
    *,
    temperature: float,
    samples: int = 64,
    positions: int = 8,
    seed: int = 0,
    sharpen: Sequence[float] = (1.0,),
) -> pd.DataFrame:
    """What chains of k tokens would bring if every slot had the target's exact marginal, all that one pass can know.

    A one-pass drafter does not know the tokens of the slots before slot i. At best it has m_i, the expectation of p
    over them, estimated by `slot_marginals`; m_0 is p. One that does not see the root (`medusa`, `medusa-ps`) has one
    more token to average over: its slot i is slot i + 1 of the text without the root. Drafts are `coupled`: arg max of
    sharpen * log m_i + G. At T = 0 the marginals are point masses and all is accepted, but for numeric ties: nothing
    is lost in principle.

    After each prompt in `texts` come the first `positions` rounds of decoding, fewer where the target stops. (Drafts
    at even distances would meet hard tokens more rarely: a round begins where a draft was wrong.) Returns a row a
    text, seen (is the root), sharpen and position (known tokens, the root included), with accepted, 0..k.
    """
    rows: list[dict[str, object]] = []
    limits = {"max_new_tokens": 1 + (k + 1) * positions, "stop_tokens": target.stop_tokens}
    settings = Settings(k=k, temperature=temperature, **limits)
    for index, prompt in enumerate(manifest.progress(texts, "exact marginals")):
        own = dataclasses.replace(settings, seed=seed + index)  # as `run` has it
        text = [*prompt, *autoregressive(target, prompt, own).tokens]
        ids = torch.tensor(text, device=target.device)
        cache = KVCache(target.layers, len(text) + k * samples)
        features = decode._forward(target, ids, cache)[0]
        noise = Noise(own.seed, target.vocab_size, target.dtype, target.device)
        draw = torch.Generator(target.device).manual_seed(own.seed)
        sampled: dict[str, Any] = {"temperature": temperature, "samples": samples, "draw": draw}
        made: dict[tuple[int, bool], Tensor] = {}
        for seen, scale in product((True, False), sharpen):
            at = len(prompt) + 1
            for _ in range(positions):
                if at + k > len(text):
                    break
                if (at, seen) not in made:
                    known = at if seen else at - 1
                    logits = target.logits(features[known - 1 : known])
                    made[at, seen] = slot_marginals(target, cache, known, logits, at - known + k, **sampled)[-k:].log()
                right = (scale * made[at, seen] + noise.rows(at, k)).argmax(-1) == ids[at : at + k]
                accepted = int(right.cumprod(0).sum())
                rows.append({"text": index, "seen": seen, "sharpen": scale, "position": at, "accepted": accepted})
                at += accepted + 1
    return pd.DataFrame(rows, columns=["text", "seen", "sharpen", "position", "accepted"])


def marginal_rows(found: pd.DataFrame, k: int, temperature: float, stage: str) -> pd.DataFrame:
    """Acceptance of `marginals`' rows in the columns of summary.csv; intervals resample texts.

    Methods: "exact marginals" of drafters that see the root, "exact marginals, blind" of the others; sharpened ones
    have the scale behind their name.
    """
    rows: list[dict[str, object]] = []
    for (seen, scale), part in found.groupby(["seen", "sharpen"], sort=False):
        name = "exact marginals" + ("" if seen else ", blind") + ("" if scale == 1 else f", sharpened {scale:g}")
        counts = pd.crosstab(part["text"], part["accepted"]).reindex(columns=range(k + 1), fill_value=0).to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            for metric, values, n, unit in _acceptance(_weights(len(counts)) @ counts, len(counts)):
                value, low, high = _interval(values, n)
                if np.isfinite(value):
                    row = _row(stage, (name, "chain", k, k, "coupled"), temperature, metric, value, n, unit)
                    rows.append({**row, "low": low, "high": high})
    return pd.DataFrame(rows, columns=COLUMNS)


@torch.inference_mode()
def tree_times(target: Target, k: int, sizes: Sequence[int], context: int = 128, repeats: int = 30) -> pd.DataFrame:
    """What a best-first tree costs beside the target's pass over it: nodes, build_ms, walk_ms, forward_ms (medians).

    build: from the slots' logits to the tree. walk: from the target's logits to the accepted path.
    """
    sampler = Sampler(target, Settings(k=k))
    cache = KVCache(target.layers, context + max(sizes) + 1)
    ids = torch.randint(0, target.vocab_size, (context,), device=target.device)
    features = decode._forward(target, ids, cache)
    logits, taken = target.logits(features[0, -k:]), []
    sampler.start = context
    plans = {n: Plan("best_first", k, n, target.vocab_size, device=target.device) for n in sizes}
    for turn in range(repeats + 3):
        for n, plan in plans.items():
            seconds = dict.fromkeys(("build_ms", "forward_ms", "walk_ms"), 0.0)
            clock = decode._Clock(target.device, seconds)
            tree = plan(sampler.propose(plan)(logits, slice(0, k)))
            clock.lap("build_ms")
            fed = torch.cat([ids[-1:], tree.tokens])
            scores = target.logits(decode._forward(target, fed, cache, tree.shape)[0])
            clock.lap("forward_ms")
            sampler.verdict(tree, scores, plan)
            clock.lap("walk_ms")
            cache.crop(context)
            if turn >= 3:
                taken.append({"nodes": n, **seconds})
    return pd.DataFrame(taken).groupby("nodes").median().mul(1e3).reset_index()


@torch.inference_mode()
def draft_times(
    target: Target,
    drafters: dict[str, Drafter],
    ks: Sequence[int],
    context: int = 128,
    repeats: int = 30,
    temperature: float = 0.7,
) -> pd.DataFrame:
    """Milliseconds of one draft of k tokens after `context` known ones: method, k, draft_ms, low, high, n.

    Two new real rows a draft, as after a round that accepted one token; medians with bootstrap intervals, all arms
    interleaved. Includes the choice of the tokens. On a GPU the draft is the engine's, a graph with k + 1 real rows,
    where it decodes (`engine_plays`). Raises UserError where no drafter drafts that many tokens.
    """
    arms = [(name, k) for name, drafter in drafters.items() for k in ks if k <= drafter.k]
    if not arms or min(ks) < 1:
        longest = max((drafter.k for drafter in drafters.values()), default=0)
        raise UserError(
            f"draft lengths {list(ks)}: give lengths from 1 to {longest}, what these drafters were trained for"
        )
    if engine_plays(target):
        prompt, taken = torch.arange(context).remainder(target.vocab_size).tolist(), {}
        prompts = Prompts(target)
        for name, k in arms:
            engine = Engine(target, drafters[name], Settings(k=k, temperature=temperature), prompts=prompts)
            taken[name, k] = [engine.parts(prompt, repeats, ["draft"])["draft"] for _ in range(5)]
            engine.close()
        return _medians(taken)
    ids = torch.randint(0, target.vocab_size, (1, context + 2), device=target.device)
    places = torch.arange(context + 2, device=target.device)[None]
    caches, features = {}, {}
    for name, drafter in drafters.items():
        drafter.ready()
        caches[name] = KVCache(max(1, drafter.spec.layers), context + 16 + max(ks))
        features[name] = target.features(ids, places, None, taps=drafter.spec.taps)
        drafter.prefill(features[name][:, :context], ids[:, :context], caches[name])
    taken: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    vocab, sampler = target.vocab_size, Sampler(target, Settings(temperature=temperature))
    plans = {arm: Plan("chain", arm[1], 0, vocab, device=target.device, width=drafters[arm[0]].width) for arm in arms}

    for turn in range(repeats + 3):
        for name, k in arms:
            began = time.perf_counter()
            plan = plans[name, k]
            drafters[name].draft(features[name][:, -2:], ids[:, -2:], plan, sampler.propose(plan), caches[name])
            wait(target.device)
            if turn >= 3:  # the first ones warm up
                taken[name, k].append(1e3 * (time.perf_counter() - began))
            caches[name].crop(context)
    return _medians(taken)


def _medians(taken: dict[tuple[str, int], list[float]]) -> pd.DataFrame:
    rows = []
    for (name, k), times in taken.items():
        drawn = np.random.default_rng(0).choice(times, (BOOTSTRAP, len(times)))
        low, high = np.percentile(np.median(drawn, 1), [2.5, 97.5])
        rows.append({"method": name, "k": k, "draft_ms": np.median(times), "low": low, "high": high, "n": len(times)})
    return pd.DataFrame(rows)


def cost_model(rows: pd.DataFrame) -> pd.DataFrame:
    """speedup = tokens_per_step * t_plain / (t_draft + t_verify + t_rest), beside the measured one.

    rows: summary.csv's, of one stage, task `all`. Returns method, tree, k, nodes, temperature, tokens_per_step,
    plain_ms, draft_ms, verify_ms, rest_ms, measured, predicted.
    """
    rows = rows[rows["task"] == "all"]
    shape = ["method", "tree", "k", "nodes", "temperature"]
    plain = rows[rows["method"] == "plain"].pivot_table(index="temperature", columns="metric", values="value")
    plain_ms = plain[["verify_ms", "commit_ms", "host_ms"]].sum(axis=1)
    wide = rows.pivot_table(index=shape, columns="metric", values="value").dropna(subset=["tokens_per_step"])
    made = wide.reset_index().rename_axis(columns=None).rename(columns={"speedup_vs_plain": "measured"})
    made["plain_ms"], made["rest_ms"] = made["temperature"].map(plain_ms), made["commit_ms"] + made["host_ms"]
    round_ms = made["draft_ms"] + made["verify_ms"] + made["rest_ms"]
    made["predicted"] = made["tokens_per_step"] * made["plain_ms"] / round_ms
    times = ["plain_ms", "draft_ms", "verify_ms", "rest_ms"]
    return made[[*shape, "tokens_per_step", *times, "measured", "predicted"]]
