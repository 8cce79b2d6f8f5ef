"""The machinery of stages, with cheap stand-ins for training and measuring."""

import errno
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch
from conftest import ROOT, write_notebook
from safetensors.torch import save_file

from psnb import drafters, manifest, profile, runner, target, train
from psnb.errors import UserError
from psnb.measure import COLUMNS
from psnb.study import Study


def weights(folder, value):
    save_file({"w": torch.full((4,), float(value))}, folder / "model.safetensors")
    (folder / "training.csv").write_text("step,tokens,metric,value\n1,10,loss,2.5\n")


@pytest.fixture
def made(toy, monkeypatch):
    """Training and loading are stand-ins; the list names what was trained and loaded."""
    calls = []

    def train_target(spec, tokenizer, rows, held_out, folder, *, seed, device, log, state):
        calls.append("train target")
        log({"step": spec.train.steps, "tokens": 1, "metric": "loss", "value": 2.0})
        weights(folder, seed)

    def train_drafter(spec, target, rows, held_out, folder, *, seed, device, log, state, warm_start_from=None):
        calls.append(f"train {spec.kind}" + (f" from {warm_start_from.name}" if warm_start_from else ""))
        weights(folder, seed + len(spec.kind))

    monkeypatch.setattr(target, "train", train_target)
    monkeypatch.setattr(train, "train_drafter", train_drafter)
    monkeypatch.setattr(target, "load", lambda path, dtype, device: calls.append("load target") or "the target")
    monkeypatch.setattr(drafters, "load", lambda folder, target: calls.append(f"load {folder.name}") or folder.name)
    monkeypatch.setattr(Study, "tokenizer", lambda self: None)
    monkeypatch.setattr(Study, "_training_rows", lambda self, name="target": (None, None))
    return calls


def test_checkpoints_are_trained_once(toy, made, capsys):
    study = Study.open("toy.toml")
    assert study.drafter("eagle-ps") == study.drafter("eagle-ps") == "eagle-ps"
    trained = ["train target", "load target", "train eagle", "load eagle", "train eagle-ps from eagle", "load eagle-ps"]
    assert made == trained
    assert "target: step 3 of 3, loss 2.000" in capsys.readouterr().out
    made.clear()
    again = Study.open("toy.toml")
    again.drafter("eagle-ps")
    again.drafter("eagle-ps")
    assert made == ["load target", "load eagle-ps"]
    out = capsys.readouterr().out
    assert out.count("eagle-ps: reused (trained 20") == 1
    assert set(again.training().stage) == {"target", "eagle", "eagle-ps"}
    with pytest.raises(UserError, match="unknown drafter 'eagel'; did you mean eagle"):
        again.drafter("eagel")


def test_fresh_trains_what_it_names(toy, made):
    Study.open("toy.toml").drafter("eagle-ps")
    made.clear()
    study = Study.open("toy.toml", fresh=["eagle-ps"])
    study.drafter("eagle-ps")
    study.drafter("eagle-ps")
    assert made == ["load target", "load eagle", "train eagle-ps from eagle", "load eagle-ps"]


def change(toy, old, new):
    text = (toy / "toy.toml").read_text()
    assert old in text
    (toy / "toy.toml").write_text(text.replace(old, new))


def test_the_profiles_text_decides(toy, made, capsys):
    Study.open("toy.toml").drafter("eagle")
    made.clear()
    change(toy, 'device = "cpu"', 'device = "cpu"\nseed = 7')
    Study.open("toy.toml").drafter("eagle")
    assert made == ["train target", "load target", "train eagle", "load eagle"]
    out = capsys.readouterr().out
    assert "target: training again, for the profile changed (seed)" in out
    assert "eagle: training again, for the profile changed (seed, target)" in out
    made.clear()
    change(
        toy,
        "train = { steps = 3 }",
        "train = { steps = 3, log_every = 1, compile = true }\n[data]\nmax_prompt_tokens = 9",
    )
    Study.open("toy.toml").drafter("eagle")
    assert made == ["load target", "load eagle"]  # none of these changes weights


