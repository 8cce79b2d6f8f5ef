"""psnb.data on corpora, chats and tokenizers that the tests make themselves."""

import hashlib
import importlib.metadata
import json
import lzma
import random

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_code import code_files, write

from psnb import data
from psnb.errors import UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return code_files(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def corpus(toy):
    return data.code_corpus(toy, held_out=["alpha", "beta"], min_bytes=20)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return data.train_tokenizer(corpus["held_out"]["text"], 400)


def token_lists(*lists, **columns):
    return Dataset.from_dict({"input_ids": [list(one) for one in lists], **columns})


# --- files and documents ------------------------------------------------------------------------------------------


def test_environment_files_are_those_of_the_pins(tmp_path, monkeypatch):
    (tmp_path / "broken-1.0.dist-info").mkdir()  # an interrupted install leaves such a folder
    monkeypatch.syspath_prepend(str(tmp_path))
    assert None in [each.name for each in importlib.metadata.distributions()]
    version = importlib.metadata.version("attrs")
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# comment\nattrs=={version}\nJinja2==0.0.1+cpu ; python_version > '3'\nnot.There_x==1\npip==1\n")
    files = data.environment_files(pins)
    assert set(files.package) == {"attrs", "jinja2", "python"}  # normalised; pip left out; the absent one skipped
    assert files.attrs["mismatched"] == {"jinja2": f"0.0.1 -> {importlib.metadata.version('jinja2')}"}
    attrs = files[files.package == "attrs"]
    listed = {str(f) for f in importlib.metadata.files("attrs") if f.name.endswith(".py")}
    assert set(attrs.path) == listed and set(attrs.version) == {version}
    assert "json/decoder.py" in set(files.path[files.package == "python"])
    assert not files.path.str.contains("site-packages|^/|\\.\\.").any()
    assert list(zip(files.package, files.path, strict=True)) == sorted(zip(files.package, files.path, strict=True))


def test_constraints_without_pins_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("numpy>=1\n")
    with pytest.raises(UserError, match="no `name==version` line"):
        data.environment_files(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="gone.txt"):
        data.environment_files(tmp_path / "gone.txt")


def test_whole_packages_are_held_out_and_copies_kept_once(tmp_path):
    body = "\n".join(f"line_{i} = {i}  # some words" for i in range(20))
    rows = [
        write(tmp_path, "zeta", "zeta/a.py", body),
        write(tmp_path, "able", "able/same.py", body.replace("\n", "   \n")),  # equal but for trailing blanks
        write(tmp_path, "able", "able/one.py", body + "\none = 1\n"),
        write(tmp_path, "able", "able/two.py", body + "\none = 1\n"),
        write(tmp_path, "able", "able/_vendor/zeta/b.py", body + "\nanother version\n"),
        write(tmp_path, "able", "able/third_party/zeta.py", body + "\nyet another\n"),
        write(tmp_path, "able", "able/_vendor/other/b.py", body + "\nthird\n"),
        write(tmp_path, "able", "able/zeta/c.py", body + "\nnot vendored\n"),
        write(tmp_path, "able", "able/short.py", "x = 1\n"),
        write(tmp_path, "able", "able/long.py", "x = 1\n" * 1000),
        {"package": "able", "version": "1.0", "path": "able/gone.py", "file": str(tmp_path / "gone.py")},
    ]
    latin = write(tmp_path, "able", "able/latin.py", "")
    (tmp_path / "able/able/latin.py").write_bytes(b"# caf\xe9\n" * 40)
    files = pd.DataFrame([*rows, latin])
    made = data.code_corpus(files, held_out=["ZETA"], max_bytes=5000)
    assert made["held_out"]["path"] == ["zeta/a.py"]
    assert made["train"]["path"] == ["able/_vendor/other/b.py", "able/one.py", "able/zeta/c.py"]
    stripped = "\n".join(line.strip() for line in body.splitlines())
    assert made["held_out"]["sha256"] == [hashlib.sha256(stripped.encode()).hexdigest()]
    again = data.code_corpus(files.sample(frac=1, random_state=1), held_out=["zeta"], max_bytes=5000)
    assert data.corpus_manifest(again).equals(data.corpus_manifest(made))


def test_held_out_code_alone(toy, corpus):
    alone = data.code_corpus(toy, held_out=["alpha"], min_bytes=20, train=False)
    assert len(alone["train"]) == 0 and set(alone["held_out"]["package"]) == {"alpha"}
    both = data.code_corpus(toy, held_out=["alpha"], min_bytes=20)
    assert alone["held_out"][:] == both["held_out"][:] and len(both["train"])


def test_corpus_manifest(toy, corpus, tmp_path):
    manifest = data.corpus_manifest(corpus)
    assert list(manifest) == ["split", "package", "version", "path", "bytes", "sha256"]
    sizes = {(row.package, row.path): (tmp_path / row.file).stat().st_size for row in toy.itertuples()}
    assert {(row.package, row.path): row.bytes for row in manifest.itertuples()} == sizes


def test_empty_corpus_and_unknown_held_out_package_are_refused(toy):
    with pytest.raises(UserError, match="the corpus is empty"):
        data.code_corpus(toy, held_out=["alpha", "beta", "gamma"])
    with pytest.raises(UserError, match="delta"):
        data.code_corpus(toy, held_out=["delta"])


# --- tokens -------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=" \t\r\n\x0caé1_.<|>'\"\u2028\u00a0", max_size=60)))
def test_tokenizer_round_trip(tokenizer, text):
    ids = data.encode([text], tokenizer)[0]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == ids or data.EOS in text


def test_tokenizer_is_for_code(tokenizer, tmp_path):
    def pieces(text):
        return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("self.total") == ["self", ".total"]
    assert pieces("x):\n\n    y12345") == ["x", "):", "ĊĊĠĠĠĠ", "y", "123", "45"]
    assert len(tokenizer) == 400 and tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert len(data.encode(["\n        "], tokenizer)[0]) == 1
    tokenizer.save_pretrained(tmp_path)
    assert (
        type(tokenizer).from_pretrained(tmp_path)("def f():\n  é")["input_ids"]
        == tokenizer("def f():\n  é")["input_ids"]
    )
    with pytest.raises(UserError, match="give more text"):
        data.train_tokenizer(["a b"], 400)


def test_tokenize_ends_documents_and_reads_special_tokens_as_text(tokenizer):
    texts = [f"a {data.EOS} b", "x = 1\n"]
    made = data.tokenize(Dataset.from_dict({"text": texts, "path": ["p", "q"]}), tokenizer)
    assert made.column_names == ["path", "input_ids"] and made.features["input_ids"].feature.dtype == "int32"
    for ids, text in zip(made["input_ids"], texts, strict=True):
        assert ids.count(0) == 1 and ids[-1] == 0 and tokenizer.decode(ids[:-1]) == text


def test_sample_is_a_fixed_choice(corpus):
    texts = list(data.sample_texts(corpus["held_out"], 3000))
    assert texts == list(data.sample_texts(corpus["held_out"].shuffle(seed=1), 3000))
    assert sum(map(len, texts[:-1])) < 3000 <= sum(map(len, texts))


# --- packing ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=60))
def test_pack_rows_places_every_window_once(lengths):
    row, offset = data.pack_rows(np.array(lengths, dtype=int), 100)
    used = np.zeros((len(lengths) + 1, 100), dtype=int)
    for n, r, o in zip(lengths, row, offset, strict=True):
        assert (r == -1) == (n < 16)
        if r >= 0:
            assert o + n <= 100
            used[r, o : o + n] += 1
    assert used.max() <= 1
    filled = used.sum(axis=1)
    filled = filled[filled > 0]
    assert len(filled) == row.max(initial=-1) + 1
    # Two rows that would fit in one would mean that nothing was fitted.
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > 100


def test_pack_keeps_every_token_once_and_documents_apart():
    rng = random.Random(0)
    sizes = [rng.randrange(1, 150) for _ in range(60)] + [200, 64]
    numbers = iter(range(1, 100_000))
    documents = [[next(numbers) for _ in range(n)] for n in sizes]
    packed = data.pack(token_lists(*documents), 64).with_format("numpy")
    ids, document = packed["input_ids"][:], packed["document"][:]
    assert ids.shape == document.shape == (len(packed), 64)
    assert {str(f.feature.dtype) for f in packed.features.values()} == {"int32"}
    windows = [tuple(d[i : i + 64]) for d in documents for i in range(0, len(d), 64)]
    found = []
    for row, number in zip(ids, document, strict=True):
        kept = [n for n in dict.fromkeys(number.tolist()) if n >= 0]
        assert kept == list(range(len(kept)))  # 0, 1, 2, ... from left to right
        found += [tuple(row[number == n].tolist()) for n in kept]
        assert (number[(number >= 0).sum() :] == -1).all() and (row[number == -1] == 0).all()
    assert sorted(found) == sorted(w for w in windows if len(w) >= 16)


def test_pack_takes_the_loss_mask_and_a_selection_along():
    documents = [list(range(100 * n, 100 * n + 20 + n)) for n in range(1, 8)]
    masks = [[i % 2 for i in one] for one in documents]
    dataset = token_lists(*documents, loss_mask=masks).select([6, 2, 3])  # an indirection that must be followed
    packed = data.pack(dataset, 50).with_format("numpy")
    ids, mask, document = (packed[name][:] for name in ("input_ids", "loss_mask", "document"))
    assert set(ids[document >= 0].tolist()) == {i for n in (6, 2, 3) for i in documents[n]}
    assert (mask == np.where(document >= 0, ids % 2, 0)).all()


def test_pack_counts_what_it_drops_and_refuses_nothing(caplog):
    with caplog.at_level("INFO"):
        data.pack(token_lists(range(40), range(3), range(37)), 32)
    assert "1 windows packed in 1 rows of 32" not in caplog.text
    assert "2 windows packed in 2 rows of 32" in caplog.text
    assert "3 windows below 16 tokens dropped (16 tokens)" in caplog.text  # 40 - 32, 3 and 37 - 32
    with pytest.raises(UserError, match="none of 2 documents"):
        data.pack(token_lists(range(3), range(15)), 32)


# --- chats --------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = data.CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def records(*chats, texts=()):
    turn = [{"messages": c, "text": None} for c in chats] + [{"messages": None, "text": t} for t in texts]
    return Dataset.from_list(turn)


def test_chat_mask_selects_what_the_assistant_writes(chatty):
    ids, mask = data.chat_tokens(CHAT, chatty)
    assert ids == chatty.apply_chat_template(CHAT, return_dict=False)
    expected = []
    for text, wanted in (
        ("<|system|>\nBe brief.<|endoftext|><|user|>\nHi<|endoftext|><|assistant|>\n", 0),
        ("Hello.<|endoftext|>", 1),
        ("<|user|>\n1+1?<|endoftext|><|assistant|>\n", 0),
        ("2<|endoftext|>", 1),
    ):
        expected += [(i, wanted) for i in chatty(text)["input_ids"]]
    assert list(zip(ids, mask, strict=True)) == expected
    opening = [{"role": "assistant", "content": "Welcome"}, *CHAT[1:3]]
    ids, mask = data.chat_tokens(opening, chatty)
    assert chatty.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "Hello.<|endoftext|>"


def test_a_token_across_the_border_is_not_selected(chatty):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "        return result\n"}]
    ids, mask = data.chat_tokens(chat, chatty)
    words = chatty.convert_ids_to_tokens(ids)
    assert words[mask.index(1) - 1] == "ĊĠĠĠĠĠĠĠĠ"  # the template's newline and the answer's indentation
    assert chatty.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "return result\n<|endoftext|>"


