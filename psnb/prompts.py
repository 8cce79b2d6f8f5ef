"""Evaluation prompts: cut from held-out code, or taken from chats and from files of questions."""

from __future__ import annotations

import ast
import bisect
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from psnb.data import Refused, encode, json_lines, render, without_collector
from psnb.errors import UserError

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
FAMILIES = ("body", "docstring", "test", "class", "literal")


def _dataset(rows: list[tuple]) -> Dataset:
    names = ("id", "family", "package", "path", "prompt")
    features = Features({name: Value("string") for name in names} | {"input_ids": List(Value("int32"))})
    return Dataset.from_list([dict(zip(features, row, strict=True)) for row in rows], features=features)


def prompts_sha256(prompts: Dataset) -> str:
    """sha256 over (family, package, path, prompt) of every prompt, in order."""
    columns = [prompts[name] for name in ("family", "package", "path", "prompt")]
    return hashlib.sha256("\n".join(json.dumps(row) for row in zip(*columns, strict=True)).encode()).hexdigest()


# --- 1. code ------------------------------------------------------------------------------------------------------


def _lines(lines: list[str], first: int, last: int) -> str:
    """Lines first..last, counted from 1 as `ast` does, both included, as one string."""
    return "\n".join(lines[first - 1 : last]).rstrip()


def _start(node: ast.AST) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(qualified name, node, parent) of every class and function that is not inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | FUNCTION):
            yield prefix + child.name, child, node
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}{child.name}.")


def _assignments(node: ast.AST, inside: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """(statement, 1 inside a function and 0 outside) of every assignment."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assign | ast.AnnAssign):
            yield child, inside
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # expressions hold no assignment
            yield from _assignments(child, inside or int(isinstance(child, FUNCTION)))


def _docstring(node: ast.AST) -> ast.Expr | None:
    """The docstring's statement, where it shares no line with anything else and something follows it."""
    if ast.get_docstring(node, clean=False) is None or len(node.body) == 1:
        return None
    doc = node.body[0]
    return doc if node.lineno < doc.lineno and doc.end_lineno < node.body[1].lineno else None


def _code(lines: list[str], node: ast.AST) -> str:
    """A function's source without its docstring."""
    if (doc := _docstring(node)) is None:
        return _lines(lines, _start(node), node.end_lineno)
    return _lines(lines, _start(node), doc.lineno - 1) + "\n" + _lines(lines, doc.end_lineno + 1, node.end_lineno)


def _function_prompts(lines: list[str], node: ast.AST) -> Iterator[tuple[str, str]]:
    """`body`: signature and docstring. `docstring`: the code, then its signature again and the opening quotes."""
    doc = _docstring(node)
    if doc is None or node.end_lineno - doc.end_lineno < 3:
        return
    yield "body", _lines(lines, _start(node), doc.end_lineno)
    if opening := re.match(r"\s*[rRuU]?(\"\"\"|''')", lines[doc.lineno - 1]):
        head = _lines(lines, _start(node), doc.lineno - 1)
        yield "docstring", f"{_code(lines, node)}\n\n\n{head}\n{opening.group()}"


def _class_prompt(lines: list[str], node: ast.ClassDef) -> str | None:
    """A class of 15 lines or more, up to the end of the statement on its middle line; 3 lines or more are left out."""
    middle = (node.lineno + node.end_lineno) // 2
    end = next(s.end_lineno for s in node.body if s.end_lineno >= middle)
    if node.end_lineno - node.lineno < 14 or node.end_lineno - end < 3:
        return None
    return _lines(lines, _start(node), end)


def _literal_prompt(lines: list[str], statement: ast.AST) -> str | None:
    """Up to 20 lines of context and the first third of an assigned literal of 10 lines or more."""
    node = statement.value
    if not isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set) or node.end_lineno - node.lineno < 9:
        return None
    if "__all__" in lines[statement.lineno - 1]:  # the names to come could not be known
        return None
    items = node.values if isinstance(node, ast.Dict) else node.elts
    third = node.lineno + (node.end_lineno - node.lineno) / 3
    ends = [a.end_lineno for a, b in pairwise(items) if third <= a.end_lineno < min(b.lineno, node.end_lineno - 3)]
    return _lines(lines, max(1, statement.lineno - 20), ends[0]) if ends else None


def _calls(node: ast.AST) -> set[str]:
    calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return {getattr(f, "id", getattr(f, "attr", "")) for f in calls}


