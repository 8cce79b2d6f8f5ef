"""Stages: what exists is reused, what is missing is made, nothing is left half-written.

    study = Study.open("embedded")
    target, drafter = study.target(), study.drafter("eagle-ps")
    frame = study.table("draft_times", {"ks": [1, 2, 4]}, lambda: measure.draft_times(...))

A *stage* is addressed by the hash of what it depends on:

    corpus, tokenizer, tokens, rows, prompts    folders in results/<profile>/.cache; the user's machine makes them
    target and the drafters                     folders in results/<profile>/checkpoints; they depend on the profile's
                                                text (and a drafter on its target's weights), never on the machine
    tables (measurements) and notebooks         files in results/<profile>; their records lie in .cache, so that what
                                                came with a clone never counts as measured here; its rows of the
                                                summary and its records in the manifest stay until they are run
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from psnb import manifest, profile
from psnb.errors import UserError
from psnb.manifest import digest, read_json, say
from psnb.profile import CHOICES, FREE, FitSpec, Profile, nearest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from psnb.drafters import Drafter
    from psnb.target import Target

DATA = ("corpus", "tokenizer", "tokens", "rows", "prompts")
SPLITS = ("train", "held_out")
TRAINED_ON = ("source", "split", "packages", "held_out", "vocab_size", "length")  # of [data]: what weights depend on
ANSWERED = ("responses", "prefix", "response_temperature", "response_rows")  # what drafters' weights depend on beside
MEASURING = (  # the sources that a measured number comes from
    *("joined.py", "target.py", "groups.py", "drafters/*.py", "cache.py", "tree.py", "verify.py", "decode.py"),
    *("engine.py", "measure.py", "cost.py"),
)
TOKENIZER_BYTES = 60_000_000  # of text that a tokenizer is trained on
CHATS = (".jsonl", ".jsonl.xz")  # files of chats; any other source is a hub data set
STAND_INS = {  # for a file of [data] that is not there
    "source": 'let data.source name another .jsonl[.xz] file of {"messages": ...} or a hub data set',
    "validation": "drop data.validation: a share of data.source is then held out",
    "questions": "drop data.questions: prompts are then cut from held-out text",
}
FORMAT = "format.json"  # in the cache: whether this machine's CPU is faster in bfloat16
HELD_ROWS = 256  # held-out rows that are judged while training
MANY_CHATS = 20_000  # that are tokenised in several processes
FEW = 500  # chats of a part of them at least: a part without any that can be used is refused


def project() -> Path:
    """The folder with `notebooks/` and `psnb/`: the nearest parent of the working directory, else the package's own."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "psnb").is_dir():
            return folder
    return Path.cwd()


def code(*patterns: str) -> str:
    """Hash of the package's own sources that match."""
    folder = Path(__file__).parent
    return digest([manifest.sha256_file(p) for pattern in patterns for p in sorted(folder.glob(pattern))])


def _seen(spec: Any) -> dict[str, Any]:
    """A target's or drafter's spec without what changes nothing in the weights."""
    found = manifest.plain(spec)
    if "train" in found:
        found["train"] = {k: v for k, v in found["train"].items() if k not in FREE}
    return found


def _difference(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted names at which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in sorted({*old, *new}) for d in _difference(old.get(k), new.get(k), f"{where}.{k}".strip("."))]
    return [] if old == new else [where]


@functools.cache
def _sha256(path: Path, changed: int) -> str:
    """A file's hash, taken once as long as it is not changed."""
    return manifest.sha256_file(path)


def _hash(path: Path) -> str:
    return _sha256(path, path.stat().st_mtime_ns) if path.is_file() else ""


def _weights(folder: Path) -> dict[str, str]:
    return {p.name: manifest.sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}


def _tracked(folder: Path) -> bool:
    """Whether git has weights in that folder; False outside git."""
    words = ["git", "-C", str(folder), "ls-files", "--", "*.safetensors"]
    try:
        return bool(subprocess.run(words, capture_output=True).stdout)
    except OSError:  # no git here
        return False


def stage_facts(folder: Path) -> dict[str, Any]:
    """`stage.json` of a folder that a stage made; empty if there is none."""
    return read_json(folder / "stage.json")