def test_unstable_refusing_and_missing_templates_are_named(chatty):
    chatty.chat_template = "{{ messages | length }}" + data.CHAT_TEMPLATE
    with pytest.raises(UserError, match="prefix-stable"):
        data.chat_tokens(CHAT, chatty)
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        data.chat_tokens(CHAT, chatty)
    chatty.chat_template = None
    with pytest.raises(UserError, match="CHAT_TEMPLATE"):
        data.tokenize_chat(records(CHAT), chatty)


def test_tokenize_chat_and_pack(chatty):
    made, facts = data.tokenize_chat(records(CHAT, texts=["def f(x):\n    return x + 12345\n"]), chatty)
    assert facts == {"cut": 0, "refused": 0, "silent": 0}
    ids, mask = data.chat_tokens(CHAT, chatty)
    assert made.column_names == ["input_ids", "loss_mask"]
    assert (made[0]["input_ids"], made[0]["loss_mask"]) == (ids, mask)
    assert made[1]["input_ids"] == data.encode(["def f(x):\n    return x + 12345\n"], chatty)[0] + [0]
    assert made[1]["loss_mask"] == [1] * len(made[1]["input_ids"])
    packed = data.pack(made, 128)
    assert sum(map(sum, packed["loss_mask"])) == sum(map(sum, made["loss_mask"]))