def test_shipped_checkpoints_are_used_as_they_are(toy, made, monkeypatch):
    """Another Python, corpus or machine trains nothing again; nor does another output folder."""
    Study.open("toy.toml").drafter("eagle-ps")
    shutil.rmtree(Study.open("toy.toml").cache, ignore_errors=True)
    made.clear()
    (toy / "constraints.txt").write_text("other==2\n")
    monkeypatch.setattr(sys, "version", "3.99.0 (main, Jan  1 2030, 00:00:00) [GCC 99.0]")
    here = manifest.machine()
    monkeypatch.setattr(manifest, "machine", lambda: {**here, "gpu": "another"})
    study = Study.open("toy.toml", output=toy / "elsewhere")
    study.drafter("eagle-ps")
    assert made == ["load target", "load eagle-ps"]
    assert study.checkpoint("target") == toy / "results" / "toy" / "checkpoints" / "target"
    Study.open("toy.toml", output=toy / "elsewhere", fresh=["eagle"]).drafter("eagle")
    assert (toy / "elsewhere" / "results" / "toy" / "checkpoints" / "eagle").is_dir()
    assert "train eagle" in made


@pytest.mark.parametrize(
    ("damage", "shipped"),
    [("bytes", True), ("bytes", False), ("stage.json", True), ("no stage.json", False), ("lost", True)],
)
def test_damaged_checkpoint_is_an_error_not_a_retraining(toy, made, damage, shipped):
    study = Study.open("toy.toml")
    study.target()
    folder = study.checkpoint("target")
    if shipped:
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "results"], check=True)
    if damage == "bytes":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    elif damage == "lost":
        (folder / "model.safetensors").unlink()
    elif damage == "stage.json":
        (folder / "stage.json").write_text("{")
    else:
        (folder / "stage.json").unlink()
    made.clear()
    with pytest.raises(UserError) as error:
        Study.open("toy.toml").target()
    assert ("missing" if damage == "lost" else "damaged") in str(error.value)
    assert ("git checkout -- results/toy/checkpoints/target" in str(error.value)) is shipped
    assert "--only target --fresh" in str(error.value)
    assert made == []
    Study.open("toy.toml", fresh=["target"]).target()  # the cure
    Study.open("toy.toml").target()
    assert made == ["train target", "load target", "load target"]


