"""Corpora and prompt sets become token rows: files -> documents -> tokens -> packed rows.

    files = environment_files(Path("constraints.txt"))
    corpus = code_corpus(files, held_out=["networkx"])         # DatasetDict: train, held_out
    tokenizer = train_tokenizer(sample_texts(corpus["train"], 60_000_000), vocab_size=5120)
    rows = pack(tokenize(corpus["train"], tokenizer), length=1024)

The corpus is the Python source of the study's own pinned environment: it needs no network and is the same on every
machine that installed the same pins.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import logging
import lzma
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from datasets.fingerprint import Hasher
from packaging.utils import canonicalize_name
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from psnb.errors import UserError

log = logging.getLogger(__name__)

EOS = "<|endoftext|>"
NEVER = ("pip", "setuptools", "wheel", "psnb")  # differ between machines, or are the study itself
VENDOR_DIRS = ("_vendor", "vendored", "externals", "third_party")
SHORTEST_WINDOW = 16

# One alternative a line: indentation with its newlines, words (one sign before them at most), numbers, signs, blanks.
SPLIT = (
    r"\s*[\r\n]+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles meanwhile: where millions of objects are made and kept, it walks all of them repeatedly."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# --- 1. files -----------------------------------------------------------------------------------------------------


def _pins(constraints: Path) -> dict[str, str]:
    """{normalised name: public version} of the `name==version` lines; UserError if there are none."""
    try:
        text = constraints.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{constraints}: not readable ({error.strerror}); give the list of pins") from error
    found = re.findall(r"^\s*([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*==\s*([^\s;#]+)", text, flags=re.MULTILINE)
    if not found:
        raise UserError(f"{constraints}: no `name==version` line; write it with `pip freeze`")
    return {canonicalize_name(name): version.split("+")[0] for name, version in found}


def _standard_library(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in ("site-packages", "dist-packages", "__pycache__", "_bundled"))
        yield from (Path(folder, f) for f in sorted(files) if f.endswith(".py"))


def environment_files(constraints: Path) -> pd.DataFrame:
    """Python files of the pinned packages and the standard library, sorted by (package, path).

    Columns: package, version (without a local part such as `+cpu`), path (posix, relative to the install root), file
    (absolute). The standard library is package `python`. Pinned packages that are not installed are skipped;
    `.attrs["mismatched"]` maps a package whose installed version is another than the pin to "pinned -> installed".
    Raises UserError for a constraints file that is missing or pins nothing.
    """
    pins = _pins(constraints)
    rows, mismatched, seen = [], {}, set()
    for dist in importlib.metadata.distributions():
        name = canonicalize_name(dist.name or "")  # none in the folder of an interrupted install
        if name in NEVER or name not in pins or name in seen:  # the first on sys.path is the one that is imported
            continue
        seen.add(name)
        version = dist.version.split("+")[0]
        if version != pins[name]:
            mismatched[name] = f"{pins[name]} -> {version}"
        for entry in dist.files or ():
            if entry.suffix == ".py" and ".." not in entry.parts:  # `..` leads to scripts and shared data
                rows.append((name, version, entry.as_posix(), str(dist.locate_file(entry))))
    root = Path(sysconfig.get_path("stdlib"))
    # lib2to3 ships test data in old encodings; the generated build settings name the machine.
    for file in _standard_library(root):
        path = file.relative_to(root).as_posix()
        if not path.startswith(("lib2to3/tests/", "config-", "_sysconfigdata")):
            rows.append(("python", platform.python_version(), path, str(file)))
    frame = pd.DataFrame(rows, columns=["package", "version", "path", "file"])
    frame = frame.drop_duplicates(["package", "path"]).sort_values(["package", "path"], ignore_index=True)
    frame.attrs["mismatched"] = mismatched
    if mismatched:
        log.warning("installed versions differ from the pins: %s", mismatched)
    return frame


# --- 2. documents -------------------------------------------------------------------------------------------------


def _digest(text: str) -> str:
    """sha256 of the text with trailing whitespace stripped per line."""
    return hashlib.sha256("\n".join(line.rstrip() for line in text.split("\n")).encode()).hexdigest()


def _vendors(path: str, modules: set[str]) -> bool:
    """True where the path is a vendored copy of one of the modules: .../_vendor/<module>[.py]/..."""
    parts = PurePosixPath(path).parts
    return any(a in VENDOR_DIRS and b.removesuffix(".py") in modules for a, b in pairwise(parts))


def code_corpus(
    files: pd.DataFrame,
    held_out: Sequence[str],
    min_bytes: int = 200,
    max_bytes: int = 400_000,
    train: bool = True,
) -> DatasetDict:
    """Splits `train` and `held_out` with columns package, version, path, text, sha256, sorted by (package, path).

    `held_out` names whole packages. Of equal texts one is kept, the held-out one first. Vendored copies of held-out
    packages are dropped. Without `train` the other packages are not read. Raises UserError for an empty corpus or a
    held-out package without files.
    """
    wanted = {canonicalize_name(name) for name in held_out}
    modules = {p.split("/")[0].removesuffix(".py") for p in files.path[files.package.isin(wanted)]}
    modules -= {"test", "tests", "docs", "examples"}
    columns = ("package", "version", "path", "text", "sha256")
    splits = {name: {column: [] for column in columns} for name in ("train", "held_out")}
    seen, unreadable = set(), 0
    order = files.assign(late=~files.package.isin(wanted)).sort_values(["late", "package", "path"])
    for row in order.itertuples():
        if row.late and (not train or _vendors(row.path, modules)):
            continue
        try:
            if not min_bytes <= os.path.getsize(row.file) <= max_bytes:
                continue
            text = Path(row.file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):  # listed but not installed, or an old encoding
            unreadable += 1
            continue
        digest = _digest(text)
        if digest not in seen:
            seen.add(digest)
            split = splits["train" if row.late else "held_out"]
            for column, value in zip(columns, (row.package, row.version, row.path, text, digest), strict=True):
                split[column].append(value)
    if unreadable:
        log.info("%d files are not there or not UTF-8, skipped", unreadable)
    missing = wanted - set(splits["held_out"]["package"])
    if missing:
        raise UserError(f"held-out packages without files: {', '.join(sorted(missing))}; install them or name others")
    if train and not splits["train"]["text"]:
        raise UserError(f"the corpus is empty: no file of {len(files)} is left to train on; check the constraints file")
    features = Features({column: Value("string") for column in columns})
    return DatasetDict({name: Dataset.from_dict(split, features=features) for name, split in splits.items()})


def corpus_manifest(corpus: DatasetDict) -> pd.DataFrame:
    """One row a document: split, package, version, path, bytes (UTF-8), sha256."""
    frames = []
    for split, dataset in corpus.items():
        frame = dataset.to_pandas()
        frame.insert(0, "split", split)
        frame.insert(4, "bytes", [len(text.encode()) for text in frame.text])
        frames.append(frame.drop(columns="text"))
    return pd.concat(frames, ignore_index=True)


# --- 3. tokens ----------------------------------------------------------------------------------------------------


def sample_texts(dataset: Dataset, max_bytes: int) -> Iterator[str]:
    """About max_bytes of whole texts, of a chat its turns as lines: a sample that does not depend on the machine.

    Documents of code come in the order of their sha256, records (load_records), which are shuffled, as they stand.
    """
    if "sha256" in dataset.column_names:
        dataset = dataset.select(np.argsort(np.array(dataset["sha256"])))
    left = max_bytes
    for record in dataset:
        if left <= 0:
            return
        text = "\n".join([record["text"] or "", *(m["content"] for m in record.get("messages") or ())])
        left -= len(text.encode())
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE for code: any text round-trips, a newline with its indentation can be one token.

    `<|endoftext|>` is end of text and padding, id 0. Raises UserError where the texts are too small for vocab_size.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != vocab_size:
        raise UserError(f"the texts give {model.get_vocab_size()} tokens, not {vocab_size}: give more text")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of texts without any added; special tokens spelt out inside a text are ordinary text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of texts, each with the end-of-text id last; UserError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
    return [[*ids, tokenizer.eos_token_id] for ids in encode(texts, tokenizer)]


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Adds `input_ids` (int32, the end-of-text id last) and drops `text`; the other columns stay.

    Special tokens spelt out inside a text are ordinary text: only a document's end has the end-of-text id.
    Raises UserError for a tokenizer without an end-of-text token.
    """
    features = dataset.features.copy()
    del features["text"]
    features["input_ids"] = List(Value("int32"))
    return dataset.map(
        lambda batch: {"input_ids": _documents(batch["text"], tokenizer)},
        batched=True,
        batch_size=200,  # some MB of text
        remove_columns=["text"],
        features=features,
        desc="tokens",
    )