def test_a_mask_of_nothing_or_everything_is_refused(chatty):
    with pytest.raises(UserError, match="none of 1 chats .*selects nothing"):
        data.tokenize_chat(records(CHAT[:2], texts=["texts do not count"]), chatty)
    chatty.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="selects everything"):
        data.tokenize_chat(records(CHAT), chatty)
    assert len(data.tokenize_chat(records(texts=["only text"]), chatty)[0]) == 1


def test_long_refused_and_silent_chats_are_counted(chatty):
    long = [*CHAT, {"role": "user", "content": "more " * 50}, {"role": "assistant", "content": "no"}]
    silent = [{"role": "user", "content": "much " * 50}, {"role": "assistant", "content": "never seen"}]
    chatty.chat_template = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user first') }}{% endif %}"
        + data.CHAT_TEMPLATE
    )
    made, facts = data.tokenize_chat(records(CHAT, long, silent, CHAT[2:], CHAT[:2], texts=["t" * 300]), chatty, 128)
    assert facts == {"cut": 1, "refused": 1, "silent": 2}
    ids, mask = data.chat_tokens(long, chatty)
    whole = data.chat_tokens(CHAT, chatty)
    assert [(row["input_ids"], row["loss_mask"]) for row in made][:2] == [whole, (ids[:128], mask[:128])]
    assert len(made) == 3 and sum(mask[:128]) == sum(whole[1])  # of the long one what stands before the cut
    with pytest.raises(UserError, match="none of 1 chats .*the user first"):
        data.tokenize_chat(records(CHAT[2:]), chatty)


