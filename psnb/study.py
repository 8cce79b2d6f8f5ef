"""Stages and the running of notebooks: what exists is reused, what is missing is made, nothing is left half-written.

    study = Study.open("embedded")
    target, drafter = study.target(), study.drafter("eagle-ps")
    frame = study.table("draft_times", {"ks": [1, 2, 4]}, lambda: measure.draft_times(...))

A *stage* is addressed by the hash of what it depends on:

    corpus, tokenizer, tokens, rows, prompts    folders in results/<profile>/.cache; the user's machine makes them
    target and the drafters                     folders in results/<profile>/checkpoints; they depend on the profile's
                                                text (and a drafter on its target's weights), never on the machine
    tables (measurements) and notebooks         files in results/<profile>; their records lie in .cache, so that what
                                                came with a clone never counts as measured here
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from psnb import manifest, profile
from psnb.errors import UserError
from psnb.manifest import digest, say
from psnb.profile import Profile, nearest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from psnb.drafters import Drafter
    from psnb.target import Target

DATA = ("corpus", "tokenizer", "tokens", "rows", "prompts")
SPLITS = ("train", "held_out")
TRAINED_ON = ("source", "split", "packages", "held_out", "vocab_size", "length")  # of [data]: what weights depend on
UNSEEN = ("compile", "log_every", "evaluate_every")  # of a training budget: they do not change what is trained
MEASURING = (
    "target.py",
    "groups.py",
    "drafters/*.py",
    "cache.py",
    "tree.py",
    "verify.py",
    "decode.py",
    "engine.py",
    "measure.py",
)
HELD_ROWS = 256  # held-out rows that are judged while training
CPU_FLOPS, GPU_FLOPS = 1e11, 1e14  # reached while training, for the cost hints of `psnb list`: 2 cores; one GPU


def project() -> Path:
    """The folder with `notebooks/` and `psnb/`: the nearest parent of the working directory, else the package's own."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "psnb").is_dir():
            return folder
    return Path.cwd()


def _installed() -> dict[str, str]:
    return {d.name: d.version for d in importlib.metadata.distributions()}


def _code(*patterns: str) -> str:
    """Hash of the package's own sources that match."""
    folder = Path(__file__).parent
    return digest([manifest.sha256_file(p) for pattern in patterns for p in sorted(folder.glob(pattern))])


def _seen(spec: Any) -> dict[str, Any]:
    """A target's or drafter's spec without what changes nothing in the weights."""
    found = manifest.plain(spec)
    if "train" in found:
        found["train"] = {k: v for k, v in found["train"].items() if k not in UNSEEN}
    return found


def _difference(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted names at which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in sorted({*old, *new}) for d in _difference(old.get(k), new.get(k), f"{where}.{k}".strip("."))]
    return [] if old == new else [where]


def _weights(folder: Path) -> dict[str, str]:
    return {p.name: manifest.sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}


