"""psnb.prompts on code and chats that the tests make themselves."""

import hashlib
import json

import pytest
from datasets import Dataset, concatenate_datasets
from toy_code import MODULE, TEST, code_files

from psnb import data, prompts
from psnb.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    files = code_files(tmp_path_factory.mktemp("toy"))
    return data.code_corpus(files, held_out=["alpha", "beta"], min_bytes=20)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return data.train_tokenizer(corpus["held_out"]["text"], 400)


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen(corpus, tokenizer):
    return prompts.code_prompts(corpus["held_out"], tokenizer, 6, 300, seed=3)


def test_prompts_are_cut_from_the_source(corpus, tokenizer, chosen):
    assert chosen.column_names == ["id", "family", "package", "path", "prompt", "input_ids"]
    assert [p["id"] for p in chosen] == [f"{f}-{i:03d}" for f in prompts.FAMILIES for i in range(6)]
    source = {(d["package"], d["path"]): d["text"] for d in corpus["held_out"]}
    for p in chosen:
        text, prompt, package = source[p["package"], p["path"]], p["prompt"], p["package"]
        n = p["path"].removesuffix(".py")[-1]
        assert tokenizer.decode(p["input_ids"]) == prompt and 24 <= len(p["input_ids"]) <= 300
        module = text if "/tests/" not in p["path"] else source[package, f"{package}/m{n}.py"]
        function = module[module.find("def scale") : module.find("class Counter")].rstrip()
        signature, doc, *rest = function.split("\n")
        match p["family"]:
            case "body":
                assert prompt == f"{signature}\n{doc}"
            case "docstring":
                assert prompt == "\n".join([signature, *rest, "", "", signature]) + '\n    """'
            case "test":
                head = f"def test_scale_{n}_{package}_keeps_order():"
                assert prompt == "\n".join([signature, *rest, "", "", head]) and head + "\n    prepare" in text
            case "class":  # 18 lines from line 1: the middle one, 9, is in `add`
                assert prompt == text[text.find("class Counter") : text.find("    def remove")].rstrip()
            case "literal":  # 12 lines, a third is 4: the brace and four items
                assert text.startswith(prompt) and prompt.endswith(f'"three": {n} + 3,')


def test_prompts_do_not_depend_on_file_order_but_on_the_seed(corpus, tokenizer, chosen):
    again = prompts.code_prompts(corpus["held_out"].shuffle(seed=5), tokenizer, 6, 300, seed=3)
    assert again[:] == chosen[:] and prompts.prompts_sha256(again) == prompts.prompts_sha256(chosen)
    other = prompts.code_prompts(corpus["held_out"], tokenizer, 6, 300, seed=4)
    assert prompts.prompts_sha256(other) != prompts.prompts_sha256(chosen)
    rows = [json.dumps([p[c] for c in ("family", "package", "path", "prompt")]) for p in chosen]
    assert prompts.prompts_sha256(chosen) == hashlib.sha256("\n".join(rows).encode()).hexdigest()


def test_prompts_spread_over_packages_and_files(tokenizer, chosen):
    counts = chosen.to_pandas().groupby(["family", "package"]).size()
    assert (counts == 3).all() and len(counts) == 10
    many = "\n\n".join(
        f'def function_{i}(first, second):\n    """Adds the first and the second and {i}."""\n'
        f"    total = first + second\n    total += {i}\n    return total\n"
        for i in range(6)
    )
    every = MODULE.format(package="p", n=1) + many
    texts = [every, *(MODULE.format(package="p", n=n) for n in (2, 3))]
    tests = [TEST.format(package="p", n=n) for n in (1, 2, 3)]
    paths = [f"p/m{n}.py" for n in (1, 2, 3)] + [f"p/test_m{n}.py" for n in (1, 2, 3)]
    held = Dataset.from_dict({"package": ["p"] * 6, "path": paths, "text": texts + tests})
    for seed in range(4):
        body = [p["path"] for p in prompts.code_prompts(held, tokenizer, 3, 300, seed) if p["family"] == "body"]
        assert body.count("p/m1.py") <= 2  # 7 of its 9 candidates


def test_prompts_are_cut_from_the_left_and_never_from_the_standard_library(corpus, tokenizer):
    made = prompts.code_prompts(corpus["held_out"], tokenizer, 6, 45, seed=3)
    whole = prompts.code_prompts(corpus["held_out"], tokenizer, 6, 300, seed=3)
    full = {(p["family"], p["path"]): p["prompt"] for p in whole}
    cut = 0
    for p in made:
        assert 24 <= len(p["input_ids"]) <= 45 and tokenizer.decode(p["input_ids"]) == p["prompt"]
        if (text := full.get((p["family"], p["path"]))) and text != p["prompt"]:
            cut += 1
            assert text.endswith("\n" + p["prompt"])
            before = text[: -len(p["prompt"])].rstrip("\n").split("\n")[-1]
            assert len(data.encode([before + "\n" + p["prompt"]], tokenizer)[0]) > 45  # one line more is too long
    assert cut >= 12
    library = corpus["held_out"].map(lambda d: {**d, "package": "python"}, load_from_cache_file=False)
    both = concatenate_datasets([library, corpus["held_out"].filter(lambda d: d["package"] == "alpha")])
    assert set(prompts.code_prompts(both, tokenizer, 4, 300)["package"]) == {"alpha"}


