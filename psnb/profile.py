"""What a run is: target, data, drafters, budgets, seeds. Read from TOML, checked before any work."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from psnb.errors import UserError


@dataclass(frozen=True)
class FitSpec:
    """A training budget. One step sees `rows` sequences of `Data.length` tokens."""

    steps: int
    rows: int = 32
    accumulate: int = 1  # parts that a step's rows are run in, one after the other: less memory, the same result
    optimizer: str = "adamw"  # or "muon" (on a GPU): torch.optim.Muon for matrices of decoder layers, else AdamW
    learning_rate: float = 1e-3
    warmup: int = 100  # steps of linear warm-up; the rate then decays to `final_share` by a half cosine
    final_share: float = 0.02
    weight_decay: float = 0.05
    clip: float = 1.0
    compile: bool = False  # torch.compile the loss (pays on a GPU only)
    activation_budget: float = 1.0  # share of compiled layers' activations kept for backward; others are made again
    log_every: int = 20
    evaluate_every: int = 0  # 0: only at the end
    save_every: int = 200  # steps after which a killed run can go on


# Of a training budget what changes nothing in what is trained: it may be another when a run is resumed.
FREE = ("accumulate", "compile", "activation_budget", "log_every", "evaluate_every", "save_every")


@dataclass(frozen=True)
class DataSpec:
    """Where text comes from. `source` = "code" (this environment's Python), or chats: JSONL files or hub data sets.

    Several are parted by commas; files are named from the project's folder.
    """

    source: str = "code"
    split: str = "train"
    packages: list[str] = field(default_factory=list)  # restrict the code corpus to these; empty: all that is pinned
    held_out: list[str] = field(default_factory=list)  # whole packages kept for evaluation; of chats: task `code`'s
    validation: str = ""  # JSONL file of held-out chats; empty: a share of the source
    vocab_size: int = 5120
    length: int = 512  # tokens in a training row
    responses: str = "corpus"  # what drafters are trained on; "target": the target writes on from the corpus's prompts
    prefix: int = 32  # with "target": tokens of a text that are the prompt (a chat's ends where its last answer begins)
    response_temperature: float = 0.7
    response_rows: int = 0  # rows that are answered at most; 0: all
    response_batch: int = 1024  # prompts answered at once
    response_graph: bool = False  # one CUDA graph a token
    questions: str = ""  # evaluation prompts from this JSONL file (Spec-Bench's form); empty: from held-out text
    prompts_per_family: int = 16
    max_prompt_tokens: int = 256
    prompts_sha256: str = ""  # empty: not checked

    @property
    def sources(self) -> list[str]:
        return [name.strip() for name in self.source.split(",") if name.strip()]


@dataclass(frozen=True)
class TargetSpec:
    """The frozen causal LM p: `path` names a folder (from the project's folder) or a hub model; empty, a Llama of this
    shape is trained."""

    path: str = ""
    chat_template: str = ""  # Jinja; empty: the tokenizer's own
    hidden_size: int = 320
    layers: int = 8
    heads: int = 10
    kv_heads: int = 2
    intermediate_size: int = 736
    context: int = 1024
    train: FitSpec | None = None


@dataclass(frozen=True)
class DrafterSpec:
    """One drafter q (DESIGN section 2). Keys in `MASKS` are of drafters with masks (*-ps), `layers` not of medusa."""

    kind: str  # medusa, eagle, medusa-ps, eagle-ps
    k: int = 8  # slots trained; any draft length up to it can be used
    layers: int = 1
    mask_mode: str = "distinct"  # or "shared"
    slot_decay: float = 0.7  # loss weight of slot i is slot_decay ** i
    keep: float = 1.0  # share of anchors whose masks at depth d are kept, relative to depth d - 1 (COD's r)
    keep_min: float = 0.2  # never fewer than this share of the anchors (COD's r_min)
    anchors: float = 1.0  # share of the anchors that carry masks at all; every real row stays
    curriculum: float = 0.0  # share of the steps over which the slots join, one after the other
    attention: str = "structured"  # or "dense": the group mask written out, R^2 entries
    taps: list[int] = field(default_factory=list)  # target layers (from 1) whose outputs stand beside f_t; *-ps only
    link: int = 0  # rank of what ties a slot to the token before it (0: nothing does); *-ps only
    labels: str = "soft"  # the target's distribution, or "hard": the text's own token
    ce_weight: float = 1.0
    feature_weight: float = 0.0  # SmoothL1 between the drafter's and the target's features
    streak_weight: float = 0.0  # of the expected accepted prefix of the text's own tokens (SpecDiff-2)
    warm_start: str = ""  # name of a drafter of this profile to start from
    train: FitSpec | None = None


CHOICES = {
    "kind": ("medusa", "eagle", "medusa-ps", "eagle-ps"),  # the keys of drafters.KINDS, known without torch
    "mask_mode": ("distinct", "shared"),
    "attention": ("structured", "dense"),
    "labels": ("soft", "hard"),
}
OPTIMIZERS = ("adamw", "muon")
# keys of drafters with masks alone
MASKS = ("taps", "link", "curriculum", "mask_mode", "keep", "keep_min", "anchors", "attention")


@dataclass(frozen=True)
class Profile:
    """A whole run. `notebooks` maps a notebook's name to the papermill parameters that differ from its defaults."""

    name: str
    title: str
    seed: int = 2410
    device: str = "auto"  # auto: cuda if there is one
    dtype: str = "float32"  # of the target and drafters while decoding
    data: DataSpec = field(default_factory=DataSpec)
    target: TargetSpec = field(default_factory=TargetSpec)
    drafters: dict[str, DrafterSpec] = field(default_factory=dict)
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)  # the notebooks that this profile runs; empty: all


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`did you mean ...` for an unknown name: the closest valid ones, or all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"valid names: {', '.join(names)}"


def _build(cls: type, table: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `X | None` occurs
        return _convert(args[0], value, where)
    kind = dict if dataclasses.is_dataclass(hint) else origin
    if kind in (dict, list) and not isinstance(value, kind):
        raise UserError(f"{where}: a {'table' if kind is dict else 'list'} is wanted, not {value!r}")
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is dict:
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()} if args[1] is not Any else value
    if origin is list:
        return [_convert(args[0], v, where) for v in value]
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {hint.__name__} is wanted, not {value!r}")
    return value


def names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(p.name[:-5] for p in resources.files("psnb.profiles").iterdir() if p.name.endswith(".toml"))


def load(name: str) -> Profile:
    """A profile by name, or by the path of a `.toml` file.

    Raises `UserError` for an unknown profile, key or type, naming the nearest valid ones.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"profile file {name} does not exist; profiles that come with psnb: {', '.join(names())}")
        raw, name = path.read_bytes(), path.stem
        if name in names() and raw != (resources.files("psnb.profiles") / path.name).read_bytes():
            raise UserError(f"profile file {path}: another profile {name} comes with psnb; rename the file")
    else:
        if name not in names():
            cure = f"did you mean {name}.toml?" if Path(f"{name}.toml").is_file() else nearest(name, names())
            raise UserError(f"unknown profile {name!r}; {cure}")
        raw = (resources.files("psnb.profiles") / f"{name}.toml").read_bytes()
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"profile {name}: not valid TOML in UTF-8: {error}") from None
    if table.get("name", name) != name:  # its results' folder
        raise UserError(
            f"profile {name}: name = {table['name']!r}; a profile is named as its file is: leave the key out"
        )
    profile = _build(Profile, {"name": name, **table}, f"profile {name}")
    _check(profile)
    return profile


LEAST = {  # of whole numbers, wherever a profile has them
    **dict.fromkeys(("steps", "rows", "accumulate", "log_every", "save_every", "k", "layers"), 1),
    **dict.fromkeys(("hidden_size", "heads", "kv_heads", "intermediate_size", "context", "response_batch"), 1),
    **dict.fromkeys(("prompts_per_family", "max_prompt_tokens", "prefix"), 1),
    **dict.fromkeys(("warmup", "evaluate_every", "link", "response_rows"), 0),
    "length": 16,
    "vocab_size": 257,  # the bytes and the end of a text
}
SHARES = ("keep", "keep_min", "anchors", "activation_budget")  # in (0, 1]
POSITIVE = ("learning_rate", "clip")
WEIGHTS = (
    "slot_decay",
    "ce_weight",
    "feature_weight",
    "streak_weight",
    "weight_decay",
    "final_share",
    "response_temperature",
)
TAKEN = ("target", "report", "corpus", "tokenizer", "tokens", "rows", "prompts", "plain")
TAKEN += ("plain_float32", "hf_generate", "hf_static")


def _check(profile: Profile) -> None:
    where, names = f"profile {profile.name}", list(profile.drafters)
    models = {"target": profile.target, **{f"drafters.{name}": spec for name, spec in profile.drafters.items()}}
    budgets = {f"{name}.train": spec.train for name, spec in models.items() if spec.train}
    parts: dict[str, Any] = {"data": profile.data, **models, **budgets}
    shape = profile.target
    if not shape.path:
        if shape.hidden_size % (2 * shape.heads) or shape.heads % shape.kv_heads:
            raise UserError(f"{where}.target: hidden_size is a multiple of twice the heads, and heads of kv_heads")
        for key in ("length", "max_prompt_tokens"):
            if (count := getattr(profile.data, key)) > shape.context - (key != "length"):
                raise UserError(f"{where}.data: {key} = {count} does not fit target.context = {shape.context}")
    if profile.seed < 0:
        raise UserError(f"{where}: seed = {profile.seed}; it is 0 or more")
    for name, spec in parts.items():
        for key, value in vars(spec).items():
            if key in LEAST and value < LEAST[key]:
                raise UserError(f"{where}.{name}: {key} = {value}; it is {LEAST[key]} or more")
            if key in SHARES and not 0 < value <= 1:
                raise UserError(f"{where}.{name}: {key} = {value}; it is a share in (0, 1]")
            if key in POSITIVE and not value > 0:
                raise UserError(f"{where}.{name}: {key} = {value}; it is a number above 0")
            if key in WEIGHTS and not 0 <= value < math.inf:
                raise UserError(f"{where}.{name}: {key} = {value}; it is a number of 0 or more")
    for name, spec in profile.drafters.items():
        own = f"{where}.drafters.{name}"
        if name in TAKEN or not re.fullmatch(r"(?!\d\d_)\w[\w.-]*", name):
            raise UserError(f"{own}: a name is of letters, digits, _ . and -, and no other stage's: rename it")
        for key, words in CHOICES.items():
            if (word := getattr(spec, key)) not in words:
                raise UserError(f"{own}: {key} {word!r}; {nearest(word, words)}")
        if not 0 <= spec.curriculum <= 1:
            raise UserError(f"{own}: curriculum is a share of the steps, 0 to 1")
        idle = () if spec.kind.endswith("-ps") else (*MASKS, "layers") if spec.kind == "medusa" else MASKS
        if given := [key for key in idle if getattr(spec, key) != getattr(DrafterSpec(spec.kind), key)]:
            raise UserError(f"{own}: {', '.join(given)} would change nothing of {spec.kind}: leave it out")
        if spec.warm_start and spec.warm_start not in names[: names.index(name)]:
            raise UserError(f"{own}: warm_start {spec.warm_start!r} must be a drafter listed before it")
    for name, budget in budgets.items():
        if budget.optimizer not in OPTIMIZERS:
            known = nearest(budget.optimizer, OPTIMIZERS)
            raise UserError(f"{where}.{name}: optimizer {budget.optimizer!r}; {known}")
    if profile.data.responses not in ("corpus", "target"):
        known = nearest(profile.data.responses, ["corpus", "target"])
        raise UserError(f"{where}.data: responses {profile.data.responses!r}; {known}")
    if not profile.data.sources:
        raise UserError(f"{where}.data: source is empty; give code, a .jsonl file or a hub data set")
    if profile.dtype not in ("float32", "float64", "bfloat16"):
        raise UserError(f"{where}: dtype {profile.dtype!r}; float32, float64 or bfloat16")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", profile.device):
        raise UserError(f"{where}: device {profile.device!r}; auto, cpu, cuda or cuda:N")