def _candidates(paths: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, str, str, str, str, int]]:
    """(family, path, qualified name, subject, prompt, late) of one package; the late ones fill what the others leave.

    The subject is what a prompt is about: of two candidates with one subject one is kept.
    """
    functions: dict[str, list[str]] = {}
    tests = []
    for path, text in zip(paths, texts, strict=True):
        try:
            with warnings.catch_warnings(action="ignore"):  # old escapes such as "\d"
                tree = ast.parse(text)
        except (SyntaxError, ValueError):  # templates and other Pythons
            continue
        lines = text.split("\n")
        is_test = bool(re.search(r"(^|/)(tests?/|test_[^/]*$)|_test\.py$", path))
        for name, node, parent in _definitions(tree):
            if isinstance(node, ast.ClassDef):
                if prompt := _class_prompt(lines, node):
                    yield "class", path, name, prompt, prompt, 0
                continue
            for family, prompt in _function_prompts(lines, node):
                yield family, path, name, prompt, prompt, 0
            if not is_test:
                functions.setdefault(node.name, []).append(_code(lines, node))
            elif node.name.startswith("test") and node.lineno < _start(node.body[0]):
                head = _lines(lines, _start(node), _start(node.body[0]) - 1)
                if isinstance(parent, ast.ClassDef):
                    head = _lines(lines, _start(parent), _start(parent.body[0]) - 1) + "\n" + head
                tests.append((path, name, node, head))
        for node, late in _assignments(tree):
            if prompt := _literal_prompt(lines, node):
                yield "literal", path, f"literal:{node.lineno}", prompt, prompt, late
    for path, name, node, head in tests:  # the function under test: named by the test if possible, never ambiguous
        called = [f for f in _calls(node) if len(functions.get(f, ())) == 1 and functions[f][0].count("\n") >= 2]
        if called:
            subject = max(called, key=lambda f: (f.lower() in name.lower(), len(f), f))
            yield "test", path, name, functions[subject][0], f"{functions[subject][0]}\n\n\n{head}", 0