def test_too_few_prompts_are_refused(corpus, tokenizer):
    tiny = 'def f(a):\n    """Sum."""\n    a += 1\n    a += 2\n    return a\n'  # its signature has less than 24 tokens
    more = Dataset.from_dict({"package": ["delta"], "path": ["delta.py"], "text": [tiny]})
    held_out = concatenate_datasets([corpus["held_out"].select_columns(more.column_names), more])
    with pytest.raises(UserError, match="only 8 prompts of family 'body'.* 9 asked"):
        prompts.code_prompts(held_out, tokenizer, 9, 300)


def test_code_task_takes_the_families_in_turn(corpus, tokenizer):
    made = prompts.code_task(corpus["held_out"], tokenizer, 7, 300)
    assert made["id"] == [f"code-{i:03d}" for i in range(7)] and set(made["family"]) == {"code"}
    source = prompts.code_prompts(corpus["held_out"], tokenizer, 2, 300)
    of = {row["prompt"]: row["id"] for row in source}
    first = [f"{family}-000" for family in prompts.FAMILIES]
    assert [of[prompt] for prompt in made["prompt"]] == [*first, "body-001", "docstring-001"]
    assert all(tokenizer.decode(row["input_ids"]) == row["prompt"] for row in made)


# --- chats --------------------------------------------------------------------------------------------------------


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = data.CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_chat_prompts_end_where_the_last_answer_begins(chatty):
    chats = [turns("Hi", "Hello."), turns("1+1?", "2", "2+2?", "4"), turns("x" * 400, "long"), turns("no answer")]
    records = Dataset.from_list([{"messages": c, "text": None} for c in chats] + [{"messages": None, "text": "t"}])
    made, facts = prompts.chat_prompts(records, chatty, 8, 60)
    assert facts == {"too_long": 1}
    one, two = made
    assert one["prompt"] == "<|user|>\nHi<|endoftext|><|assistant|>\n" and one["family"] == "chat"
    assert two["prompt"].endswith("2<|endoftext|><|user|>\n2+2?<|endoftext|><|assistant|>\n")
    assert (two["id"], two["family"]) == ("dialogue-000", "dialogue")
    for row in made:  # what training has before the answer
        chat = chats[0] if row["family"] == "chat" else chats[1]
        ids, mask = data.chat_tokens(chat, chatty)
        last = len(mask) - mask[::-1].index(0)
        assert row["input_ids"] == ids[:last]
    again, _ = prompts.chat_prompts(records.select([4, 3, 2, 1, 0]), chatty, 8, 60)
    assert prompts.prompts_sha256(again) == prompts.prompts_sha256(made)
    with pytest.raises(UserError, match=r"no prompt is left of 3 \(3 have more than 5 tokens\): raise"):
        prompts.chat_prompts(records, chatty, 8, 5)


def test_question_prompts_are_spec_benchs(chatty, tmp_path):
    file = tmp_path / "question.jsonl"
    asked = [
        ("qa", ["Who?"]),
        ("coding", ["Write.", "Again."]),
        ("stem", ["Why?"]),
        ("qa", ["Y" * 300]),
        ("rag", ["Z"]),
    ]
    lines = [{"question_id": 80 + i, "category": c, "turns": t} for i, (c, t) in enumerate(asked)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made, facts = prompts.question_prompts(file, chatty, 2, 40)
    assert made["id"] == ["mt_bench-000", "mt_bench-001", "qa-000", "rag-000"] and facts == {"too_long": 1}
    assert made["path"] == ["81", "82", "80", "84"]
    assert made[0]["prompt"] == "<|user|>\nWrite.<|endoftext|><|assistant|>\n"
    assert prompts.question_prompts(file, chatty, 1, 40)[0]["id"] == ["mt_bench-000", "qa-000", "rag-000"]
    file.write_text('{"question_id": 1, "category": "qa", "turns": ["a"]}\n{"question_id": 1, "category": "qa"}\n')
    with pytest.raises(UserError, match=r"question\.jsonl:2: not a question"):
        prompts.question_prompts(file, chatty, 1, 40)
    for wrong in ('"How are you?"', '[" "]', "[]"):
        file.write_text(f'{{"question_id": 1, "category": "qa", "turns": {wrong}}}')
        with pytest.raises(UserError, match=r"question\.jsonl:1: not a question"):
            prompts.question_prompts(file, chatty, 1, 40)
    file.write_text('{"question_id": 1, "category": "all", "turns": ["a"]}')
    with pytest.raises(UserError, match="category 'all' is what is measured over all prompts"):
        prompts.question_prompts(file, chatty, 1, 40)
    marked = b'\xef\xbb\xbf{"category": "qa", "turns": ["a\xe2\x80\xa8b"]}\n\n'
    file.write_bytes(marked + b'{"category": "qa", "turns": ["c"]}\n')
    found = prompts.question_prompts(file, chatty, 2, 40)[0]  # a byte order mark, a line separator, a blank line
    assert found["path"] == ["1", "3"] and "a\u2028b" in found["prompt"][0]
    file.write_bytes(b'{"category": "qa", "turns": ["caf\xe9"]}\n')
    with pytest.raises(UserError, match=r"question\.jsonl:1: not a JSON record"):
        prompts.question_prompts(file, chatty, 1, 40)
    with pytest.raises(UserError, match="gone.jsonl: not readable"):
        prompts.question_prompts(tmp_path / "gone.jsonl", chatty, 1, 40)
    chatty.chat_template = None
    file.write_text('{"question_id": 1, "category": "qa", "turns": ["a"]}')
    with pytest.raises(UserError, match="no chat template"):
        prompts.question_prompts(file, chatty, 1, 40)