# --- 4. packed rows -----------------------------------------------------------------------------------------------


def pack_rows(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, longest first: lengths [w] -> row [w], offset [w]; windows below SHORTEST_WINDOW get row -1.

    >>> pack_rows(np.array([40, 100, 60, 3]), 100)
    (array([ 1,  0,  1, -1]), array([60,  0,  0,  0]))
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and lengths.max() > length:
        raise ValueError(f"a window of {lengths.max()} tokens does not fit a row of {length}")
    row, offset = np.full(len(lengths), -1), np.zeros(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # rows by their free places
    filled = 0  # bit f is set where open_rows[f] is not empty: the best fit is then one shift away
    rows = 0
    for window in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[window])
        if need < SHORTEST_WINDOW:
            break
        fitting = filled >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            row[window] = open_rows[free].pop()
            if not open_rows[free]:
                filled &= ~(1 << free)
        else:
            free, row[window], rows = length, rows, rows + 1
        offset[window] = length - free
        if free > need:
            open_rows[free - need].append(int(row[window]))
            filled |= 1 << (free - need)
    return row, offset


def _flat(dataset: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (values [total], starts [documents + 1])."""
    lists = dataset.with_format("arrow")[:][column]
    lengths = pc.list_value_length(lists).to_numpy()
    chunks = [chunk.flatten().to_numpy() for chunk in lists.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int32), np.concatenate([[0], np.cumsum(lengths)])


def pack(dataset: Dataset, length: int) -> Dataset:
    """Rows `input_ids` [length], `document` [length] (int32), and `loss_mask` [length] where the dataset has one.

    A document is cut in windows of at most `length` tokens; `document` numbers the windows of a row 0, 1, 2, ... and is
    -1 on padding (input_ids and loss_mask are 0 there). Windows below SHORTEST_WINDOW tokens are dropped and counted in
    the log. Raises UserError where nothing is left.
    """
    values, starts = _flat(dataset, "input_ids")
    begins = [np.arange(a, b, length) for a, b in pairwise(starts)]
    ends = np.repeat(starts[1:], [len(b) for b in begins])
    begin = np.concatenate(begins) if begins else np.zeros(0, np.int64)
    size = np.minimum(begin + length, ends) - begin
    row, offset = pack_rows(size, length)
    kept = np.flatnonzero(row >= 0)
    if not len(kept):
        raise UserError(f"none of {len(starts) - 1} documents has {SHORTEST_WINDOW} tokens")
    kept = kept[np.lexsort((offset[kept], row[kept]))]  # row by row, left to right
    shape = (int(row.max()) + 1, length)
    columns = {"input_ids": values}
    if "loss_mask" in dataset.column_names:
        columns["loss_mask"] = _flat(dataset, "loss_mask")[0]
    packed = {name: np.zeros(shape, np.int32) for name in columns} | {"document": np.full(shape, -1, np.int32)}
    previous, number = -1, 0
    for w in kept:
        r, o, n, b = row[w], offset[w], size[w], begin[w]
        number = number + 1 if r == previous else 0
        previous = r
        packed["document"][r, o : o + n] = number
        for name, source in columns.items():
            packed[name][r, o : o + n] = source[b : b + n]
    used, lost = int(size[kept].sum()), int(size[row < 0].sum())
    log.info(
        "%d windows packed in %d rows of %d, %.2f %% padding", len(kept), *shape, 100 - 100 * used / np.prod(shape)
    )
    log.info("%d windows below %d tokens dropped (%d tokens)", np.sum(row < 0), SHORTEST_WINDOW, lost)
    arrays = {n: pa.FixedSizeListArray.from_arrays(pa.array(a.ravel()), length) for n, a in packed.items()}
    return Dataset(pa.table(arrays), fingerprint=Hasher.hash_bytes(list(packed.values())))  # its own pickles the table


# --- 5. chats -----------------------------------------------------------------------------------------------------

# A turn is "<|role|>\ncontent<|endoftext|>": the turn's end is a token that every tokenizer of ours has.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a .jsonl[.xz] file stands, and its record, None for a blank one. Raises UserError."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as stream:
        try:
            for number, line in enumerate(stream, 1):
                where, line = f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8)
                try:
                    record = json.loads(line) if line.strip() else None
                    if b"\\ud" in line.lower():  # half a character in escapes is a ValueError too
                        json.dumps(record, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not a JSON record ({error}); repair or remove the line") from None
                yield where, record
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{path}: not a complete xz file ({error}); fetch it again") from None


SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles; others stay


def _checked(record: object, where: str) -> dict:
    """{"messages": [{role, content}] or None, "text": str or None}; UserError for another shape."""
    given = record if isinstance(record, dict) else {}
    messages, text = given.get("messages"), given.get("text")
    try:
        if messages is None and "conversations" in given:
            messages = [
                {"role": SHAREGPT.get(m["from"], m["from"]), "content": m["value"]} for m in given["conversations"]
            ]
        if messages is None and isinstance(text, str):
            return {"messages": None, "text": text}
        turns = [{name: m[name] for name in ("role", "content")} for m in messages]
        if not all(isinstance(value, str) for turn in turns for value in turn.values()):
            raise TypeError
    except (KeyError, TypeError):
        shape = '{"messages": [{"role": ..., "content": ...}]}, {"conversations": ...} as in ShareGPT, or {"text": ...}'
        raise UserError(f"{where}: the record is not {shape} with strings; convert it") from None
    return {"messages": turns, "text": None}


@without_collector()
def load_records(source: str, split: str = "train", seen: set[int] | None = None) -> tuple[Dataset, dict[str, int]]:
    """Columns messages (list of role, content) and text, one of them None, of a .jsonl[.xz] file or a hub data set.

    Records without any content and repeats are dropped; beside the data set comes how many: {"records": read, "empty",
    "repeated"}. What stands in `seen` (of other sources, say) is a repeat too, and what is kept is added to it.
    Raises UserError for a line that cannot be read (with file and line number), a source that cannot be loaded, and
    where no record is left.
    """
    if source.endswith((".jsonl", ".jsonl.xz")):
        if not Path(source).is_file():
            raise UserError(f"{source}: no such file; give a .jsonl or .jsonl.xz file, or the name of a hub data set")
        lines = json_lines(Path(source))
        records = [_checked({"text": ""} if record is None else record, where) for where, record in lines]
    else:
        try:
            raw = load_dataset(source, split=split)
        except (OSError, ValueError) as error:  # no such data set, no network, no such split
            raise UserError(f"data set {source!r}, split {split!r} cannot be loaded: {error}") from error
        records = [_checked(record, f"{source}:{number}") for number, record in enumerate(raw, 1)]
    kept = [r for r in records if (r["text"] or "").strip() or any(m["content"].strip() for m in r["messages"] or ())]
    if len(kept) < len(records):
        log.warning("%s: %d of %d records are empty, dropped", source, len(records) - len(kept), len(records))
    if not kept:
        raise UserError(f"{source}: no record with content ({len(records)} read); give another file")
    turn, seen, first = {"role": Value("string"), "content": Value("string")}, set() if seen is None else seen, []
    for record in kept:
        words = hash((record["text"], *((m["role"], m["content"]) for m in record["messages"] or ())))
        if words not in seen:
            seen.add(words)
            first.append(record)
    facts = {"records": len(records), "empty": len(records) - len(kept), "repeated": len(kept) - len(first)}
    features = Features({"messages": List(turn), "text": Value("string")})
    table = pa.Table.from_pylist(first, schema=features.arrow_schema)  # from_dict walks every turn in Python before
    return Dataset(table), facts


def chats_sha256(dataset: Dataset) -> str:
    """sha256 of load_records' records in their order: of the lengths of all texts and roles, and of their bytes."""
    lengths, words = hashlib.sha256(), hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        turns = batch["messages"].combine_chunks()
        lengths.update(pc.list_value_length(turns).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        turns = turns.flatten()
        for column in (batch["text"].combine_chunks(), turns.field("role"), turns.field("content")):
            lengths.update(pc.binary_length(column).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
            column = column.drop_null()
            whole = pc.binary_join(pa.ListArray.from_arrays([0, len(column)], column), "")  # no text becomes Python's
            words.update(whole[0].as_buffer())
    return hashlib.sha256(lengths.digest() + words.digest()).hexdigest()


class Refused(UserError):
    """The chat template does not take this chat; others may be fine."""


def render(messages: Sequence[dict], tokenizer: PreTrainedTokenizerFast, prompt: bool) -> str:
    """A chat as the tokenizer's template writes it; with `prompt`, up to where the assistant begins.

    Raises UserError for a tokenizer without a template, and Refused where the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: give the profile the one that its model was trained with "
            "(target.chat_template; psnb.data.CHAT_TEMPLATE is a plain one)"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise Refused(f"the chat template refuses a chat ({error}); set another template") from error


def chat_tokens(messages: Sequence[dict], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(ids [n], mask [n]) of a chat under the tokenizer's template; mask 1 on what the assistant has to write.

    An assistant turn is the text that the template adds to the turns before it and their generation prompt; a token
    belongs to it if it lies wholly inside. An assistant turn that opens the chat has no prompt and is not selected.
    Raises UserError as `render` does, and for a template that rewrites earlier turns.
    """
    if not tokenizer.is_fast:
        raise UserError("the chat's loss mask needs a fast tokenizer; load one with tokenizer.json")
    text, spans = render(messages, tokenizer, False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:
            before = render(messages[:i], tokenizer, True)
            after = text if i == len(messages) - 1 else render(messages[: i + 1], tokenizer, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"the chat template is not prefix-stable: it writes turn {i} or those before otherwise once more "
                    "follows; set target.chat_template to one that only appends"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first, last = np.array(encoded["offset_mapping"], dtype=int).reshape(-1, 2).T
    mask = np.zeros(len(first), dtype=int)
    for begin, end in spans:
        mask |= (begin <= first) & (last <= end) & (first < end)
    return encoded["input_ids"], mask.tolist()


def tokenize_chat(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, length: int | None = None, num_proc: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """`input_ids` and `loss_mask` (int32) of load_records' records; a `text` record is trained on everywhere.

    A chat is cut at `length` tokens: what follows would be trained on without what it answers. Chats that the template
    refuses and those whose mask selects nothing are dropped. Beside the data set come the numbers of these: {"cut",
    "refused", "silent"}. Raises UserError where no chat is left of any, or the mask selects everything of all chats.
    """

    def encode_record(record: dict) -> dict:
        if record["messages"] is None:
            [ids] = _documents([record["text"]], tokenizer)
            return {"input_ids": ids, "loss_mask": [1] * len(ids), "kind": "text"}
        try:
            ids, mask = chat_tokens(record["messages"], tokenizer)
        except Refused as error:
            return {"input_ids": [], "loss_mask": [], "kind": f"refused: {error}"}
        kind = "cut" if length and len(ids) > length else "chat"
        ids, mask = ids[:length], mask[:length]
        return {"input_ids": ids, "loss_mask": mask, "kind": kind if any(mask) else "silent"}

    lists = {"input_ids": List(Value("int32")), "loss_mask": List(Value("int32"))}
    features = Features(lists | {"kind": Value("string")})
    done = dataset.map(
        encode_record, num_proc=num_proc, remove_columns=dataset.column_names, features=features, desc="chats"
    )
    kinds = done.with_format("arrow")[:]["kind"].to_pandas()
    facts = {name: int(kinds.str.startswith(name).sum()) for name in ("cut", "refused", "silent")}
    chats = kinds.isin(("chat", "cut")).to_numpy()
    lost = facts["refused"] + facts["silent"]
    if lost and not chats.any():
        why = next(k for k in kinds if k.startswith("refused")) if facts["refused"] else "the loss mask selects nothing"
        raise UserError(
            f"none of {lost} chats can be trained on ({why}); check the roles, the template and data.length"
        )
    mask, starts = _flat(done, "loss_mask")
    of_chats = mask[np.repeat(chats, np.diff(starts))]
    if len(of_chats) and of_chats.all():
        raise UserError(f"the loss mask selects everything of {len(of_chats)} tokens; check the roles and the template")
    return done.select(np.flatnonzero(chats | (kinds == "text"))).remove_columns("kind"), facts