@dataclass
class Study:
    """One profile's artefacts below one output folder."""

    profile: Profile
    root: Path  # the project: notebooks, constraints, shipped checkpoints
    output: Path
    fresh: set[str] = field(default_factory=set)  # stages to make again, each once
    launch: Callable[[str, Path], None] | None = None  # trains a model into a folder elsewhere (see runner.train)
    asked: str = ""  # the profile as it was named: its name, or a .toml file
    quiet: bool = False  # of what is reused: another process has told
    origin: Study | None = None  # of `computing_in`: the study as its profile has it, which trains
    _loaded: dict[str, Any] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _making: list[str] = field(default_factory=lambda: [os.environ.get("PSNB_NOTEBOOK", "")])  # outermost first

    @classmethod
    def open(cls, profile_: str | Profile = "embedded", output: str | Path = "", fresh: Iterable[str] = ()) -> Study:
        """A study of a profile (by name, by the path of a TOML file, or as it is).

        `output` is the folder that gets `results/` and `figures/`; empty, the project's. `fresh` names stages to make
        again. Raises UserError for an unknown profile, and for an output that is no folder.
        """
        chosen = profile_ if isinstance(profile_, Profile) else profile.load(str(profile_))
        root = project()
        if Path(output).is_file():
            raise UserError(f"--output {output}: a file; give a folder")
        where = Path(output).resolve() if str(output) else root
        return cls(chosen, root, where, set(fresh), asked=chosen.name if profile_ is chosen else str(profile_))

    def command(self, words: str) -> str:
        """The command line of `psnb` that does this to this very study."""
        more = f" --output {shlex.quote(str(self.output))}" if self.output != self.root else ""
        return f"`psnb {words.replace('PROFILE', f'--profile {shlex.quote(self.asked)}')}{more}`"

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
    def notebooks(self) -> dict[str, Path]:
        """All source notebooks of the project by name, in order."""
        return {path.stem: path for path in sorted((self.root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}

    @property
    def device(self) -> torch.device:
        import torch

        name, there = self.profile.device, torch.cuda.is_available()
        if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(
                f"profile {self.profile.name}: device {name!r}, but PyTorch sees {count} GPUs; set auto or cpu"
            )
        return torch.device(("cuda" if there else "cpu") if name == "auto" else name)

    def computing_in(self, dtype: str) -> Study:
        """This study in that number format."""
        if dtype == self.profile.dtype:
            return self
        profile = dataclasses.replace(self.profile, dtype=dtype)
        return dataclasses.replace(self, profile=profile, origin=self.origin or self, _loaded={})

    def fastest(self) -> Study:
        """This study in the number format that its machine is fastest in, on a CPU by measurement.

        For timing. Losslessness is checked in the profile's own format: bfloat16 rounds differently in passes of
        different lengths. A CPU is asked once, so that all notebooks of a study are timed in one format.
        """
        import torch

        from psnb.joined import bfloat16_pays

        if self.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            sizes = self.sizes()[:3]
            key = digest([*sizes, torch.__version__, manifest.machine_name(manifest.machine())])
            found = read_json(self.cache / FORMAT)
            if found.get("key") != key:
                found = {"key": key, "bfloat16": bfloat16_pays(*sizes)}
                manifest.write_json(self.cache / FORMAT, found)
            fast = found["bfloat16"]
        return self.computing_in("bfloat16") if fast else self

    def sizes(self) -> tuple[int, int, int, int]:
        """Width, inner width, layers and vocabulary of the target: of a model that is loaded its own, if it tells."""
        shape = self.profile.target
        if shape.path:
            from transformers import AutoConfig

            with contextlib.suppress(OSError, ValueError, UserError, AttributeError):
                of = AutoConfig.from_pretrained(self._path())
                inner = getattr(of, "intermediate_size", None) or 4 * of.hidden_size
                return of.hidden_size, inner, of.num_hidden_layers, of.vocab_size
        return shape.hidden_size, shape.intermediate_size, shape.layers, self.profile.data.vocab_size

    def for_training(self) -> Study:
        """This study in the number format that drafters are trained in: on a CPU float32, with no autocast there."""
        return self if self.device.type == "cuda" else self.computing_in("float32")

    # --- the machinery of stages --------------------------------------------------------------------------------

    def once(self, stage: str, text: str) -> None:
        """One line a stage, however often it is asked for."""
        if stage not in self._said and not self.quiet:
            self._said.add(stage)
            say(f"{stage}: {text}")

    def _data(self, stage: str, depends: Any, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The cached folder of a data stage: as it is if it was made from the same, else made anew."""
        key, about = digest(depends), self.made(stage)
        if about.get("key") == key and stage not in self.fresh:
            self.once(stage, f"reused ({about['at']}, took {about['seconds']:.0f} s)")
            return self.cache / stage
        return self._make(stage, self.cache / stage, key, make, "making it")

    def made(self, stage: str) -> dict[str, Any]:
        """What stage.json says of a data stage; empty if it was not made yet."""
        return stage_facts(self.cache / stage)

    def _make(self, stage: str, folder: Path, key: str, make: Callable[[Path], dict[str, Any]], why: str) -> Path:
        """`make(temporary)` fills a folder and returns facts for stage.json; then it takes the place of `folder`."""
        say(f"{stage}: {why}")
        self._said.add(stage)
        began, within = time.monotonic(), self._making[-1]
        self._making.append(stage)
        try:
            with manifest.atomic_folder(folder) as temporary:
                facts = make(temporary)
                about = {"key": key, "at": manifest.now(), "seconds": round(time.monotonic() - began, 2), **facts}
                about |= {"within": within} if within else {}  # whose seconds include these
                manifest.write_json(temporary / "stage.json", about)
        finally:
            self._making.pop()
        self.fresh.discard(stage)
        say(f"{stage}: done in {about['seconds']:.0f} s")
        return folder

    def record(self, stage: str) -> Path:
        return self.cache / "stages" / f"{stage}.json"

    def _inputs(self) -> dict[str, str]:
        """What measurements stand on, as it is now: checkpoint -> hash of its weights, and the prompts'."""
        weights = {name: stage_facts(self.checkpoint(name)).get("weights") for name in self.profile.drafters}
        found = {name: digest(value) for name, value in weights.items() if value}
        found |= {"target": self._target_id(), "prompts": self.made("prompts").get("sha256", "")}
        return {name: value for name, value in found.items() if value}

    def current(self, stage: str, key: str, artefact: Path, quiet: bool = False) -> dict[str, Any]:
        """The record of a table or notebook that can be reused, else empty.

        It can if its key is the same, its inputs (those it had) and this machine are, and its file and those that it
        used (see `uses`) are as they were.
        """
        record, now = read_json(self.record(stage)), self._inputs()
        if (
            record.get("key") != key
            or stage in self.fresh
            or any(now.get(name) != value for name, value in record["inputs"].items())
            or not artefact.is_file()
            or manifest.sha256_file(artefact) != record["sha256"]
            or any(_hash(self.results / name) != value for name, value in record.get("files", {}).items())
            or record["machine"] != manifest.machine_name(self.machine)
        ):
            return {}
        if not quiet:
            self.once(stage, f"reused ({record['at']}, took {record['seconds']:.0f} s)")
        return record

    def uses(self, path: Path) -> Path:
        """Notes that the notebook that runs stands on this file of the results, as it is when the notebook ends."""
        if name := os.environ.get("PSNB_NOTEBOOK", ""):
            noted = self.cache / "uses" / f"{name}.json"
            files = {**read_json(noted), os.path.relpath(path, self.results): ""}
            manifest.write_json(noted, files)
        return path

    def used(self, name: str) -> dict[str, str]:
        """The files that a notebook noted, with their hashes now; the notes go."""
        noted = self.cache / "uses" / f"{name}.json"
        files = {file: _hash(self.results / file) for file in read_json(noted)}
        noted.unlink(missing_ok=True)
        return files

    def done(self, stage: str, key: str, artefact: Path, began: float, **facts: Any) -> dict[str, Any]:
        """Writes the record of a table or notebook that was made since `began` (time.monotonic)."""
        record = {
            "key": key,
            "at": manifest.now(),
            "seconds": round(time.monotonic() - began, 2),
            "machine": manifest.machine_name(self.machine),
            "text": digest(self.text()),
            "inputs": self._inputs(),
            "sha256": manifest.sha256_file(artefact),
            **facts,
        }
        manifest.write_json(self.record(stage), record)
        self.fresh.discard(stage)
        say(f"{stage}: done in {record['seconds']:.0f} s")
        return record

    def text(self) -> dict[str, Any]:
        """What every measurement depends on: the profile but its title, notebooks and what changes no weights, and the
        pins, Python and PyTorch."""
        text = {k: v for k, v in dataclasses.asdict(self.profile).items() if k in ("seed", "device", "dtype", "data")}
        models = {"target": self.profile.target, **self.profile.drafters}
        text |= {"models": {name: _seen(spec) for name, spec in models.items()}}
        text |= {"constraints": manifest.sha256_file(self.root / "constraints.txt"), "python": sys.version}
        return {**text, "torch": importlib.metadata.version("torch")}

    def make(self, stage: str) -> None:
        """Makes a data stage or a model, with what it needs, unless it is there."""
        if stage == "rows":
            self._training_rows()
        elif stage in self.profile.drafters:
            self.drafter(stage)
        else:
            getattr(self, stage)()

    # --- data -----------------------------------------------------------------------------------------------------

    def check_files(self, stage: str = "", models: Sequence[str] = ()) -> None:
        """Refuses before any work what would fail for a missing file of [data].

        Of a whole run, one `stage` of it, or what decodes with these `models`. Data stages look at their files
        themselves, and a report reads none. Raises UserError.
        """
        if stage in DATA or stage.endswith("report"):
            return
        asks = stage not in self.models
        wanted = (models or self.models) if asks else [stage]
        made = all(self.ready(name) for name in wanted if name != "target" or not self.profile.target.path)
        if not made or (asks and not self.profile.data.questions):
            self._need("source", "validation")
        if asks:
            self._need("questions")

    def _need(self, *keys: str) -> None:
        """Raises UserError for the first local file of these keys of [data] that is not there."""
        spec = self.profile.data
        for key in keys:
            for name in spec.sources if key == "source" else filter(None, [getattr(spec, key)]):
                if (key == "questions" or name.endswith(CHATS)) and not (path := self.root / name).is_file():
                    where = f"profile {self.profile.name}: data.{key}: no such file {path.resolve()}"
                    raise UserError(f"{where}; put it there, or {STAND_INS[key]}")

    def corpus(self) -> DatasetDict:
        """Documents or chats in splits `train` and `held_out`, memory-mapped.

        Of code, results/<profile>/corpus.csv lists every file with its sha256.
        """
        from datasets import load_from_disk

        if "corpus" in self._loaded and "corpus" not in self.fresh:
            return self._loaded["corpus"]
        spec = self.profile.data
        depends: list[Any] = [spec.source, spec.split, spec.packages, spec.held_out, self.profile.seed]
        if spec.source == "code":
            installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
            depends += [manifest.sha256_file(self.root / "constraints.txt"), sys.version, installed]
        else:
            depends += list(self._chat_files().values())
        make = self._code_corpus if spec.source == "code" else self._chat_corpus
        self._loaded["corpus"] = load_from_disk(self._data("corpus", depends, make))
        return self._loaded["corpus"]

    def _code_corpus(self, folder: Path) -> dict[str, Any]:
        from packaging.utils import canonicalize_name

        from psnb import data

        spec = self.profile.data
        files = data.environment_files(self.root / "constraints.txt")
        mismatched = dict(files.attrs["mismatched"])
        if spec.packages:
            wanted = {canonicalize_name(name) for name in (*spec.packages, *spec.held_out)}
            for name in sorted(wanted - set(files.package)):
                cure = nearest(name, set(files.package))
                raise UserError(
                    f"profile {self.profile.name}: package {name!r} is not in the pinned environment; {cure}"
                )
            files = files[files.package.isin(wanted)]
        corpus = data.code_corpus(files, held_out=spec.held_out)
        corpus.save_to_disk(folder)
        listed = data.corpus_manifest(corpus)
        manifest.write_frame(self.results / "corpus.csv", listed)
        return {
            "documents": {name: len(split) for name, split in corpus.items()},
            "bytes": {name: int(listed.bytes[listed.split == name].sum()) for name in corpus},
            "sha256": {name: digest(sorted(listed.sha256[listed.split == name])) for name in corpus},
            "mismatched": mismatched,
        }

    def _chat_files(self) -> dict[str, str]:
        """Of the chats' sources and the validation file, as the profile names them, those that are here: sha256."""
        spec = self.profile.data
        files = {name: self.root / name for name in (*spec.sources, spec.validation) if name}
        return {name: _hash(path) for name, path in files.items() if path.is_file()}

    def _chat_corpus(self, folder: Path) -> dict[str, Any]:
        from datasets import DatasetDict, concatenate_datasets, load_from_disk

        from psnb import data

        self._need("source", "validation")
        spec, seed, facts, parts = self.profile.data, self.profile.seed, Counter(), []
        seen: set[int] = set()  # what is held out is not trained on, nor anything twice
        for source in (*filter(None, [spec.validation]), *spec.sources):
            is_file = source.endswith(CHATS)
            records, counts = data.load_records(str(self.root / source) if is_file else source, spec.split, seen)
            facts.update(counts)
            parts.append(records)
        held_out = parts.pop(0) if spec.validation else None
        train = concatenate_datasets(parts)
        if len(train) < (1 if spec.validation else 2):
            what = "that is not held out" if spec.validation else "and no validation file"
            raise UserError(f"{spec.source}: {len(train)} different records {what}; give more")
        if spec.validation:
            corpus = DatasetDict(train=train.shuffle(seed), held_out=held_out)
        else:
            corpus = train.train_test_split(test_size=0.05, seed=seed)  # it shuffles
            corpus["held_out"] = corpus.pop("test")
        corpus.save_to_disk(folder)
        corpus = load_from_disk(folder)  # in its order: hashing need not gather it once more
        return {
            "documents": {name: len(split) for name, split in corpus.items()},
            "sha256": {name: data.chats_sha256(split) for name, split in corpus.items()} | self._chat_files(),
            **facts,
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's own tokenizer, or one trained on the corpus where the target is still to be trained."""
        from transformers import AutoTokenizer

        spec, path = self.profile.data, self._path()
        if not path and self.ready("target"):
            path = str(self.checkpoint("target"))
        if not path:
            self.corpus()
            depends = [self.made("corpus")["sha256"]["train"], spec.source, spec.vocab_size]
            path = str(self._data("tokenizer", depends, self._train_tokenizer))
        tokenizer = self._load("target", lambda: AutoTokenizer.from_pretrained(path))
        tokenizer.chat_template = self.profile.target.chat_template or tokenizer.chat_template
        return tokenizer

    def _train_tokenizer(self, folder: Path) -> dict[str, Any]:
        from psnb import data

        spec = self.profile.data
        tokenizer = data.train_tokenizer(data.sample_texts(self.corpus()["train"], TOKENIZER_BYTES), spec.vocab_size)
        if spec.source != "code":
            tokenizer.chat_template = data.CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        return {"vocab_size": spec.vocab_size}

    def tokens(self) -> DatasetDict:
        """The corpus tokenised: `input_ids` (and `loss_mask` for chats) a document."""
        from datasets import DatasetDict

        return DatasetDict({split: self._tokens(split) for split in SPLITS})

    def _some(self, split: str, documents: int) -> str:
        """The name of a split, or of a sample of it."""
        return f"{split}-{documents}" if documents else split

    def _tokens(self, split: str, documents: int = 0) -> Dataset:
        from datasets import concatenate_datasets, load_from_disk

        from psnb import data

        texts, tokenizer, name = self.corpus()[split], self.tokenizer(), self._some(split, documents)
        depends: list[Any] = [self.made("corpus")["sha256"][split], documents, self._tokenizer_id(tokenizer)]
        chats = self.profile.data.source != "code"
        if chats:
            depends.append(self.profile.data.length)  # where chats are cut

        def make(folder: Path) -> dict[str, Any]:
            order = np.random.default_rng(self.profile.seed).permutation(len(texts))
            some = texts.select(sorted(order[:documents])) if documents else texts
            workers = min(32, manifest.cores()) if chats and len(some) > MANY_CHATS else None
            shards = min(2 if workers else 20, max(1, len(some) // FEW)) if chats else min(20, len(some))
            parts, facts = [], Counter()
            for i in manifest.progress(range(shards), label=f"tokens of {name}, part"):
                shard = some.shard(shards, i, contiguous=True)
                if chats:
                    part, dropped = data.tokenize_chat(shard, tokenizer, self.profile.data.length, workers)
                    facts.update(dropped)
                else:
                    part = data.tokenize(shard, tokenizer)
                parts.append(part)
            if any(facts.values()):
                cut, refused, silent = (f"{facts[kind]:,}" for kind in ("cut", "refused", "silent"))
                say(
                    f"tokens of {name}: {cut} chats cut at {self.profile.data.length} tokens; dropped: {refused} that "
                    f"the template refuses, {silent} with nothing to train on"
                )
            tokens = concatenate_datasets(parts)
            tokens.save_to_disk(folder)
            texts.cleanup_cache_files()
            return {"documents": len(tokens), **facts}

        return load_from_disk(self._data(f"tokens-{name}", depends, make))

    def _tokenizer_id(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return digest([tokenizer.get_vocab(), tokenizer.chat_template])

    def rows(self, split: str, documents: int = 0) -> Dataset:
        """Packed training rows of `data.length` tokens of a split (`train` or `held_out`).

        With `documents` of a fixed sample of so many documents: for demonstrations that need not tokenise everything.
        """
        from datasets import load_from_disk

        from psnb import data

        tokens, length, name = self._tokens(split, documents), self.profile.data.length, self._some(split, documents)

        def make(folder: Path) -> dict[str, Any]:
            rows = data.pack(tokens, length)
            rows.save_to_disk(folder)
            return {"rows": len(rows), "tokens": len(rows) * length}

        return load_from_disk(self._data(f"rows-{name}", [self.made(f"tokens-{name}")["key"], length], make))

    def prompts(self) -> Dataset:
        """The evaluation prompts: of a file of questions, else cut from held-out code or chats (see `prompts`).

        With chats, `data.held_out` adds a task `code` from these packages of the environment.
        Where they are not those of the profile's sha256, a warning goes to log, manifest and report.
        """
        from datasets import concatenate_datasets, load_from_disk

        from psnb import data, prompts

        self._need("questions")
        spec, tokenizer = self.profile.data, self.tokenizer()
        depends: list[Any] = [self._tokenizer_id(tokenizer), (spec.prompts_per_family, spec.max_prompt_tokens)]
        if spec.questions:
            file = self.root / spec.questions
            depends.insert(0, manifest.sha256_file(file))
        else:
            held_out = self.corpus()["held_out"]
            depends.insert(0, self.made("corpus")["sha256"]["held_out"])
        task = spec.held_out if spec.source != "code" else []
        if task:
            installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
            depends.insert(0, [task, manifest.sha256_file(self.root / "constraints.txt"), sys.version, installed])

        def make(folder: Path) -> dict[str, Any]:
            facts: dict[str, int] = {}
            if spec.questions:
                made, facts = prompts.question_prompts(file, tokenizer, *depends[-1])
            elif spec.source == "code":
                made = prompts.code_prompts(held_out, tokenizer, *depends[-1])
            else:
                made, facts = prompts.chat_prompts(held_out, tokenizer, *depends[-1])
            if task:
                if "code" in made["family"]:
                    raise UserError(f"{spec.questions}: category 'code' is what held-out code is called; rename it")
                files = data.environment_files(self.root / "constraints.txt")
                code = data.code_corpus(files, task, train=False)["held_out"]
                made = concatenate_datasets([made, prompts.code_task(code, tokenizer, *depends[-1])])
            made.save_to_disk(folder)
            return {"prompts": len(made), "sha256": prompts.prompts_sha256(made), **facts}

        folder = self._data("prompts", depends, make)
        if warning := self._prompts_warning():
            self.once("warning", warning)
        return load_from_disk(folder)

    def _prompts_warning(self) -> str:
        expected, got = self.profile.data.prompts_sha256, self.made("prompts").get("sha256", "")
        if not expected or not got or expected == got:
            return ""
        return (
            f"the prompts differ from the profile's (sha256 {got[:12]}, not {expected[:12]}): an evaluation package "
            "has another version than constraints.txt pins, so the numbers cannot be compared with published ones"
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """The target and the drafters: the names of checkpoints."""
        return ["target", *self.profile.drafters]

    def chosen(self, methods: Sequence[str] = ()) -> list[str]:
        """Of these drafters those that the profile has, of a kind's own name perhaps none; all where none is left.

        Raises UserError for any other name.
        """
        there = list(self.profile.drafters)
        for name in methods:
            if name not in there and name not in CHOICES["kind"]:
                raise UserError(f"profile {self.profile.name} has no drafter {name!r}; {nearest(name, there)}")
        return [name for name in methods if name in there] or there

    def checkpoint(self, name: str) -> Path:
        """The folder of a model's weights: below the output folder if it is there, else as shipped."""
        own, shipped = (p / "results" / self.profile.name / "checkpoints" / name for p in (self.output, self.root))
        return shipped if shipped.is_dir() and not own.is_dir() else own

    def _spec(self, name: str) -> dict[str, Any]:
        """What a checkpoint's weights depend on; its hash is the stage's key."""
        seen = TRAINED_ON if name == "target" or self.profile.data.responses == "corpus" else TRAINED_ON + ANSWERED
        if self.profile.data.validation:
            seen += ("validation",)
        data = {k: v for k, v in manifest.plain(self.profile.data).items() if k in seen}
        common = {"seed": self.profile.seed, "data": data}
        if name == "target":
            return {**common, "target": _seen(self.profile.target)}
        spec = self.profile.drafters[name]
        warm = digest(self._spec(spec.warm_start)) if spec.warm_start else ""
        words = {"chat_template": own} if (own := self.profile.target.chat_template) else {}
        return {**common, **words, "drafter": _seen(spec), "target": self._target_id(), "warm_start": warm}

    def _path(self) -> str:
        """The profile's target.path, a folder's from the project's folder (or from the one we are in).

        Raises UserError where it means a folder and there is none: no hub has it.
        """
        path = self.profile.target.path
        if path and (here := self.root / path).is_dir():
            return str(here)
        means_folder = path.startswith((".", "/", "~", "results/")) or ("/" in path and here.parent.is_dir())
        if means_folder and not Path(path).is_dir():
            raise UserError(
                f"profile {self.profile.name}: target.path = {path!r}: no such folder ({here.resolve()}); "
                "give an existing one, or the name of a model on the hub"
            )
        return path

    def _target_id(self) -> str:
        """Hash of the target's weights, empty if it has none yet; of a hub model its name and commit."""
        path = self._path()
        if not path:
            weights = stage_facts(self.checkpoint("target")).get("weights")
            return digest(weights) if weights else ""
        if "target_id" not in self._loaded:
            from transformers import AutoConfig

            try:
                if Path(path).is_dir():
                    kinds = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer_config.json")
                    files = [p for kind in kinds for p in Path(path).glob(kind)]
                    own = digest({p.name: manifest.sha256_file(p) for p in files})
                else:
                    own = AutoConfig.from_pretrained(path)._commit_hash
            except (OSError, ValueError) as error:
                why = str(error).strip().splitlines()[0]
                raise UserError(
                    f"target.path = {path!r} is no folder, and cannot be fetched from the hub: {why}; give an existing "
                    f"folder, or `hf download {path}` while there is a network and set HF_HUB_OFFLINE=1 without one"
                ) from error
            self._loaded["target_id"] = f"{self.profile.target.path}@{own}"
        return self._loaded["target_id"]

    def ready(self, name: str) -> bool:
        """Whether a checkpoint is there for this very profile (what is in its weights is not looked at)."""
        about = stage_facts(self.checkpoint(name))
        same = about.get("key") == digest(self._spec(name)) and not self._other_text(about)
        return name not in self.fresh and same and not self.recorded_only(name)

    def _other_text(self, about: dict[str, Any]) -> list[str]:
        """Files of chats, of those that are here, whose change since makes it another text that weights would learn.

        Nothing is trained on the validation file, but what it holds is taken out of the training text.
        """
        spec, then, now = self.profile.data, about.get("corpus", {}), self._chat_files()
        changed = [name for name in now if now[name] != then.get(name, now[name])]
        if changed == [spec.validation] and now.keys() >= set(spec.sources):
            self.corpus()
            return changed if self.made("corpus")["sha256"]["train"] != then["train"] else []
        return [name for name in changed if name in spec.sources]

    def recorded_only(self, name: str) -> bool:
        """Whether a checkpoint is a record without weights, as in a clone of a run whose weights were not published.

        Weights that git has count as lost, not as never there.
        """
        folder = self.checkpoint(name)
        files = [folder / file for file in stage_facts(folder).get("weights", {})]
        return bool(files) and not any(file.exists() for file in files) and not _tracked(folder)

    def _cure(self, name: str) -> str:
        folder, again = self.checkpoint(name), self.command(f"run PROFILE --only {name} --fresh")
        if folder.is_relative_to(self.root) and _tracked(folder):
            return (
                f"`git checkout -- {folder.relative_to(self.root)}` brings a shipped one back, {again} trains it again"
            )
        return f"{again} trains it again"

    def _trained(self, name: str) -> Path:
        """The checkpoint's folder: as it is if its key fits and its weights are here, else trained.

        Raises UserError for a damaged one: nothing is trained again that nobody asked for.
        """
        folder, spec = self.checkpoint(name), self._spec(name)
        about = stage_facts(folder)
        if name in self.fresh:
            why = "training again, as asked"
        elif not folder.is_dir():
            why = "training"
        elif not {"key", "spec", "weights", "machine", "seconds", "at"} <= about.keys():
            raise UserError(f"{folder / 'stage.json'}: missing or damaged; {self._cure(name)}")
        elif self.recorded_only(name):
            why = "training again, for its weights are not here"
        elif about["key"] != digest(spec):
            why = f"training again, for the profile changed ({', '.join(_difference(about['spec'], spec))})"
        elif changed := self._other_text(about):
            why = f"training again, for its text changed ({', '.join(changed)})"
        else:
            found = _weights(folder)
            for file in (file for file, sha256 in about["weights"].items() if found.get(file) != sha256):
                what = "damaged (its sha256 is not the recorded one)" if file in found else "missing"
                raise UserError(f"{folder / file}: {what}; {self._cure(name)}")
            self.once(name, f"reused (trained {about['at'][:10]} on {about['machine']} in {about['seconds']:.0f} s)")
            return folder

        budget = self.profile.drafters[name].train if name != "target" else self.profile.target.train
        if budget is None:
            raise UserError(f"profile {self.profile.name}: {name} has no training budget: set its `train`")
        final = self.results / "checkpoints" / name
        if other := manifest.written_elsewhere(final):  # both would save their state in one folder
            raise UserError(
                f"{name}: another process trains it in {self.results}; wait for it, or choose another folder with "
                f"--output (if none does, delete {other})"
            )
        if name in self.fresh:
            shutil.rmtree(self._state(name), ignore_errors=True)  # from the first step on

        def made(temporary: Path) -> dict[str, Any]:
            self._training_rows(name)  # made here once, whoever trains
            (self.launch or self.fit_into)(name, temporary)
            return self._seal(temporary, name)

        self._make(name, final, digest(spec), made, f"{why} on {self.device}")
        shutil.rmtree(self._state(name), ignore_errors=True)
        return final

    def _state(self, name: str) -> Path:
        """Where a training saves what it needs to go on after a kill."""
        return self.cache / "training" / f"{name}-{digest(self._spec(name))[:16]}"

    def fit_into(self, name: str, folder: Path) -> None:
        """Trains a model's weights into `folder`, in this process or as one of several that a launcher started.

        What it depends on has to be there, or is made first. Raises UserError.
        """
        from psnb import target
        from psnb.train import train_drafter

        how: dict[str, Any] = {"seed": self.profile.seed, "device": self.device, "state": self._state(name)}
        spec = self.profile.drafters.get(name, self.profile.target)
        how["log"] = self._log(name, spec.train)
        if name == "target":
            target.train(spec, self.tokenizer(), *self._training_rows(), folder, **how)
            return
        if spec.warm_start:
            how["warm_start_from"] = self.checkpoint(spec.warm_start)
        train_drafter(spec, self.for_training().target(), *self._training_rows(name), folder, **how)

    def _seal(self, folder: Path, name: str) -> dict[str, Any]:
        """What stage.json says of weights beside key, time and seconds."""
        machine = self.about()["machine"]
        return {
            "spec": self._spec(name),
            "weights": _weights(folder),
            "revision": self.about()["revision"],
            "machine": manifest.machine_name(machine),
            "python": machine["python"],
            "versions": machine["versions"],
            "corpus": self.made("corpus").get("sha256", {}),
        }

    def seal(self, name: str, seconds: float = 0.0) -> None:
        """Declares the weights in a checkpoint's folder to be this profile's `name`, however they came to be there."""
        facts = {"key": digest(self._spec(name)), "at": manifest.now(), "seconds": seconds}
        manifest.write_json(self.checkpoint(name) / "stage.json", {**facts, **self._seal(self.checkpoint(name), name)})

    def _log(self, name: str, budget: FitSpec | None) -> Callable[[dict[str, Any]], None]:
        """Prints the loss every few seconds, and every held-out value."""
        last, steps = [0.0], budget.steps if budget else 0

        def log(row: dict[str, Any]) -> None:
            due = row["step"] == steps or time.monotonic() - last[0] > manifest.EVERY
            if row["metric"] == "heldout_nats" or (row["metric"] == "loss" and due):
                last[0] = time.monotonic()
                say(f"{name}: step {row['step']} of {steps}, {row['metric']} {row['value']:.3f}")

        return log

    def _training_rows(self, name: str = "target") -> tuple[Dataset, Dataset]:
        """(train, a fixed sample of held_out); for a drafter in the target's words where the profile says so."""
        held_out = self.rows("held_out")
        some = np.random.default_rng(self.profile.seed).permutation(len(held_out))[:HELD_ROWS]
        train, held_out = self.rows("train"), held_out.select(some)
        if name == "target" or self.profile.data.responses == "corpus":
            return train, held_out
        return self._responses("train", train), self._responses("held_out", held_out)

    def _responses(self, split: str, rows: Dataset) -> Dataset:
        """The rows as the target goes on from their prompts."""
        from datasets import load_from_disk

        from psnb import respond

        spec, seed, target = self.profile.data, self.profile.seed, self.target()
        if 0 < spec.response_rows < len(rows):
            rows = rows.select(np.random.default_rng(seed).permutation(len(rows))[: spec.response_rows])
        seed += SPLITS.index(split)

        def make(folder: Path) -> dict[str, Any]:
            made = respond.respond(
                target, rows, spec.prefix, spec.response_temperature, seed, spec.response_batch, spec.response_graph
            )
            made.save_to_disk(folder)
            written = int(np.sum(made.with_format("numpy")["loss_mask"][:]))
            return {"rows": len(made), "tokens": len(made) * spec.length, "written": written}

        values = [getattr(spec, field) for field in ANSWERED]
        depends = [self.made(f"rows-{split}")["key"], self._target_id(), values, seed, self.profile.dtype]
        return load_from_disk(self._data(f"responses-{split}", depends, make))

    def target(self) -> Target:
        """The frozen target: the profile's model, or the checkpoint, trained first if there is none.

        Raises UserError for a checkpoint that does not load.
        """
        import torch

        from psnb import target

        if "target" not in self._loaded or "target" in self.fresh:
            path = self._path() or self._trained("target")
            dtype = getattr(torch, self.profile.dtype)
            self._loaded["target"] = self._load("target", lambda: target.load(path, dtype=dtype, device=self.device))
        return self._loaded["target"]

    def drafter(self, name: str) -> Drafter:
        """A drafter of the profile, trained first if there is no checkpoint.

        Raises UserError for an unknown name and for a checkpoint that does not load.
        """
        from psnb import drafters

        if name not in self.profile.drafters:
            raise UserError(f"unknown drafter {name!r}; {nearest(name, self.profile.drafters)}")
        spec, target = self.profile.drafters[name], self.target()

        if name not in self._loaded or name in self.fresh:
            if spec.warm_start and not self.ready(name):
                self.drafter(spec.warm_start)
            folder = (self.origin or self)._trained(name)  # in the profile's own format, whoever asks
            self._loaded[name] = self._load(name, lambda: drafters.load(folder, target))
        return self._loaded[name]

    def _load(self, name: str, load: Callable[[], Any]) -> Any:
        """`load()`; whatever a damaged checkpoint makes of itself becomes a UserError with its cure."""
        try:
            return load()
        except Exception as error:
            if name == "target" and self.profile.target.path:
                raise
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            what = first if isinstance(error, UserError) else f"{self.checkpoint(name)} does not load ({first})"
            raise UserError(f"{what}: {self._cure(name)}") from error

    # --- measurements ---------------------------------------------------------------------------------------------

    def table(self, name: str, spec: dict[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A measurement: results/<profile>/<name>.csv, made by `make()` unless this machine has it already.

        `spec` is what it depends on beside the profile's text, the weights, the prompts and the measuring code.
        The frame comes back as the file has it. Raises TypeError for a `spec` that is not plain JSON.
        """
        path = self.uses(self.results / f"{name}.csv")
        key = digest([name, spec, self.text(), str(self.device), code(*MEASURING)])
        record = self.current(name, key, path)
        if not record:
            say(f"{name}: measuring")
            began = time.monotonic()
            frame = make()
            manifest.write_frame(path, frame)
            texts = [column for column in frame if not pd.api.types.is_numeric_dtype(frame[column])]
            record = self.done(name, key, path, began, texts=texts, notebook=os.environ.get("PSNB_NOTEBOOK", ""))
        numbers = {c: [""] for c in pd.read_csv(path, nrows=0) if c not in record["texts"]}
        return pd.read_csv(path, dtype=dict.fromkeys(record["texts"], str), keep_default_na=False, na_values=numbers)

    def measured(self, name: str, profile: str = "") -> pd.DataFrame:
        """A table that was measured before, by this profile or another. Raises UserError where there is none."""
        path = self.uses(self.results.parent / (profile or self.profile.name) / f"{name}.csv")
        if not path.is_file():
            how = self.command(f"run --profile {profile}" if profile else "run PROFILE")
            raise UserError(f"{path}: not there; {how} measures it")
        return pd.read_csv(path, keep_default_na=False)

    def training(self) -> pd.DataFrame:
        """All rows that trainings wrote: stage, step, tokens, metric, value."""
        files = {name: self.checkpoint(name) / "training.csv" for name in self.models}
        frames = [pd.read_csv(path).assign(stage=name) for name, path in files.items() if path.is_file()]
        columns = ["stage", "step", "tokens", "metric", "value"]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def summary(self, stage: str, rows: pd.DataFrame) -> None:
        """Replaces a stage's rows in results/<profile>/summary.csv; rows of notebooks that the profile lacks go.

        Raises UserError for other columns than DESIGN's.
        """
        from psnb.measure import COLUMNS

        if wrong := sorted(set(COLUMNS) ^ set(rows.columns)):
            raise UserError(f"summary of {stage}: columns missing or surplus: {', '.join(wrong)}")
        path, texts = self.results / "summary.csv", {"dtype": str, "keep_default_na": False}
        own = io.StringIO(manifest.csv(rows[list(COLUMNS)].assign(stage=stage)))
        parts = [pd.read_csv(own, **texts)]
        if path.is_file():
            old = pd.read_csv(path, **texts).reindex(columns=list(COLUMNS), fill_value="")
            numbers = [name[:3] for name in self.profile.stages or self.notebooks]
            parts.append(old[(old.stage != stage) & old.stage.str[:3].isin(numbers)])
        whole = pd.concat(parts, ignore_index=True).sort_values("stage", kind="stable")
        manifest.write_frame(path, whole)
        told, facts = self.manifest.read().get("machine", {}), self.facts()
        if any(told.get(name) != value for name, value in self.about()["machine"].items() if name in ("cpu", "gpu")):
            self.manifest.start(**self.about(), command="a notebook on its own")  # a clone's manifest told of another
            self.manifest.finish("partial")
        self.manifest.update(**facts)

    # --- what is there --------------------------------------------------------------------------------------------

    @property
    def machine(self) -> dict[str, Any]:
        """`manifest.machine`, asked once."""
        if "machine" not in self._loaded:
            self._loaded["machine"] = manifest.machine()
        return self._loaded["machine"]

    def about(self) -> dict[str, Any]:
        """What the manifest says first: the profile, the sources and the machine."""
        if "about" not in self._loaded:
            self._loaded["about"] = {
                "profile": self.profile.name,
                "title": self.profile.title,
                "seed": self.profile.seed,
                "dtype": self.profile.dtype,
                "timing_dtype": self.fastest().profile.dtype,
                "device": str(self.device),
                "revision": manifest.revision(self.root),
                "machine": self.machine,
                "settings": dataclasses.asdict(self.profile),
            }
        return self._loaded["about"]

    def _kept(self) -> dict[str, Any]:
        """The manifest (a clone's, say) with stages of notebooks that have no record here alone; empty if all have."""
        left = [name for name in self.profile.stages or self.notebooks if not self.record(name).is_file()]
        if not left or left == [*self.notebooks][-1:]:  # the report is on what ran here
            return {}
        told, numbers = self.manifest.read(), [name[:3] for name in left]
        # a table has its notebook's number; data have none, and are of all notebooks
        stages = {n: f for n, f in told.get("stages", {}).items() if n[:3] in numbers or not re.match(r"\d\d_", n)}
        return {**told, "stages": stages}

    def elsewhere(self) -> dict[str, str]:
        """Notebooks whose numbers another machine measured, and which; none in what was run here as a whole."""
        here = manifest.machine_name(self.machine)
        told = {name: f.get("machine", here) for name, f in self._kept().get("stages", {}).items()}
        return {name: machine for name, machine in told.items() if name in self.notebooks and machine != here}

    def stale(self) -> list[str]:
        """Notebooks, but for the report, run here with another profile, other weights or prompts than there are now."""
        now, text, found = self._inputs(), digest(self.text()), []
        for name in [*self.notebooks][:-1]:
            record = read_json(self.record(name))
            same = all(now.get(key) == value for key, value in record.get("inputs", {}).items())
            if not same or record.get("text", text) != text:
                found.append(name)
        return found

    def facts(self) -> dict[str, Any]:
        """What the manifest says of stages, data and checkpoints: their records, and what it says of others."""
        folders = {path.parent.name: read_json(path) for path in sorted(self.cache.glob("*/stage.json"))}
        records = {path.stem: read_json(path) for path in sorted(self.cache.glob("stages/*.json"))}
        models = {name: stage_facts(self.checkpoint(name)) for name in self.models}
        told = ("at", "seconds", "key", "machine", "revision", "weights", "notebook", "within")
        mismatched = self.made("corpus").get("mismatched")
        warnings = [f"installed versions differ from the pins: {mismatched}" if mismatched else ""]
        warnings += [self._prompts_warning()]
        warnings += [f"{name} was measured elsewhere: on {machine}" for name, machine in self.elsewhere().items()]
        warnings += [f"{name} was run with another profile, other weights or prompts: run it" for name in self.stale()]
        stages = {name: {k: f[k] for k in told if k in f} for name, f in (folders | records).items()}
        data = {name: {k: v for k, v in f.items() if k not in ("at", "seconds", "key")} for name, f in folders.items()}
        kept = self._kept()
        return {
            "stages": kept.get("stages", {}) | stages,
            "data": kept.get("data", {}) | data,
            "prompts_sha256": {
                "expected": self.profile.data.prompts_sha256,
                "got": self.made("prompts").get("sha256") or kept.get("prompts_sha256", {}).get("got", ""),
            },
            "checkpoints": {name: {k: f[k] for k in told if k in f} for name, f in models.items() if f},
            "warnings": [text for text in warnings if text],
        }
