"""Where a round's time goes, at the study's own shape and at those of larger models (latency alone).

A model of random weights costs what a trained one of its shape costs, if the decisions are those of a trained one:
the accepted counts of its rounds are replayed (`Engine.replay`).
"""

from __future__ import annotations

import time
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from psnb import drafters as models
from psnb import manifest
from psnb.decode import Settings
from psnb.drafters import Drafter
from psnb.engine import PARTS, Engine, Prompts
from psnb.errors import UserError
from psnb.measure import COLUMNS, Arm, hf_generate
from psnb.profile import DrafterSpec, nearest
from psnb.target import Target

if TYPE_CHECKING:
    from psnb.study import Study

# hidden size, layers, heads, key heads, intermediate size, vocabulary
SHAPES = {
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000),
    "toy": (64, 2, 4, 2, 160, 512),
}
CONTEXT = 4096
PAPER = 2.84  # the abstract's speedup over plain decoding, Llama-2-13B


def shape(name: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A Llama of that shape (`SHAPES`) with random weights. Raises `UserError` for an unknown one."""
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}; {nearest(name, SHAPES)}")
    hidden, layers, heads, keys, inner, vocab = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Target(model, types.SimpleNamespace(eos_token_id=None))


def matching(specs: dict[str, DrafterSpec], target: Target) -> dict[str, Drafter]:
    """Untrained drafters of these specs for `target`, in its number format."""
    made = {name: models.build(spec, target).to(target.dtype) for name, spec in specs.items()}
    return {name: drafter.eval().requires_grad_(False) for name, drafter in made.items()}


def loaded(study: Study, name: str, specs: dict[str, DrafterSpec]) -> tuple[Target, dict[str, Drafter]]:
    """The study's own target and drafters (`name` empty), or a shape with drafters of these specs."""
    if not name:
        return study.target(), {drafter: study.drafter(drafter) for drafter in specs}
    target = shape(name, study.device, getattr(torch, study.profile.dtype))
    return target, matching(specs, target)


def traces(runs: pd.DataFrame, arms: Sequence[Arm], temperature: float) -> dict[Arm, list[int]]:
    """Accepted counts in the rows of `measure.run` for these arms. Raises `UserError` where some are missing."""
    made = {arm: counts(runs, arm, temperature) for arm in arms if arm.k}
    if lacking := [arm for arm, found in made.items() if not found]:
        one = lacking[0]
        raise UserError(
            f"no recorded rounds of {one.method}, k = {one.k}, {one.tree} at T = {temperature:g}: run notebook "
            "04_speedup of the traced profile with them first"
        )
    return made


def bandwidth(device: torch.device, size: int = 2**31, repeats: int = 20) -> float:
    """Bytes a second that the device's memory delivers: a copy of `size` bytes reads and writes each once."""
    size = size if device.type == "cuda" else min(size, 2**27)
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        y.copy_(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size / float(np.median(times[3:]))


def step_bytes(target: Target) -> int:
    """Bytes of weights that one step reads: all but the input embedding, of which it reads a row.

    Tied to the output's, the embedding is read as that.
    """
    inside, outside = target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight
    whole = sum(weight.numel() * weight.element_size() for weight in target.model.parameters())
    return whole if inside is outside else whole - inside.numel() * inside.element_size()


def counts(runs: pd.DataFrame, arm: Arm, temperature: float, seed: int = 0) -> list[int]:
    """Accepted counts of an arm's rounds in the rows of `measure.run`, shuffled; empty where it was not run.

    histogram "3 0 1" -> 0 0 0 2 in some order.
    """
    same = (runs["method"] == arm.method) & (runs["tree"] == arm.tree) & (runs["k"] == arm.k)
    same &= (runs["nodes"] == arm.nodes) & (runs["rule"] == arm.rule) & (runs["temperature"] == temperature)
    histograms = [np.fromstring(line, int, sep=" ") for line in runs[same]["histogram"]]
    if not histograms:
        return []
    every = np.repeat(np.arange(arm.k + 1), np.sum(histograms, 0))
    return np.random.default_rng(seed).permutation(every).tolist()


def rounds(
    target: Target,
    drafters: dict[str, Drafter],
    arms: Sequence[Arm],
    *,
    batches: Sequence[int] = (1,),
    prompt: Sequence[int] = (),
    context: int = 256,
    tokens: int = 128,
    temperature: float = 0.7,
    recorded: dict[Arm, list[int]] | None = None,
    repeats: int = 30,
    **options: Any,
) -> pd.DataFrame:
    """Rounds taken apart, a row an arm and batch: the arm's columns, batch, and

    draft_ms .. commit_ms, each repeated alone, `repeats` times; alone_ms, the whole round repeated; round_ms, one in a
    generation of `tokens` tokens, with the host, the median of three; host_share of it; tokens_per_step;
    first_token_ms; capture_seconds; peak_gb (GPU). With `recorded` counts decisions are replayed. `options` are
    `Engine`'s. `hf_static` and `hf_generate` have round_ms alone, at batch 1. `context` tokens are known: those of
    `prompt`, repeated if need be, or random ones.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = list(prompt) or torch.randint(0, target.vocab_size, (context,), generator=generator).tolist()
    prompt = (prompt * -(-context // len(prompt)))[:context]
    cuda, rows = target.device.type == "cuda", []
    with torch.no_grad():
        Prompts(target)(prompt)  # the first forward of a process loads kernels
    options = {"prompts": Prompts(target), **options}
    for batch in batches:
        for arm in arms:
            settings = arm.settings(temperature=temperature, max_new_tokens=tokens, repeat_stop=0)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if arm.method.startswith("hf_"):
                line = _generated(target, arm.method, prompt, settings) if batch == 1 else {}
            else:
                drafter, trace = drafters.get(arm.method), (recorded or {}).get(arm)
                line = _round(target, drafter, prompt, settings, batch, trace, repeats, options)
            if line:
                shown = {"method": arm.method, "tree": arm.tree, "k": arm.k, "nodes": arm.nodes, "batch": batch}
                rows.append({**shown, **line, "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else np.nan})
    return pd.DataFrame(rows)


def _generated(target: Target, method: str, prompt: Sequence[int], settings: Settings) -> dict[str, float]:
    need = len(prompt) + settings.max_new_tokens
    cache = StaticCache(target.config, need) if method == "hf_static" else None
    turns = [hf_generate(target, prompt, settings, cache) for _ in range(4)]
    made = sorted(turns[1:], key=lambda of: of.decode_seconds)[1]
    return {
        "round_ms": 1e3 * made.decode_seconds / (len(made.tokens) - 1),
        "tokens_per_step": 1.0,
        "first_token_ms": 1e3 * made.seconds["prefill"],
    }


def _round(
    target: Target,
    drafter: Drafter | None,
    prompt: Sequence[int],
    settings: Settings,
    batch: int,
    trace: list[int] | None,
    repeats: int,
    options: dict[str, Any],
) -> dict[str, float]:
    most = len(prompt) + max(settings.max_new_tokens, 2 * (settings.k + 1))
    once = {"length": most, "buckets": (), **options}  # all rounds are of about one length
    engine = Engine(target, drafter, settings, batch=batch, **once)
    parts = engine.parts(prompt, repeats)
    if drafter is not None and trace:
        engine.replay(torch.tensor(trace))
    seeds = range(batch)
    engine.generate([prompt] * batch, seeds)  # captures what was not yet
    turns = [engine.generate([prompt] * batch, seeds) for _ in range(3)]
    made = sorted(turns, key=lambda of: of[0].decode_seconds)[1]  # the same text each time
    seconds = made[0].seconds
    spent = seconds["verify"] + seconds["host"]
    longest = max(len(of.rounds) or len(of.tokens) - 1 for of in made)
    engine.close()
    return {
        **{f"{name}_ms": parts[name] for name in PARTS},
        "alone_ms": parts["round"],
        "round_ms": 1e3 * spent / longest,
        "host_share": seconds["host"] / spent,
        # of a replay the recorded mean: the few rounds that are timed happen to be longer or shorter
        "tokens_per_step": 1 + np.mean(trace) if trace else float(np.mean([of.tokens_per_step for of in made])),
        "first_token_ms": 1e3 * float(np.mean([of.seconds["prefill"] for of in made])),
        "capture_seconds": engine.capture_seconds,
    }


def speeds(frame: pd.DataFrame, floor_ms: float) -> pd.DataFrame:
    """`rounds`' rows with what follows from them.

    tokens_per_second of the batch; speedup over plain at the same batch; floor_share, what reading the weights once
    takes of a plain step; sum_gap, the round beside the sum of its parts alone; needed, the tokens_per_step that the
    paper's speedup takes.
    """
    plain = frame[frame["method"] == "plain"].set_index("batch")["round_ms"]
    of = frame["batch"].map(plain)
    parts = frame[[f"{name}_ms" for name in PARTS]].sum(axis=1, min_count=len(PARTS))
    made = frame.assign(
        tokens_per_second=1e3 * frame["batch"] * frame["tokens_per_step"] / frame["round_ms"],
        speedup=frame["tokens_per_step"] * of / frame["round_ms"],
        sum_gap=frame["round_ms"] / parts - 1,
        needed=PAPER * frame["round_ms"] / of,
    )
    alone = made["method"].isin(("plain", "hf_static", "hf_generate"))
    return made.assign(
        floor_share=np.where(alone, floor_ms / made["round_ms"], np.nan), needed=made["needed"].mask(alone)
    )


def table(study: Study, name: str, arms: Sequence[Arm], trace: str, budget: dict[str, Any]) -> pd.DataFrame:
    """`speeds` of a shape, or with an empty name of the study's own models, kept as the table 07_<name or own>.

    At a shape the decisions are those that profile `trace` (empty: this one) recorded. `budget`: see `rounds`.
    """
    specs = {arm.method: study.profile.drafters[arm.method] for arm in arms if arm.k}

    def make() -> pd.DataFrame:
        recorded = traces(study.measured("04_runs", trace), arms, budget["temperature"]) if name else None
        target, own = loaded(study, name, specs)
        rate = bandwidth(study.device)
        text = () if name else [token for ids in study.prompts()["input_ids"] for token in ids]
        frame = rounds(target, own, arms, recorded=recorded, prompt=text, **budget)
        return speeds(frame, 1e3 * step_bytes(target) / rate).assign(bandwidth_gb_s=rate / 1e9)

    spec = {"arms": [str(arm) for arm in arms], "trace": trace, **budget}
    if name:
        spec["rounds"] = manifest.digest(study.measured("04_runs", trace)["histogram"].tolist())
    return study.table(f"07_{name or 'own'}", spec, make).fillna({"tree": ""})


UNITS = {
    **dict.fromkeys(("draft_ms", "verify_ms", "walk_ms", "commit_ms", "host_ms", "alone_ms", "round_ms"), "ms/round"),
    **dict.fromkeys(("tokens_per_step", "needed"), "tokens"),
    **dict.fromkeys(("host_share", "floor_share", "sum_gap"), "share"),
    "first_token_ms": "ms",
    "tokens_per_second": "tokens/s",
    "speedup_vs_plain": "x",
    "capture_seconds": "s",
    "peak_gb": "GB",
}


def summary(frame: pd.DataFrame, stage: str, name: str, temperature: float) -> pd.DataFrame:
    """`speeds`' rows in the columns of summary.csv; task is "<name> x <batch>"."""
    frame = frame.rename(columns={"speedup": "speedup_vs_plain"})
    frame["host_ms"] = frame["host_share"] * frame["round_ms"]
    rows = []
    for line in frame.to_dict("records"):
        where = {name: line[name] or None for name in ("method", "tree", "k", "nodes")}
        where |= {"stage": stage, "task": f"{name} x {line['batch']}", "temperature": temperature}
        values = {metric: line[metric] for metric in UNITS if metric in line and np.isfinite(line[metric])}
        rows += [{**where, "metric": m, "value": value, "n": 1, "unit": UNITS[m]} for m, value in values.items()]
    return pd.DataFrame(rows, columns=COLUMNS)