def _read_json(path: Path) -> dict[str, Any]:
    """What stands there; empty if nothing readable does."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _about(folder: Path) -> dict[str, Any]:
    """`stage.json` of a folder that a stage made; empty if there is none."""
    return _read_json(folder / "stage.json")


@dataclass
class Study:
    """One profile's artefacts below one output folder."""

    profile: Profile
    root: Path  # the project: notebooks, constraints, shipped checkpoints
    output: Path
    fresh: set[str] = field(default_factory=set)  # stages to make again, each once
    _loaded: dict[str, Any] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, profile_: str | Profile = "embedded", output: str | Path = "", fresh: Iterable[str] = ()) -> Study:
        """A study of a profile (by name, by the path of a TOML file, or as it is).

        `output` is the folder that gets `results/` and `figures/`; empty, the project's. `fresh` names stages to make
        again. Raises UserError for an unknown profile.
        """
        chosen = profile_ if isinstance(profile_, Profile) else profile.load(str(profile_))
        root = project()
        return cls(chosen, root, Path(output).resolve() if str(output) else root, set(fresh))

    @property
    def results(self) -> Path:
        return self.output / "results" / self.profile.name

    @property
    def figures(self) -> Path:
        return self.output / "figures" / self.profile.name

    @property
    def cache(self) -> Path:
        return self.results / ".cache"

    @property
    def manifest(self) -> manifest.RunManifest:
        return manifest.RunManifest(self.results / "manifest.json")

    @property
    def device(self) -> torch.device:
        import torch

        name = self.profile.device
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)

    @property
    def stages(self) -> list[str]:
        """All names that `--only` takes, in the order of a run."""
        return [*DATA, "target", *self.profile.drafters, *(p.stem for p in self.notebooks()), "report"]

    def notebooks(self) -> list[Path]:
        """The source notebooks, in order."""
        return sorted((self.root / "notebooks").glob("[0-9][0-9]_*.ipynb"))

    # --- the machinery of stages --------------------------------------------------------------------------------

    def _once(self, stage: str, text: str) -> None:
        """One line a stage, however often it is asked for."""
        if stage not in self._said:
            self._said.add(stage)
            say(f"{stage}: {text}")

    def _data(self, stage: str, depends: Any, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The cached folder of a data stage: as it is if it was made from the same, else made anew."""
        key, about = digest(depends), self._made(stage)
        if about.get("key") == key and stage not in self.fresh:
            self._once(stage, f"reused ({about['at']}, took {about['seconds']:.0f} s)")
            return self.cache / stage
        return self._make(stage, self.cache / stage, key, make, "making it")

    def _made(self, stage: str) -> dict[str, Any]:
        """What stage.json says of a data stage; empty if it was not made yet."""
        return _about(self.cache / stage)

    def _make(self, stage: str, folder: Path, key: str, make: Callable[[Path], dict[str, Any]], why: str) -> Path:
        """`make(temporary)` fills a folder and returns facts for its stage.json; it then takes the place of `folder`."""
        say(f"{stage}: {why}")
        self._said.add(stage)
        began = time.monotonic()
        with manifest.atomic_folder(folder) as temporary:
            facts = make(temporary)
            about = {"key": key, "at": manifest.now(), "seconds": round(time.monotonic() - began, 2), **facts}
            manifest.write_json(temporary / "stage.json", about)
        self.fresh.discard(stage)
        say(f"{stage}: done in {about['seconds']:.0f} s")
        return folder

    def _record(self, stage: str) -> Path:
        return self.cache / "stages" / f"{stage}.json"

    def _inputs(self) -> dict[str, str]:
        """What measurements stand on, as it is now: checkpoint -> hash of its weights, and the prompts'."""
        found = {
            n: digest(_about(self.checkpoint(n)).get("weights", {})) for n in ("target", *self.profile.drafters)
        }
        if self.profile.target.path:
            found["target"] = self._target_id()
        found["prompts"] = self._made("prompts").get("sha256", "")
        return {name: value for name, value in found.items() if value not in ("", digest({}))}

    def _current(self, stage: str, key: str, artefact: Path) -> dict[str, Any]:
        """The record of a table or notebook if it can be reused, else empty.

        It can if its key is the same, its inputs (those it had) are, and its file is the one that it wrote.
        """
        record, now = _read_json(self._record(stage)), self._inputs()
        same = (
            record.get("key") == key
            and stage not in self.fresh
            and all(now.get(name) == value for name, value in record["inputs"].items())
            and artefact.is_file()
            and manifest.sha256_file(artefact) == record["sha256"]
        )
        return record if same else {}

    def _done(self, stage: str, key: str, artefact: Path, began: float, **facts: Any) -> dict[str, Any]:
        record = {
            "key": key,
            "at": manifest.now(),
            "seconds": round(time.monotonic() - began, 2),
            "inputs": self._inputs(),
            "sha256": manifest.sha256_file(artefact),
            **facts,
        }
        manifest.write_json(self._record(stage), record)
        self.fresh.discard(stage)
        return record

    def _text(self) -> dict[str, Any]:
        """The profile without its title and notebooks' parameters: what every measurement depends on."""
        return {k: v for k, v in manifest.plain(self.profile).items() if k not in ("name", "title", "notebooks")} | {
            "drafters": {name: _seen(spec) for name, spec in self.profile.drafters.items()}
        }

    # --- data -----------------------------------------------------------------------------------------------------

    @property
    def constraints(self) -> Path:
        return self.root / "constraints.txt"

    def corpus(self) -> DatasetDict:
        """Documents: splits `train` and `held_out` (memory-mapped). Writes results/<profile>/corpus.csv, a sha256 a file."""
        from datasets import load_from_disk

        from psnb import data

        spec = self.profile.data
        parts: list[Any] = [spec.source, spec.split, spec.packages, spec.held_out]
        if spec.source == "code":
            parts += [manifest.sha256_file(self.constraints), sys.version, _installed()]
        elif Path(spec.source).is_file():
            parts += [manifest.sha256_file(Path(spec.source))]

        def make(folder: Path) -> dict[str, Any]:
            corpus, mismatched = self._documents()
            corpus.save_to_disk(folder)
            files = data.corpus_manifest(corpus)
            manifest.write_frame(self.results / "corpus.csv", files)
            return {
                "documents": {name: len(split) for name, split in corpus.items()},
                "bytes": {name: int(files.bytes[files.split == name].sum()) for name in corpus},
                "sha256": {name: digest(sorted(files.sha256[files.split == name])) for name in corpus},
                "mismatched": mismatched,
            }

        return load_from_disk(self._folder("corpus", self.cache / "corpus", digest(parts), make, "reading the sources"))

    def _documents(self) -> tuple[DatasetDict, dict[str, str]]:
        """The corpus itself, and the packages whose installed version is not the pinned one."""
        from packaging.utils import canonicalize_name

        from psnb import data

        spec = self.profile.data
        files = data.environment_files(self.constraints)
        mismatched = dict(files.attrs["mismatched"])
        if spec.packages:
            wanted = {canonicalize_name(name) for name in (*spec.packages, *spec.held_out)}
            for name in sorted(wanted - set(files.package)):
                raise UserError(
                    f"data.packages: {name!r} is not in the pinned environment; {nearest(name, set(files.package))}"
                )
            files = files[files.package.isin(wanted)]
        return data.code_corpus(files, held_out=spec.held_out), mismatched

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer: its own, or one trained on the corpus where the target is still to be trained."""
        from transformers import AutoTokenizer

        from psnb import data

        spec = self.profile.data
        if self.profile.target.path:
            return AutoTokenizer.from_pretrained(self.profile.target.path)
        if self._ready("target"):
            return AutoTokenizer.from_pretrained(str(self.checkpoint("target")))
        corpus = self.corpus()

        def make(folder: Path) -> dict[str, Any]:
            texts = data.sample_texts(corpus["train"], 60_000_000)
            data.train_tokenizer(texts, spec.vocab_size).save_pretrained(str(folder))
            return {"vocab_size": spec.vocab_size}

        key = digest([self._made("corpus")["sha256"]["train"], spec.vocab_size])
        return AutoTokenizer.from_pretrained(str(self._folder("tokenizer", self.cache / "tokenizer", key, make)))

    def _tokenizer_id(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return digest([tokenizer.get_vocab(), tokenizer.chat_template])

    def tokens(self) -> DatasetDict:
        """The corpus tokenised: `input_ids` (and `loss_mask` for chats) a document."""
        from datasets import DatasetDict

        return DatasetDict({split: self._tokens(split) for split in SPLITS})

    def _tokens(self, split: str) -> Dataset:
        from datasets import concatenate_datasets, load_from_disk

        from psnb import data

        documents, tokenizer = self.corpus()[split], self.tokenizer()

        def make(folder: Path) -> dict[str, Any]:
            shards = min(20, len(documents))
            parts = [
                data.tokenize(documents.shard(shards, i, contiguous=True), tokenizer)
                for i in manifest.progress(range(shards), label=f"tokens, {split}, part")
            ]
            tokens = concatenate_datasets(parts)
            tokens.save_to_disk(folder)
            documents.cleanup_cache_files()
            return {}

        key = digest([self._made("corpus")["sha256"][split], self._tokenizer_id(tokenizer)])
        return load_from_disk(self._folder(f"tokens-{split}", self.cache / f"tokens-{split}", key, make))

    def rows(self, split: str) -> Dataset:
        """Packed training rows of `data.length` tokens of a split (`train` or `held_out`)."""
        from datasets import load_from_disk

        from psnb import data

        tokens, length = self._tokens(split), self.profile.data.length

        def make(folder: Path) -> dict[str, Any]:
            rows = data.pack(tokens, length)
            rows.save_to_disk(folder)
            return {"rows": len(rows), "tokens": len(rows) * length}

        key = digest([self._made(f"tokens-{split}")["key"], length])
        return load_from_disk(self._folder(f"rows-{split}", self.cache / f"rows-{split}", key, make))

    def prompts(self) -> Dataset:
        """The evaluation prompts. Where they are not those of the profile's sha256, a warning goes to manifest and report."""
        from datasets import load_from_disk

        from psnb import data

        spec, held_out, tokenizer = self.profile.data, self.corpus()["held_out"], self.tokenizer()

        def make(folder: Path) -> dict[str, Any]:
            prompts = data.code_prompts(held_out, tokenizer, spec.prompts_per_family, spec.max_prompt_tokens)
            prompts.save_to_disk(folder)
            return {"prompts": len(prompts), "sha256": data.prompts_sha256(prompts)}

        corpus = self._made("corpus")["sha256"]["held_out"]
        key = digest([corpus, self._tokenizer_id(tokenizer), spec.prompts_per_family, spec.max_prompt_tokens])
        folder = self._folder("prompts", self.cache / "prompts", key, make)
        if warning := self._prompts_warning():
            self._once("prompts-warning", warning)
        return load_from_disk(folder)

    def _prompts_warning(self) -> str:
        expected, got = self.profile.data.prompts_sha256, self._made("prompts").get("sha256", "")
        if not expected or not got or expected == got:
            return ""
        return (
            f"the prompts differ from the profile's (sha256 {got[:12]} instead of {expected[:12]}): an evaluation package "
            "has another version than constraints.txt pins, so numbers cannot be compared with published ones"
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Path:
        """The folder of the target's or a drafter's weights: below the output folder if it is there, else as shipped."""
        own = self.results / "checkpoints" / name
        shipped = self.root / "results" / self.profile.name / "checkpoints" / name
        return shipped if shipped.is_dir() and not own.is_dir() else own

    def _spec(self, name: str) -> dict[str, Any]:
        """What a checkpoint's weights depend on; its hash is the stage's key."""
        data = {k: v for k, v in manifest.plain(self.profile.data).items() if k in TRAINED_ON}
        if name == "target":
            return {"seed": self.profile.seed, "data": data, "target": _seen(self.profile.target)}
        spec = self.profile.drafters[name]
        warm = digest(self._spec(spec.warm_start)) if spec.warm_start else ""
        return {
            "seed": self.profile.seed, "data": data, "drafter": _seen(spec), "target": self._target_id(), "warm_start": warm,
        }  # fmt: skip

    def _target_id(self) -> str:
        """Hash of the target's weights; for a hub model its name and commit."""
        path = self.profile.target.path
        if not path:
            return digest(_about(self.checkpoint("target")).get("weights", {}))
        if Path(path).is_dir():
            if path not in self._loaded:
                self._loaded[path] = digest(_weights(Path(path)))
            return self._loaded[path]
        from transformers import AutoConfig

        return f"{path}@{AutoConfig.from_pretrained(path)._commit_hash}"

    def _ready(self, name: str) -> bool:
        about = _about(self.checkpoint(name))
        return name not in self.fresh and about.get("key") == digest(self._spec(name))

    def _cure(self, name: str) -> str:
        folder = self.checkpoint(name)
        again = f"`psnb run --profile {self.profile.name} --only {name} --fresh` trains it again"
        if folder.is_relative_to(self.root):
            return f"`git checkout -- {folder.relative_to(self.root)}` brings a shipped one back, {again}"
        return again

    def _trained(self, name: str, make: Callable[[Path], None]) -> Path:
        """The checkpoint's folder: as it is if its key fits and its weights are whole, else trained by `make(folder)`.

        Raises UserError for a damaged one: nothing is trained again that nobody asked for.
        """
        folder, spec = self.checkpoint(name), self._spec(name)
        about = _about(folder)
        if name in self.fresh:
            why = "training again, as asked"
        elif not folder.is_dir():
            why = "training"
        elif not {"key", "spec", "weights", "seconds", "at"} <= set(about):
            raise UserError(f"{folder}: stage.json is missing or damaged; {self._cure(name)}")
        elif about["key"] != digest(spec):
            why = f"training again, for the profile changed ({', '.join(_difference(about['spec'], spec))})"
        else:
            found = _weights(folder)
            for file, sha256 in about["weights"].items():
                if found.get(file) != sha256:
                    raise UserError(
                        f"{folder / file}: damaged (its sha256 is not the recorded one); {self._cure(name)}"
                    )
            self._once(name, f"reused (trained {about['at'][:10]} on {about['machine']} in {about['seconds']:.0f} s)")
            return folder
        self._loaded.pop(name, None)

        def made(temporary: Path) -> dict[str, Any]:
            make(temporary)
            return self._seal(temporary, name)

        return self._folder(name, self.results / "checkpoints" / name, digest(spec), made, f"{why} on {self.device}")

    def _seal(self, folder: Path, name: str) -> dict[str, Any]:
        """What stage.json says of weights beside key, time and seconds."""
        facts = manifest.machine()
        return {
            "spec": self._spec(name),
            "weights": _weights(folder),
            "revision": manifest.revision(self.root),
            "machine": manifest.machine_name(facts),
            "versions": facts["versions"],
            "python": facts["python"],
            "corpus": self._made("corpus").get("sha256", {}),
        }

    def seal(self, name: str, folder: Path | None = None, seconds: float = 0.0) -> None:
        """Declares the weights in a checkpoint's folder to be this profile's `name`, however they came to be there."""
        folder = folder or self.checkpoint(name)
        facts = {"key": digest(self._spec(name)), "at": manifest.now(), "seconds": seconds}
        manifest.write_json(folder / "stage.json", {**facts, **self._seal(folder, name)})

    def _log(self, name: str, steps: int) -> Callable[[dict[str, Any]], None]:
        """Prints a training row every few seconds: loss, and every held-out value."""
        last = [0.0]

        def log(row: dict[str, Any]) -> None:
            final = row["step"] == steps
            if row["metric"] == "heldout_nats" or (
                row["metric"] == "loss" and (final or time.monotonic() - last[0] > manifest.EVERY)
            ):
                last[0] = time.monotonic()
                say(f"{name}: step {row['step']} of {steps}, {row['metric']} {row['value']:.3f}")

        return log

    def _training_rows(self) -> tuple[Dataset, Dataset]:
        held_out = self.rows("held_out")
        some = held_out.shuffle(seed=self.profile.seed).select(range(min(HELD_ROWS, len(held_out))))
        return self.rows("train"), some

    def target(self) -> Target:
        """The frozen target: the profile's model, or the checkpoint, trained first if there is none.

        Raises UserError for a checkpoint that does not load.
        """
        import torch

        from psnb import target

        if "target" not in self._loaded or "target" in self.fresh:
            spec = self.profile.target

            def make(folder: Path) -> None:
                tokenizer = self.tokenizer()
                log = self._log("target", spec.train.steps if spec.train else 0)
                target.train(
                    spec, tokenizer, *self._training_rows(), folder, seed=self.profile.seed, device=self.device, log=log
                )

            path = spec.path or self._trained("target", make)
            dtype = getattr(torch, self.profile.dtype)
            self._loaded["target"] = self._load("target", lambda: target.load(path, dtype=dtype, device=self.device))
        return self._loaded["target"]

    def drafter(self, name: str) -> Drafter:
        """A drafter of the profile, trained first if there is no checkpoint.

        Raises UserError for an unknown name and for a checkpoint that does not load.
        """
        from psnb import drafters
        from psnb.train import train_drafter

        if name not in self.profile.drafters:
            raise UserError(f"unknown drafter {name!r}; {nearest(name, self.profile.drafters)}")
        if name not in self._loaded or name in self.fresh:
            spec, target = self.profile.drafters[name], self.target()
            if spec.warm_start and not self._ready(name):
                self.drafter(spec.warm_start)

            def make(folder: Path) -> None:
                warm = self.checkpoint(spec.warm_start) if spec.warm_start else None
                log = self._log(name, spec.train.steps if spec.train else 0)
                train_drafter(
                    spec, target, *self._training_rows(), folder,
                    seed=self.profile.seed, device=self.device, log=log, warm_start_from=warm,
                )  # fmt: skip

            folder = self._trained(name, make)
            self._loaded[name] = self._load(name, lambda: drafters.load(folder, target))
        return self._loaded[name]

    def _load(self, name: str, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except UserError as error:
            if self.profile.target.path and name == "target":
                raise
            raise UserError(f"{error} ({self._cure(name)})") from error
        except Exception as error:  # whatever a damaged file makes of itself
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{self.checkpoint(name)}: does not load ({first}); {self._cure(name)}") from error

    # --- measurements ---------------------------------------------------------------------------------------------

    def table(self, name: str, spec: dict[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A measurement: results/<profile>/<name>.csv, made by `make()` unless this machine has it already.

        `spec` is what it depends on beside the profile's text, the weights, the prompts and the measuring code.
        The frame comes back as the file has it. Raises TypeError for a `spec` that is not plain JSON.
        """
        path = self.results / f"{name}.csv"
        key = digest([name, spec, self._text(), str(self.device), _code(*MEASURING)])
        record = self._current(name, key, path)
        if record:
            self._once(name, f"reused ({record['at']}, took {record['seconds']:.0f} s)")
        else:
            self._once(name, "measuring")
            began = time.monotonic()
            frame = make()
            manifest.write_frame(path, frame)
            texts = [c for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c])]
            record = self._done(
                name,
                key,
                path,
                began,
                texts=texts,
                notebook=os.environ.get("PSNB_NOTEBOOK", ""),
                machine=self._machine(),
            )
            say(f"{name}: done in {record['seconds']:.0f} s")
        texts = record["texts"]
        columns = pd.read_csv(path, nrows=0).columns
        return pd.read_csv(
            path,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values={c: [""] for c in columns if c not in texts},
        )

    def _machine(self) -> str:
        if "machine" not in self._loaded:
            self._loaded["machine"] = manifest.machine_name(manifest.machine())
        return self._loaded["machine"]

    def training(self) -> pd.DataFrame:
        """All rows that trainings wrote: stage, step, tokens, metric, value."""
        frames = []
        for name in ("target", *self.profile.drafters):
            path = self.checkpoint(name) / "training.csv"
            if path.is_file():
                frames.append(pd.read_csv(path).assign(stage=name))
        columns = ["stage", "step", "tokens", "metric", "value"]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def summary(self, stage: str, rows: pd.DataFrame) -> None:
        """Replaces a stage's rows in results/<profile>/summary.csv, which holds what this machine measured and no more.

        Raises UserError for other columns than DESIGN's.
        """
        from psnb.measure import COLUMNS

        if missing := set(COLUMNS) ^ set(rows.columns):
            raise UserError(
                f"summary of {stage}: the columns must be {', '.join(COLUMNS)}; wrong: {', '.join(sorted(missing))}"
            )
        folder = self.cache / "summary"
        manifest.write_frame(folder / f"{stage}.csv", rows[list(COLUMNS)].assign(stage=stage))
        parts = [pd.read_csv(p, dtype=str, keep_default_na=False) for p in sorted(folder.glob("*.csv"))]
        manifest.write_frame(self.results / "summary.csv", pd.concat(parts, ignore_index=True))
        self.manifest.update(**self.facts())

    # --- what is there --------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the manifest says of stages, data and checkpoints: read from their records."""
        stages, data = {}, {}
        for path in sorted(self.cache.glob("*/stage.json")):
            about = _read_json(path)
            stages[path.parent.name] = {k: about.get(k) for k in ("at", "seconds", "key")}
            data[path.parent.name] = {k: v for k, v in about.items() if k not in ("at", "seconds", "key")}
        for path in sorted(self.cache.glob("stages/*.json")):
            stages[path.stem] = {
                k: v for k, v in _read_json(path).items() if k in ("at", "seconds", "key", "sha256", "machine")
            }
        kept = ("at", "seconds", "key", "weights", "machine", "revision")
        checkpoints = {n: _about(self.checkpoint(n)) for n in ("target", *self.profile.drafters)}
        data.setdefault("prompts", {})["expected_sha256"] = self.profile.data.prompts_sha256
        mismatched = self._made("corpus").get("mismatched")
        warnings = [f"installed versions differ from the pins: {mismatched}"] if mismatched else []
        return {
            "stages": stages,
            "data": data,
            "checkpoints": {n: {k: a[k] for k in kept if k in a} for n, a in checkpoints.items() if a},
            "warnings": [*filter(None, [self._prompts_warning()]), *warnings],
        }

    def status(self) -> pd.DataFrame:
        """stage, done (yes, no, shipped, damaged), cost: minutes it took, or a hint of what it would take."""
        told, rows = self.manifest.read().get("stages", {}), []
        for stage in DATA:
            abouts = [
                self._made(s)
                for s in ([f"{stage}-{x}" for x in SPLITS] if stage in ("tokens", "rows") else [stage])
            ]
            done = all(abouts) or (stage == "tokenizer" and (self.profile.target.path or self._ready("target")))
            rows.append((stage, "yes" if done else "no", self._took([a["seconds"] for a in abouts if a])))
        for name in ("target", *self.profile.drafters):
            rows.append((name, *self._weights_status(name)))
        for path in self.notebooks():
            record = self._current(path.stem, self._notebook_key(path), self._executed(path))
            rows.append(
                (
                    path.stem,
                    "yes" if record else "no",
                    self._took([told[path.stem]["seconds"]] if path.stem in told else []),
                )
            )
        report = self.results / "report.html"
        rows.append(
            (
                "report",
                "yes" if report.is_file() and all(r[1] != "no" for r in rows[len(DATA) :]) else "no",
                "under a minute",
            )
        )
        return pd.DataFrame(rows, columns=["stage", "done", "cost"])

    def _took(self, seconds: list[float]) -> str:
        return f"took {sum(seconds) / 60:.1f} min" if seconds else "minutes"

    def _weights_status(self, name: str) -> tuple[str, str]:
        if name == "target" and self.profile.target.path:
            return "yes", f"loaded from {self.profile.target.path}"
        about = _about(self.checkpoint(name))
        if about and self._ready(name):
            return "yes", f"took {about['seconds'] / 60:.1f} min on {about['machine']}"
        state = "changed" if about else "damaged" if self.checkpoint(name).is_dir() else "no"
        return state, self._estimate(name)

    def _estimate(self, name: str) -> str:
        """Minutes of training from the shapes: 6 flops a weight and token, 2 for the frozen target's forward pass."""
        t, data = self.profile.target, self.profile.data
        budget = t.train if name == "target" else self.profile.drafters[name].train
        if budget is None:
            return "no training budget in the profile"
        h, projection = t.hidden_size, t.hidden_size * data.vocab_size
        layer = h * h * (2 + 2 * t.kv_heads / t.heads) + 3 * h * t.intermediate_size
        flops = 6 * (t.layers * layer + projection)
        if name != "target":
            spec = self.profile.drafters[name]
            flops = flops / 3 + 6 * spec.k * (spec.layers * layer + projection)
        minutes = flops * budget.steps * budget.rows * data.length / 60
        return f"about {minutes / CPU_FLOPS:.2g} min on 2 cores, {minutes / GPU_FLOPS:.2g} on one GPU"

    # --- notebooks ------------------------------------------------------------------------------------------------

    def _executed(self, source: Path) -> Path:
        return self.results / "notebooks" / source.name

    def _notebook_key(self, source: Path, extra: dict[str, Any] | None = None) -> str:
        parameters = {**self.profile.notebooks.get(source.stem, {}), **(extra or {})}
        cells = [cell["source"] for cell in _read_json(source).get("cells", [])]
        return digest([cells, parameters, self._text(), _code("**/*.py")])

    def execute(self, source: Path, extra: dict[str, Any]) -> bool:
        """Runs one notebook into results/<profile>/notebooks unless it stands there for the same inputs; True if it ran.

        A failed one is kept as NAME.failed.ipynb. Raises UserError with the notebook's own message.
        """
        name, final = source.stem, self._executed(source)
        key = self._notebook_key(source, extra)
        if record := self._current(name, key, final):
            self._once(name, f"reused ({record['at']}, took {record['seconds']:.0f} s)")
            return False
        self._once(name, "running")
        began = time.monotonic()
        parameters = {
            "profile": self._loaded.get("profile", self.profile.name), "output": ".",
            **self.profile.notebooks.get(name, {}), **extra,
        }  # fmt: skip
        running = self.cache / "running" / source.name
        with manifest._explained(running):
            running.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._papermill(source, running, parameters)
        except _Failed as error:
            failed = final.with_suffix(".failed.ipynb")
            manifest.write_text(failed, self._tidy(running, source))
            kind = manifest.DiskError if error.disk else UserError
            raise kind(f"{name}: {error} (the notebook as far as it came: {failed})") from error
        manifest.write_text(final, self._tidy(running, source))
        final.with_suffix(".failed.ipynb").unlink(missing_ok=True)
        running.unlink()
        record = self._done(name, key, final, began, machine=self._machine())
        say(f"{name}: done in {record['seconds']:.0f} s")
        return True

    def _papermill(self, source: Path, running: Path, parameters: dict[str, Any]) -> None:
        """Executes with this very Python, whatever kernels the user has installed. Raises _Failed."""
        import papermill
        from nbclient.exceptions import DeadKernelError

        own = str(Path(sys.prefix) / "share" / "jupyter")
        kernels = {
            "PSNB_NOTEBOOK": source.stem,
            "JUPYTER_PATH": os.pathsep.join(filter(None, [own, os.environ.get("JUPYTER_PATH")])),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        before = {name: os.environ.get(name) for name in kernels}
        os.environ.update(kernels)
        try:
            papermill.execute_notebook(
                source, running, parameters, kernel_name="python3", progress_bar=False, cwd=self.output,
                stdout_file=sys.stdout, start_timeout=180, extra_arguments=["--IPKernelApp.log_level=50"],
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            raise _Failed(error.ename, error.evalue) from error
        except DeadKernelError as error:
            raise _Failed("", "its kernel died; most often the memory was not enough") from error
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def _tidy(self, executed: Path, source: Path) -> str:
        """An executed notebook as text, without the paths of the machine."""
        notebook = json.loads(executed.read_text(encoding="utf-8"))
        about = notebook["metadata"].get("papermill", {})
        about.update(
            input_path=f"notebooks/{source.name}", output_path=f"results/{self.profile.name}/notebooks/{source.name}"
        )
        folders = [
            (sys.prefix, "PYTHON"),
            (sys.base_prefix, "PYTHON"),
            (self.output, "."),
            (self.root, "."),
            (Path.home(), "~"),
        ]

        def clean(text: str | list[str]) -> str | list[str]:
            if isinstance(text, list):
                return [clean(line) for line in text]
            for folder, short in folders:
                text = text.replace(str(folder), short) if len(str(folder)) > 1 else text
            return text

        for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
            for where, name in ((output, "text"), (output, "traceback"), (output.get("data", {}), "text/plain")):
                if name in where:
                    where[name] = clean(where[name])
        return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


class _Failed(Exception):
    """A notebook raised: the exception's name and text."""

    def __init__(self, name: str, text: str) -> None:
        self.disk = name == "DiskError"
        plain = not name or name in ("UserError", "DiskError")
        super().__init__(text if plain else f"{name}: {next(iter(text.strip().splitlines()), '')}")


# --- parameters -----------------------------------------------------------------------------------------------------


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated type such as `int`, `float`, `list[str]`, `dict[str, int]`."""
    found = re.fullmatch(r"(\w+)(?:\[(.*)\])?", kind.strip())
    if not found or found[1] in ("None", "Any"):  # not annotated
        return True
    name, inner = found[1], [part for part in re.split(r",\s*", found[2] or "") if part]
    if name == "list":
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value if inner)
    if name == "dict":
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items() if inner
        )
    return type(value).__name__ == name or (name == "float" and type(value) is int)


def _value(given: Any, kind: str) -> Any:
    """A text becomes the Python value that it spells, where it spells one and a text is not what is wanted."""
    if not isinstance(given, str):
        return given
    try:
        value = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(given.lower(), given)
    return value if isinstance(value, str) or kind != "str" else given


def check_parameters(study: Study, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{notebook: {name: value}} checked against the annotated parameters cells, as are the profile's own values.

    A value may be a text that spells it (`"[1, 2]"`). Raises UserError for an unknown notebook or parameter and for a
    value of another type, naming what would be right.
    """
    import papermill

    notebooks, known = {path.stem: path for path in study.notebooks()}, {}
    for where, table in ((f"profile {study.profile.name}", study.profile.notebooks), ("-p", given)):
        checked: dict[str, dict[str, Any]] = {}
        for notebook, values in table.items():
            if notebook not in notebooks:
                raise UserError(f"{where}: unknown notebook {notebook!r}; {nearest(notebook, notebooks)}")
            if notebook not in known:
                known[notebook] = papermill.inspect_notebook(str(notebooks[notebook]))
            free = known[notebook].keys() - {"profile", "output"}  # these two are psnb's own
            for name, value in values.items():
                if name not in free:
                    raise UserError(f"{where}: unknown parameter {notebook}.{name}; {nearest(name, free)}")
                kind = known[notebook][name]["inferred_type_name"]
                value = _value(value, kind)
                if not _fits(value, kind):
                    raise UserError(f"{where}: {notebook}.{name} wants {kind}, not {value!r}")
                checked.setdefault(notebook, {})[name] = value
    return checked


# --- a run ----------------------------------------------------------------------------------------------------------


def _forget(study: Study, only: str | None) -> None:
    """`--fresh`: the records of what is to be measured again go first, so that a killed run goes on with it."""
    names = {path.stem for path in study.notebooks()}
    for path in study.cache.glob("stages/*.json"):
        owner = path.stem if path.stem in names else _read_json(path).get("notebook", "")
        if only is None or owner in (only, ""):
            path.unlink()


def run(
    profile_: str | Profile = "embedded",
    only: str | None = None,
    fresh: bool = False,
    parameters: dict[str, dict[str, Any]] | None = None,
    output: str | Path = "",
) -> Path:
    """Runs a profile: all notebooks in order and the report, or `only` one stage. Returns the results' folder.

    `fresh` makes `only` again, or without it everything that is measured; it touches weights only where `only` names
    them. Raises UserError before any work for unknown names and values of the wrong type.
    """
    study = Study.open(profile_, output)
    if isinstance(profile_, str) and profile_.endswith(".toml"):
        study._loaded["profile"] = str(Path(profile_).resolve())
    if only is not None and only not in study.stages:
        raise UserError(f"unknown stage {only!r}; {nearest(only, study.stages)}")
    if not study.notebooks():
        raise UserError(f"no notebooks in {study.root / 'notebooks'}: run psnb inside the project's folder")
    given = check_parameters(study, parameters or {})
    notebooks = [path for path in study.notebooks() if only in (None, path.stem)]
    if fresh and (notebooks or only == "report"):
        _forget(study, only)
    if notebooks:
        words = ["psnb run", f"--profile {profile_ if isinstance(profile_, str) else profile_.name}"]
        words += [f"--only {only}"] * (only is not None) + ["--fresh"] * fresh
        words += [
            f"-p '{notebook}.{name}={value!r}'" for notebook, values in given.items() for name, value in values.items()
        ]
        study.manifest.start(
            profile=study.profile.name, title=study.profile.title, command=" ".join(words), seed=study.profile.seed,
            revision=manifest.revision(study.root), machine=manifest.machine(), dtype=study.profile.dtype,
            device=str(study.device), settings=dataclasses.asdict(study.profile), parameters=given,
        )  # fmt: skip
    began = time.monotonic()
    try:
        if notebooks:
            changed = [path.stem for path in notebooks if study.execute(path, given.get(path.stem, {}))]
            study.manifest.update(**study.facts(), executed=changed, seconds=round(time.monotonic() - began, 1))
            if only is None:
                report(study)
            study.manifest.finish("complete")
        elif only == "report":
            report(study)
        else:
            _make(study, only, fresh)
            study.manifest.update(**study.facts())
    except BaseException as error:
        with contextlib.suppress(UserError, OSError):  # a full disk: the first error is the one to tell
            if notebooks:
                text = "" if isinstance(error, KeyboardInterrupt) else str(error)
                study.manifest.finish("failed" if text else "interrupted", **study.facts(), error=text)
        raise
    return study.results


def _make(study: Study, stage: str, fresh: bool) -> None:
    """Makes one stage that is not a notebook, with what it needs."""
    if fresh:
        study.fresh |= {f"{stage}-{split}" for split in SPLITS} if stage in ("tokens", "rows") else {stage}
    if stage == "rows":
        for split in SPLITS:
            study.rows(split)
    elif stage in study.profile.drafters:
        study.drafter(stage)
    else:
        getattr(study, stage)()


def report(study: Study) -> Path:
    """Renders results/<profile>/report.html from the executed notebooks and the manifest.

    Raises UserError where a notebook has not been executed yet.
    """
    from psnb import report as rendering

    executed = [study._executed(path) for path in study.notebooks()]
    if missing := [path.stem for path in executed if not path.is_file()]:
        raise UserError(
            f"not run yet: {', '.join(missing)}; `psnb run --profile {study.profile.name}` runs what is missing"
        )
    facts = copy.deepcopy(study.manifest.read())
    path = study.results / "report.html"
    rendering.html(executed, facts, path)
    return path