def _cut_left(prompt: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> tuple[str, list[int]]:
    """(text, ids) of the longest end of the prompt that starts at a line and has at most `limit` tokens; "" if none."""

    def end(first: int) -> str:
        return "\n".join(lines[first:]).lstrip("\n")

    def ids(first: int) -> list[int]:
        return encode([end(first)], tokenizer)[0]

    lines = prompt.split("\n")
    places = range(len(lines))
    # A long text is first cut by its characters, more than the tokens can hold, as tokenizing takes the time here.
    first = bisect.bisect_left(places, True, key=lambda i: len(end(i)) <= 8 * limit)
    first = bisect.bisect_left(places, True, lo=first, key=lambda i: len(ids(i)) <= limit)
    return end(first), ids(first)


@without_collector()  # syntax trees are large
def code_prompts(
    held_out: Dataset, tokenizer: PreTrainedTokenizerFast, per_family: int, max_prompt_tokens: int, seed: int = 0
) -> Dataset:
    """per_family prompts of each of FAMILIES: id, family, package, path, prompt, input_ids (24 to max_prompt_tokens).

    Every prompt ends where a token ends in training, before the newline. The choice depends on the seed, the packages
    and their paths and names, not on the order of the files: two prompts a file at most and packages in turn, as far as
    there are enough. Prompts that fit come before those that must be cut from the left; of literals, those of modules
    and classes before those of functions. The standard library is never used. Raises UserError for a family with too
    few prompts.
    """
    frame = held_out.select_columns(["package", "path", "text"]).to_pandas()
    found: dict[str, dict[tuple[str, str], tuple]] = {family: {} for family in FAMILIES}
    for package, group in frame[frame.package != "python"].groupby("package"):
        for family, path, name, subject, prompt, late in _candidates(group.path, group.text):
            key = hashlib.sha256(f"{seed}\0{family}\0{package}\0{path}\0{name}".encode()).hexdigest()
            row = (key, package, path, prompt, late)
            found[family][package, subject] = min(row, found[family].get((package, subject), row))
    rows = []
    for family, candidates in found.items():
        fitting, ranked, in_file, in_package = [], [], Counter(), Counter()
        wholes = encode([row[3] for row in candidates.values()], tokenizer) if candidates else []
        for (key, package, path, prompt, late), ids in zip(candidates.values(), wholes, strict=True):
            text = prompt
            if len(ids) > max_prompt_tokens:
                text, ids = _cut_left(prompt, tokenizer, max_prompt_tokens)
            if len(ids) >= 24:
                late = late or int(family != "literal" and text != prompt)  # of a literal only context is cut
                fitting.append((late, key, package, path, text, ids))
        for late, key, package, path, text, ids in sorted(fitting):
            surplus = in_file[package, path] >= 2
            in_file[package, path] += 1
            in_package[package, surplus, late] += 1
            ranked.append(((surplus, late, in_package[package, surplus, late], key), package, path, text, ids))
        if len(ranked) < per_family:
            raise UserError(
                f"only {len(ranked)} prompts of family {family!r} in the held-out packages, {per_family} asked for; "
                "hold out more packages or ask for fewer prompts"
            )
        for i, (_, package, path, text, ids) in enumerate(sorted(ranked)[:per_family]):
            rows.append((f"{family}-{i:03d}", family, package, path, text, ids))
    return _dataset(rows)


def code_task(held_out: Dataset, tokenizer: PreTrainedTokenizerFast, count: int, max_prompt_tokens: int) -> Dataset:
    """`count` of `code_prompts`, the families in turn, as one family `code`: beside chats, say."""
    made = code_prompts(held_out, tokenizer, -(-count // len(FAMILIES)), max_prompt_tokens)
    rows = sorted(made, key=lambda row: (int(row["id"][-3:]), FAMILIES.index(row["family"])))[:count]
    return _dataset([(f"code-{i:03d}", "code", *list(row.values())[2:]) for i, row in enumerate(rows)])


# --- 2. chats -----------------------------------------------------------------------------------------------------

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def _chosen(
    candidates: list[tuple[str, str, str, list[dict]]], tokenizer: PreTrainedTokenizerFast, per_family: int, limit: int
) -> tuple[Dataset, dict[str, int]]:
    """The first per_family of (family, package, path, messages) in each family that have at most `limit` tokens."""
    taken, long, rows = Counter(), 0, []
    for family, package, path, messages in candidates:
        if taken[family] == per_family:
            continue
        try:
            text = render(messages, tokenizer, True)
        except Refused:
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > limit:
            long += 1
            continue
        rows.append((f"{family}-{taken[family]:03d}", family, package, path, text, ids))
        taken[family] += 1
    if not rows:
        raise UserError(
            f"no prompt is left of {len(candidates)} ({long} have more than {limit} tokens): raise "
            "data.max_prompt_tokens, or give other chats"
        )
    return _dataset(sorted(rows, key=lambda row: row[0])), {"too_long": long}


def chat_prompts(
    records: Dataset, tokenizer: PreTrainedTokenizerFast, per_family: int, max_prompt_tokens: int, seed: int = 0
) -> tuple[Dataset, dict[str, int]]:
    """Prompts from held-out chats (data.load_records), each up to its last answer, in the tokenizer's template.

    Families `chat` (the first answer) and `dialogue` (a later one), per_family of each as far as there are; columns as
    in `code_prompts`. Beside them {"too_long": left out}. The choice depends on the seed and the chats, not on their
    order. Raises UserError where none is left.
    """
    found = []
    for messages in filter(None, records["messages"]):
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i]
        if answers:
            family = "chat" if len(answers) == 1 else "dialogue"
            key = hashlib.sha256(json.dumps([seed, messages]).encode()).hexdigest()
            found.append((key, family, messages[: answers[-1]]))
    found.sort(key=lambda one: one[0])
    return _chosen([(f, "chats", key[:16], m) for key, f, m in found], tokenizer, per_family, max_prompt_tokens)


def question_prompts(
    path: Path, tokenizer: PreTrainedTokenizerFast, per_family: int, max_prompt_tokens: int
) -> tuple[Dataset, dict[str, int]]:
    """The first turn of questions in Spec-Bench's form: a JSONL file of {"question_id", "category", "turns"}.

    A family is a category; those of MT-bench are together `mt_bench` (its second turns, which depend on the first
    answer, are not asked). Of each the first per_family that fit, in the file's order.
    Beside them {"too_long": left out}. Raises UserError for a file that cannot be read, and where no question is left.
    """
    found = []
    try:
        lines = [line for line in json_lines(Path(path)) if line[1] is not None]
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); give Spec-Bench's question.jsonl") from error
    for where, record in lines:
        try:
            turns, category = record["turns"], str(record["category"])
            if not (isinstance(turns, list) and isinstance(content := turns[0], str) and content.strip()):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f'{where}: not a question {{"question_id": ..., "category": ..., "turns": [...]}}; convert it'
            ) from None
        if category == "all":
            raise UserError(f"{where}: category 'all' is what is measured over all prompts; rename it")
        family = "mt_bench" if category in MT_BENCH else category
        name = str(record.get("question_id", where.rsplit(":", 1)[1]))
        found.append((family, Path(path).name, name, [{"role": "user", "content": content}]))
    return _chosen(found, tokenizer, per_family, max_prompt_tokens)