@pytest.mark.parametrize("in_git", [True, False])
def test_weights_that_were_never_shipped_are_trained_again(toy, made, monkeypatch, capsys, in_git):
    """A clone of a run whose weights were not published has its records; a failing training leaves them."""
    study = Study.open("toy.toml")
    study.drafter("eagle-ps")
    for name in study.models:
        (study.checkpoint(name) / "model.safetensors").unlink()
    if in_git:
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "results"], check=True)
    made.clear()
    capsys.readouterr()
    study = Study.open("toy.toml")
    assert not any(study.ready(name) for name in study.models)
    assert set(runner.status(study).set_index("stage").done[study.models]) == {"weights not here"}
    before = {path: path.read_bytes() for path in (study.results / "checkpoints").rglob("*") if path.is_file()}
    with monkeypatch.context() as failing:
        failing.setattr(target, "train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.target()
    assert before == {path: path.read_bytes() for path in (study.results / "checkpoints").rglob("*") if path.is_file()}
    Study.open("toy.toml").drafter("eagle-ps")
    assert [call for call in made if call.startswith("train")] == [
        "train target",
        "train eagle",
        "train eagle-ps from eagle",
    ]
    assert capsys.readouterr().out.count("training again, for its weights are not here") == 4  # with the failed one
    assert all(Study.open("toy.toml").ready(name) for name in study.models)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(toy, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    (toy / "models").mkdir()
    text = (toy / "toy.toml").read_text()
    for path in ("results/nowhere", "./nowhere", "models/nowhere", str(toy / "nowhere")):
        (toy / "toy.toml").write_text(text.replace("[target]", f'[target]\npath = "{path}"'))
        for use in (lambda s: s.ready("eagle"), lambda s: s.target(), lambda s: s.tokenizer()):
            with pytest.raises(
                UserError, match=r"target.path = '.*nowhere': no such folder \(/.*; give an existing one"
            ):
                use(Study.open("toy.toml"))
    (toy / "toy.toml").write_text(text.replace("[target]", '[target]\npath = "owner/name"'))
    with pytest.raises(AssertionError, match="the hub was asked"):
        Study.open("toy.toml").ready("eagle")


def test_missing_files_are_refused_before_work(toy, made):
    (toy / "there.jsonl").write_text("{}")
    text = '[data]\nsource = "there.jsonl, ../x/gone.jsonl.xz"\nvalidation = "{}"\nquestions = "{}"\n[target]'
    change(toy, "[target]", text.format("val.jsonl", "asked.jsonl"))
    project = toy.parent
    with pytest.raises(UserError, match=rf"toy: data.source: no such file {project}/x/gone.jsonl.xz; .* hub data set"):
        Study.open("toy.toml").check_files()
    change(toy, ", ../x/gone.jsonl.xz", "")
    with pytest.raises(UserError, match=r"data.validation: no such file \S+/val.jsonl; .*a share of data.source"):
        Study.open("toy.toml").check_files()
    with pytest.raises(UserError, match="data.validation: no such file"):
        Study.open("toy.toml").corpus()
    (toy / "val.jsonl").write_text("{}")
    Study.open("toy.toml").check_files("eagle")  # a training asks no questions
    for stage in ("", "01_first"):
        with pytest.raises(UserError, match=r"data.questions: no such file \S+/asked.jsonl; put it there, or drop"):
            Study.open("toy.toml").check_files(stage)
    (toy / "asked.jsonl").write_text("{}")
    Study.open("toy.toml").check_files()
    (toy / "val.jsonl").unlink()
    Study.open("toy.toml").check_files("report")
    Study.open("toy.toml").drafter("eagle")
    Study.open("toy.toml").check_files("eagle")  # made: no text is read again
    Study.open("toy.toml").check_files("01_first", ["target", "eagle"])
    with pytest.raises(UserError, match="data.validation"):
        Study.open("toy.toml").check_files("eagle-ps")
    change(toy, 'source = "there.jsonl"\nvalidation = "val.jsonl"', 'source = "hub/set"')
    Study.open("toy.toml").check_files()


def test_loading_errors_name_file_and_cure(toy, made, monkeypatch):
    def broken(path, dtype, device):
        raise RuntimeError("size mismatch for w\nlong explanation")

    monkeypatch.setattr(target, "load", broken)
    with pytest.raises(UserError, match=r"checkpoints/target does not load \(size mismatch for w\): .*--only target"):
        Study.open("toy.toml").target()


def test_seal_declares_weights_that_came_otherwise(toy, made):
    folder = toy / "results" / "toy" / "checkpoints" / "target"
    folder.mkdir(parents=True)
    weights(folder, 1)
    study = Study.open("toy.toml")
    with pytest.raises(UserError, match="missing or damaged"):
        study.target()
    study.seal("target", seconds=60)
    study.target()
    assert made == ["load target"]


def numbers(calls, value=1 / 3):
    def make():
        calls.append("measured")
        return pd.DataFrame(
            {"method": ["plain", "eagle"], "k": [0, 4], "value": [value, float("nan")], "note": ["", "NA"]}
        )

    return make


def test_table_is_measured_once(toy, made, capsys):
    calls = []
    first = Study.open("toy.toml").table("times", {"ks": [1, 2]}, numbers(calls))
    second = Study.open("toy.toml").table("times", {"ks": [1, 2]}, numbers(calls))
    assert calls == ["measured"]
    pd.testing.assert_frame_equal(first, second)
    assert list(second.note) == ["", "NA"]
    assert second.value.isna().tolist() == [False, True]
    assert "times: reused (20" in capsys.readouterr().out
    with pytest.raises(TypeError):
        Study.open("toy.toml").table("times", {"ks": object()}, numbers(calls))


def test_table_is_measured_again_when_it_must(toy, made, monkeypatch):
    calls = []

    def measured(ks=(1, 2), **more):
        calls.clear()
        Study.open("toy.toml", **more).table("times", {"ks": list(ks)}, numbers(calls))
        return bool(calls)

    assert measured()
    assert measured(ks=[1, 3])
    assert not measured(ks=[1, 3])
    assert measured(ks=[1, 3], fresh=["times"])
    Study.open("toy.toml").target()  # weights that were not there then cannot have been used
    assert not measured(ks=[1, 3])
    assert measured(ks=[1, 2])
    change(toy, "title", "seed = 8\ntitle")
    assert measured()
    Study.open("toy.toml").target()  # trained anew: other weights
    assert measured()
    (toy / "results" / "toy" / "times.csv").write_text("method,k,value,note\n")
    assert measured()  # somebody changed the file
    (toy / "constraints.txt").write_text("other==2\n")
    assert measured()
    assert not measured()
    change(toy, 'title = "toy"', 'title = "toy"\nstages = ["01_first"]')
    change(toy, "steps = 3", "log_every = 7, steps = 3")
    assert not measured()  # neither changes a number
    monkeypatch.setattr(manifest, "machine_name", lambda facts: "another machine")
    assert measured()


def test_a_notebook_stands_on_the_files_that_it_used(toy, made, monkeypatch):
    study, artefact = Study.open("toy.toml"), toy / "results" / "toy" / "notebooks" / "01_first.ipynb"
    manifest.write_text(artefact, "{}")
    log = study.results / "training_log.md"
    monkeypatch.setenv("PSNB_NOTEBOOK", "01_first")
    study.table("01_times", {}, numbers([]))
    assert study.uses(log) == log and not log.is_file()
    monkeypatch.delenv("PSNB_NOTEBOOK")
    study.uses(log.with_name("other.csv"))  # a person's own notebook notes nothing
    files = study.used("01_first")
    assert files.keys() == {"01_times.csv", "training_log.md"} and files["training_log.md"] == ""
    assert study.used("01_first") == {}
    study.done("01_first", "key", artefact, 0.0, files=files)
    assert study.current("01_first", "key", artefact)
    log.write_text("what was tried")
    assert not study.current("01_first", "key", artefact)
    log.unlink()
    assert study.current("01_first", "key", artefact)
    (study.results / "01_times.csv").write_text("of another run")
    assert not study.current("01_first", "key", artefact)


def test_fresh_begins_at_the_first_step(toy, made, monkeypatch):
    study, there = Study.open("toy.toml", fresh=["eagle"]), []
    state = study._state("eagle")
    state.mkdir(parents=True)
    monkeypatch.setattr(train, "train_drafter", lambda *a, state, **k: there.append(state.is_dir()) or weights(a[4], 1))
    study.target()
    state = study._state("eagle")  # it is named by the target's weights too
    state.mkdir(parents=True)
    study.drafter("eagle")
    assert there == [False]


def test_a_folders_target_is_known_by_all_its_weights(toy, made):
    folder = toy / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    change(toy, "[target]", '[target]\npath = "model"')
    found = set()
    for weights_file, content in (("pytorch_model.bin", b"1"), ("pytorch_model.bin", b"2"), ("config.json", b"{ }")):
        (folder / weights_file).write_bytes(content)
        found.add(Study.open("toy.toml")._target_id())
    assert len(found) == 3


def test_a_clones_numbers_do_not_count_as_measured_here(toy, made):
    calls = []
    study = Study.open("toy.toml")
    study.table("times", {}, numbers(calls))
    shutil.rmtree(study.cache)  # what git does not carry
    study = Study.open("toy.toml")
    study.table("times", {}, numbers(calls))
    assert calls == ["measured", "measured"]


def test_a_clones_records_stay_until_their_notebook_is_run(toy, made):
    theirs = {"machine": "an H100", "seconds": 3}
    tables = {"01_runs": theirs, "02_runs": {**theirs, "notebook": "02_second"}}
    told = {"corpus": {"seconds": 1}, "01_first": theirs, "02_second": theirs, "07_gone": theirs, **tables}
    write_notebook(toy / "notebooks" / "03_report.ipynb", "")
    study = Study.open("toy.toml")
    prompts = {"expected": "", "got": "abc"}
    study.manifest.start(machine={"cpu": "theirs"}, stages=told, data={"corpus": {"bytes": 5}}, prompts_sha256=prompts)
    study.manifest.finish("complete")
    study.summary("01_first", rows("b"))  # a person's own notebook
    found = study.manifest.read()
    assert (found["status"], found["profile"], found["machine"]["cpu"]) == ("partial", "toy", manifest.machine()["cpu"])
    assert found["stages"] == {name: told[name] for name in told if name != "07_gone"}
    assert (found["data"], found["prompts_sha256"]) == ({"corpus": {"bytes": 5}}, prompts)
    assert found["warnings"] == [f"{n} was measured elsewhere: on an H100" for n in ("01_first", "02_second")]
    (toy / "done").touch()
    study.done("01_first", "key", toy / "done", 0.0)
    facts = study.facts()
    assert list(facts["stages"]) == ["corpus", "02_second", "02_runs", "01_first"]  # 01_runs was not made this time
    assert study.elsewhere() == {"02_second": "an H100"}
    study.done("02_second", "key", toy / "done", 0.0)
    facts = study.facts()  # what the report, not made here yet, tells of
    assert (list(facts["stages"]), facts["data"], facts["warnings"]) == (["01_first", "02_second"], {}, [])


def rows(method):
    return pd.DataFrame([{**dict.fromkeys(COLUMNS, ""), "method": method, "value": 1.5}])[list(COLUMNS)]


def test_summary_replaces_a_stages_rows(toy, made):
    study = Study.open("toy.toml")
    study.summary("02_second", rows("eagle"))
    study.summary("01_times", rows("medusa").assign(value=1 / 3))
    shutil.rmtree(study.cache, ignore_errors=True)  # a clone
    path = study.results / "summary.csv"
    gone = rows("ours").assign(stage="07_gone")
    manifest.write_frame(path, pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), gone]))
    study = Study.open("toy.toml")
    study.summary("02_second", pd.concat([rows("eagle-ps"), rows("plain").assign(value=2 / 3)]))
    found = pd.read_csv(path, dtype=str)
    assert list(found.columns) == list(COLUMNS)
    assert list(zip(found.stage, found.method, found.value, strict=True)) == [
        ("01_times", "medusa", "0.333333"),  # a stage of 01_first
        ("02_second", "eagle-ps", "1.5"),
        ("02_second", "plain", "0.666667"),
    ]
    with pytest.raises(UserError, match="columns missing or surplus: colour, unit"):
        study.summary("02_second", rows("x").drop(columns="unit").assign(colour=1))


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    from psnb import manifest
    from psnb.study import Study
    study = Study.open("toy.toml")
    def make(folder):
        (folder / "half").write_text("half")
        if sys.argv[1] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "half").write_text("whole")
        return {{"rows": 3}}
    study._data("first", [1], lambda folder: (folder / "x").write_text("1") and {{}})
    print((study._data("second", [2], make) / "half").read_text())