def test_a_sample_of_chats_ends_behind_its_bytes():
    some = records(CHAT[1:3], CHAT, texts=["x" * 10, "y"])
    assert list(data.sample_texts(some, 10**6)) == ["\nHi\nHello.", "\nBe brief.\nHi\nHello.\n1+1?\n2", "x" * 10, "y"]
    assert [len(text) for text in data.sample_texts(some, 11)] == [10, 27]


def test_sharegpt_records(tmp_path):
    file = tmp_path / "share.jsonl"
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "system", "value": "x"}]
    file.write_text(json.dumps({"id": 1, "conversations": chat}) + "\n")
    assert [m["role"] for m in data.load_records(str(file))[0][0]["messages"]] == ["user", "assistant", "system"]
    file.write_text(json.dumps({"conversations": [{"from": "human"}]}))
    with pytest.raises(UserError, match="share.jsonl:1: the record is not"):
        data.load_records(str(file))


def test_chats_have_the_hash_of_their_words_however_they_lie_in_memory(tmp_path):
    def records(*lines):
        file = tmp_path / "chats.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return data.load_records(str(file))[0]

    def chat(*texts):
        return {"messages": [{"role": "user", "content": text} for text in texts]}

    first = [chat("ab", "c"), {"text": "d"}, chat("e")]
    whole = data.chats_sha256(records(*first))
    pieces = concatenate_datasets([records(first[2]), records(*first[:2])]).select([1, 2, 0])
    assert data.chats_sha256(pieces) == whole
    longer = records(chat("z"), *first, chat("y"))
    assert data.chats_sha256(longer.select(range(1, 4))) == data.chats_sha256(longer.skip(1).select([0, 1, 2])) == whole
    others = [
        [chat("ab"), chat("c", "e"), first[1]],
        [chat("ab", "c"), chat("e"), first[1]],
        [chat("a", "bc"), *first[1:]],  # the same words, cut elsewhere
        [chat("ab"), chat("c"), *first[1:]],
        [first[0], chat("d"), first[2]],
        first[::-1],
        [{"messages": [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]}, *first[1:]],
    ]
    assert len({whole, *(data.chats_sha256(records(*lines)) for lines in others)}) == 8


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz"])
def test_load_records(tmp_path, caplog, ending):
    lines = [{"messages": CHAT, "more": 1}, {"messages": []}, {"text": "some text"}, {"text": " \n"}]
    lines += [{"text": "some text"}, {"messages": CHAT}]
    content = "\n".join(map(json.dumps, lines)) + "\n\n"
    file = tmp_path / f"chats{ending}"
    file.write_bytes(lzma.compress(content.encode()) if ending.endswith("xz") else content.encode())
    made, facts = data.load_records(str(file))
    assert facts == {"records": 7, "empty": 3, "repeated": 2}
    assert made[:] == {"messages": [CHAT, None], "text": [None, "some text"]}
    assert "3 of 7 records are empty" in caplog.text
    seen = set()
    first, again = (data.load_records(str(file), seen=seen)[0] for _ in range(2))
    assert first[:] == made[:] and len(again) == 0 and again.features == made.features


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not a JSON record"),
        (b"\xff\xfe", "not a JSON record"),
        (rb'{"text": "half a \ud83d character"}', "not a JSON record .*surrogates"),
        (b"[" * 100_000, "not a JSON record .*recursion"),
        (b'{"prompt": "x"}', "the record is not"),
        (b"[1]", "the record is not"),
        (b'{"messages": [{"role": "user"}]}', "the record is not"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "the record is not"),
    ],
)
def test_unreadable_lines_are_named(tmp_path, line, message):
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"chats\.jsonl:2: {message}"):
        data.load_records(str(file))


def test_missing_broken_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        data.load_records(str(tmp_path / "gone.jsonl"))
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "good"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="not a complete xz file"):
        data.load_records(str(tmp_path / "cut.jsonl.xz"))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no record with content"):
        data.load_records(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="cannot be loaded"):
        data.load_records(str(tmp_path / "nowhere"))