"""


def test_killed_mid_stage_then_resumed_gives_the_same(toy):
    script = textwrap.dedent(KILLED).format(root=str(ROOT), tests=str(ROOT / "tests"))

    def go(how):
        return subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True)

    killed = go("die")
    assert killed.returncode == -9
    cache = toy / "results" / "toy" / ".cache"
    assert not (cache / "second").exists()
    resumed = go("live")
    assert resumed.returncode == 0, resumed.stderr
    assert "first: reused" in resumed.stdout
    assert "second: done" in resumed.stdout
    assert resumed.stdout.endswith("whole\n")
    assert sorted(p.name for p in cache.iterdir()) == ["first", "second"]  # nothing half-made is left
    facts = json.loads((cache / "second" / "stage.json").read_text())
    shutil.rmtree(cache)
    go("live")
    once = json.loads((cache / "second" / "stage.json").read_text())
    assert {k: once[k] for k in ("key", "rows")} == {k: facts[k] for k in ("key", "rows")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_disk_trouble_loses_nothing_finished(toy, made, monkeypatch, number):
    Study.open("toy.toml").target()

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(manifest.os, "replace", refuse)
    with pytest.raises(manifest.DiskError, match="checkpoints/.*eagle.*: .*what was finished is kept"):
        Study.open("toy.toml").drafter("eagle")
    monkeypatch.undo()
    left = sorted(p.name for p in (toy / "results" / "toy" / "checkpoints").iterdir())
    assert left == ["target"]


def test_interrupted_training_leaves_nothing(toy, made, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        Study.open("toy.toml").target()
    assert list((toy / "results" / "toy" / "checkpoints").iterdir()) == []


def test_prompts_of_another_version_are_a_warning(toy, monkeypatch):
    study = Study.open("toy.toml")
    manifest.write_json(study.cache / "prompts" / "stage.json", {"sha256": "a" * 64, "at": "", "seconds": 0, "key": ""})
    assert study.facts()["warnings"] == []  # the profile names no sha256
    change(toy, "[target]", '[data]\nprompts_sha256 = "b"\n[target]')
    facts = Study.open("toy.toml").facts()
    assert "the prompts differ from the profile's (sha256 aaaaaaaaaaaa, not b)" in facts["warnings"][0]
    assert facts["prompts_sha256"] == {"expected": "b", "got": "a" * 64}


def test_chats_become_rows_with_a_loss_mask(toy):
    def record(n):
        turns = [("user", f"How many {n}?"), ("assistant", "Quite a few, I would say.")]
        return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"

    (toy / "chats.jsonl").write_text("".join(record(n) for n in (*range(60), *range(9))))  # nine of them twice
    change(toy, "[target]", '[data]\nsource = "chats.jsonl"\nvocab_size = 260\nlength = 64\n[target]')
    study = Study.open("toy.toml")
    train = study.rows("train")
    assert set(train.column_names) == {"input_ids", "document", "loss_mask"}
    chosen = [i for i, m in zip(train[0]["input_ids"], train[0]["loss_mask"], strict=True) if m]
    assert study.tokenizer().decode(chosen).startswith("Quite a few, I would say.<|endoftext|>")
    assert {name: len(split) for name, split in study.corpus().items()} == {"train": 57, "held_out": 3}
    assert study.made("corpus")["empty"] == 0 and study.made("tokens-train")["cut"] == 0
    assert study.made("corpus")["repeated"] == 9
    [prompt] = study.prompts()["prompt"][:1]
    assert re.fullmatch(r"<\|user\|>\nHow many \d+\?<\|endoftext\|><\|assistant\|>\n", prompt)
    asked = {"question_id": 1, "category": "qa", "turns": ["Why?"]}
    (toy / "question.jsonl").write_text(json.dumps(asked))
    change(toy, "[data]", '[data]\nquestions = "question.jsonl"')
    assert Study.open("toy.toml").prompts()["id"] == ["qa-000"]
    change(toy, '"question.jsonl"', '"gone.jsonl"')
    with pytest.raises(UserError, match="data.questions: no such file .*gone.jsonl"):
        Study.open("toy.toml").prompts()


def test_a_mix_of_chat_files_with_its_own_held_out_and_a_code_task(toy, monkeypatch):
    def record(word, n):
        turns = [{"role": "user", "content": f"Say {word} {n}."}, {"role": "assistant", "content": f"{word} {n}, done"}]
        return json.dumps({"messages": turns}) + "\n"

    with lzma.open(toy / "a.jsonl.xz", "wt") as file:
        file.writelines(record("alpha", n) for n in range(30))
    (toy / "b.jsonl").write_text("".join(json.dumps({"text": f"beta text number {n} " * 6}) + "\n" for n in range(30)))
    (toy / "val.jsonl").write_text("".join(record("gamma", n) for n in range(5)) + '{"text": ""}\n')
    (toy / "question.jsonl").write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["Why?"]}))
    text = 'source = "a.jsonl.xz, b.jsonl"\nvalidation = "val.jsonl"\nquestions = "question.jsonl"\n'
    text += 'held_out = ["websocket-client"]\nprompts_per_family = 7\nvocab_size = 280\nlength = 128'
    change(toy, "[target]", f"[data]\n{text}\n[target]")
    (toy / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    monkeypatch.setattr("psnb.study.MANY_CHATS", 20)  # several processes
    study = Study.open("toy.toml")
    corpus, about = study.corpus(), study.made("corpus")
    assert (about["records"], about["empty"], about["documents"]) == (66, 1, {"train": 60, "held_out": 5})
    files = ("a.jsonl.xz", "b.jsonl", "val.jsonl")
    assert about["sha256"].keys() == {"train", "held_out", *files}
    assert all(about["sha256"][name] == manifest.sha256_file(toy / name) for name in files)
    assert study.facts()["data"]["corpus"]["sha256"] == about["sha256"]
    kinds = ["a" if r["messages"] else "b" for r in corpus["train"]]
    assert sorted(kinds) == ["a"] * 30 + ["b"] * 30 and len(set(kinds[:30])) == 2  # shuffled
    assert all("gamma" in r["messages"][0]["content"] for r in corpus["held_out"])
    words = study.tokenizer().decode([t for row in study.rows("train")["input_ids"] for t in row])
    assert all(f"alpha {n}, done" in words and f"number {n} " in words for n in range(30))
    made = study.prompts()
    assert made["id"] == ["qa-000"] + [f"code-{i:03d}" for i in range(7)]
    assert set(made["package"][1:]) == {"websocket-client"} and set(made["family"]) == {"qa", "code"}
    (toy / "question.jsonl").write_text(json.dumps({"question_id": 1, "category": "code", "turns": ["Why?"]}))
    with pytest.raises(UserError, match="category 'code' is what held-out code is called"):  # their ids would be alike
        Study.open("toy.toml").prompts()
    (toy / "b.jsonl").write_text('{"text": "another text"}\n')
    assert Study.open("toy.toml").corpus()["train"].num_rows == 31


def test_weights_are_trained_again_for_another_text(toy, made, monkeypatch):
    def text(path, words, count):
        path.write_text("".join(json.dumps({"text": f"{words} {n}"}) + "\n" for n in range(count)))

    for name, count in (("a", 3), ("b", 4)):
        (toy / name).mkdir()
        text(toy / name / "chats.jsonl", name, count)
    change(toy, "[target]", '[data]\nsource = "a/chats.jsonl, b/chats.jsonl"\nlength = 64\n[target]')

    def models():
        """Those that a study of now trains."""
        made.clear()
        study = Study.open("toy.toml")
        study.corpus()
        study.drafter("eagle")
        return [call for call in made if call.startswith("train")]

    assert models() == ["train target", "train eagle"] and models() == []
    assert len(Study.open("toy.toml").corpus()["train"]) == 6
    text(toy / "a" / "chats.jsonl", "other", 23)
    assert not Study.open("toy.toml").ready("eagle")
    assert models() == ["train target", "train eagle"] and Study.open("toy.toml").ready("eagle")
    assert len(Study.open("toy.toml").corpus()["train"]) == 25
    change(toy, "length = 64", 'validation = "val.jsonl"\nlength = 64')
    text(toy / "val.jsonl", "held out", 3)
    assert models() == ["train target", "train eagle"]
    text(toy / "val.jsonl", "held out too", 3)
    assert models() == []  # nothing is trained on it
    text(toy / "val.jsonl", "other", 1)  # but what it holds was trained on
    assert not Study.open("toy.toml").ready("eagle") and models() == ["train target", "train eagle"]
    assert len(Study.open("toy.toml").corpus()["train"]) == 26 and models() == []
    (toy / "b" / "chats.jsonl").unlink()  # weights do without the text
    assert Study.open("toy.toml").ready("eagle")


def test_one_chat_is_too_few(toy):
    (toy / "one.jsonl").write_text('{"text": "alone"}\n{"text": ""}\n')
    change(toy, "[target]", '[data]\nsource = "one.jsonl"\nlength = 64\n[target]')
    with pytest.raises(UserError, match="one.jsonl: 1 different records and no validation file; give more"):
        Study.open("toy.toml").corpus()


def test_a_command_is_for_this_very_study(toy, made):
    assert Study.open("toy.toml").command("run PROFILE") == "`psnb run --profile toy.toml`"
    elsewhere = Study.open("toy.toml", output=toy / "other")
    assert elsewhere.command("run PROFILE") == f"`psnb run --profile toy.toml --output {toy / 'other'}`"
    elsewhere.drafter("eagle")
    weights(elsewhere.checkpoint("eagle"), 99)
    with pytest.raises(UserError, match=rf"`psnb run --profile toy.toml --only eagle --fresh --output {toy}/other`"):
        Study.open("toy.toml", output=toy / "other").drafter("eagle")
    assert Study.open("toy.toml", output=toy / "a b").command("list").endswith("a b'`")
    status = runner.status(elsewhere).set_index("stage")
    assert status.done["eagle"] == "damaged" and status.done["target"] == "yes"  # it has no spec.json here


def test_a_gpu_that_is_not_there_and_a_file_for_a_folder_are_refused(toy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--output toy.toml: a file; give a folder"):
        Study.open("toy.toml", output="toy.toml")
    change(toy, 'device = "cpu"', 'device = "cuda"')
    with pytest.raises(UserError, match="device 'cuda', but PyTorch sees 0 GPUs"):
        Study.open("toy.toml").device  # noqa: B018


def test_a_validation_file_is_part_of_the_weights_key(toy):
    before = Study.open("toy.toml")._spec("target")
    assert "validation" not in before["data"]
    change(toy, "[target]", '[data]\nvalidation = "val.jsonl"\n[target]')
    assert Study.open("toy.toml")._spec("target")["data"]["validation"] == "val.jsonl"


def test_code_rows_and_a_sample_of_them(toy):
    change(toy, "[target]", '[data]\nheld_out = ["six"]\npackages = ["tqdm"]\nvocab_size = 300\nlength = 64\n[target]')
    (toy / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    study = Study.open("toy.toml")
    assert set(study.corpus()["held_out"]["package"]) == {"six"}
    assert len(study.rows("train", 3)) < len(study.rows("train"))
    assert len(pd.read_csv(study.results / "corpus.csv").sha256[0]) == 64
    change(toy, '"tqdm"', '"tqmd"')
    with pytest.raises(UserError, match="package 'tqmd' is not in the pinned environment; did you mean tqdm"):
        Study.open("toy.toml").corpus()


def test_where_things_go(toy, monkeypatch):
    (toy / "notebooks" / "deep").mkdir()
    monkeypatch.chdir(toy / "notebooks" / "deep")
    study = Study.open(profile.load("smoke"))
    assert (study.root, study.output) == (toy, toy)
    assert study.results == toy / "results" / "smoke"
    assert study.figures == toy / "figures" / "smoke"
    assert Study.open("smoke", "..").output == toy / "notebooks"
    assert study.device.type == "cpu"


def test_a_table_of_another_profile(tmp_path):
    study = Study.open("smoke", tmp_path)
    with pytest.raises(
        UserError, match=r"other/04_runs\.csv: not there; `psnb run --profile other --output /\S+` measures it"
    ):
        study.measured("04_runs", "other")
    manifest.write_frame(tmp_path / "results" / "other" / "04_runs.csv", pd.DataFrame({"tree": ["", "chain"]}))
    assert study.measured("04_runs", "other").tree.tolist() == ["", "chain"]


def test_a_stage_says_within_which_it_was_made(tmp_path):
    """Seconds of a stage that another one made on its way are not to be counted twice (report.took)."""
    study = Study.open("smoke", tmp_path)

    def outer(folder):
        study._make("inner", tmp_path / "inner", "key", lambda folder: {}, "making it")
        return {}

    study._make("outer", tmp_path / "outer", "key", outer, "making it")
    inside, outside = (json.loads((tmp_path / name / "stage.json").read_text()) for name in ("inner", "outer"))
    assert inside["within"] == "outer" and "within" not in outside


def test_a_cpu_is_asked_once_for_its_format(toy, monkeypatch):
    """Another answer later, on a busy machine say, changes nothing until the machine does, or all is measured again."""
    answers, facts = [True, False, True], manifest.machine()
    monkeypatch.setattr("psnb.joined.bfloat16_pays", lambda *sizes: answers.pop(0))
    study = Study.open("toy.toml")
    assert [Study.open("toy.toml").fastest().profile.dtype for _ in range(2)] == ["bfloat16"] * 2
    monkeypatch.setattr(manifest, "machine", lambda: {**facts, "cpu": "another"})
    assert study.fastest().profile.dtype == Study.open("toy.toml").fastest().profile.dtype == "float32"
    runner._forget(study, "01_first")
    assert study.fastest().profile.dtype == "float32"
    runner._forget(study, None)
    assert study.fastest().profile.dtype == "bfloat16" and not answers
