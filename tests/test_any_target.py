"""Any decoder-only checkpoint: saved as its user would, named in a profile, through the study to decoded text."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import toys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from psnb import data, decode, manifest, profile, runner
from psnb.errors import UserError
from psnb.study import Study

ROOT = Path(__file__).parents[1]
PROFILE = """
title = "toy"
device = "cpu"
[data]
source = "chats.jsonl"
length = 96
prompts_per_family = 2
max_prompt_tokens = 80
{data}
[target]
path = "model"
{target}
[drafters.eagle-ps]
kind = "eagle-ps"
k = 3
train = {{ steps = 3, rows = 4, log_every = 1 }}
"""


@pytest.fixture
def project(toy):
    """Chats, and the tokenizer of a model that is still to be saved."""
    chats = [[f"What is {i} + {j}?", f"It is {i + j}, the sum of {i} and {j}."] for i in range(8) for j in range(8)]
    text = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), chat, strict=True)]})
        for chat in chats
    ]
    (toy / "chats.jsonl").write_text("\n".join(text))
    tokenizer = data.train_tokenizer([t for chat in chats for t in chat], 280)
    tokenizer.chat_template = data.CHAT_TEMPLATE
    return toy, tokenizer


def save(project, cls, template=True, vocab=280, **changes):
    folder, tokenizer = project
    torch.manual_seed(0)
    config = toys.config(cls, vocab_size=vocab, eos_token_id=0, head_dim=8, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    if not template:
        tokenizer.chat_template = None
        (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)  # of an earlier save
    tokenizer.save_pretrained(folder / "model")


def study(project, data="", target=""):
    (project[0] / "mine.toml").write_text(PROFILE.format(data=data, target=target))
    return Study.open("mine.toml")


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen2Config, MistralConfig])
@pytest.mark.parametrize("responses", ["corpus", "target"])
def test_from_a_folder_to_decoded_text(project, cls, responses):
    save(project, cls)
    made = study(project, f'responses = "{responses}"\nresponse_temperature = 1.0')
    target, drafter = made.target(), made.drafter("eagle-ps")
    assert target.model.config.model_type == cls.model_type
    assert made.training().step.max() == 3
    [prompt] = made.prompts().to_pandas().input_ids[:1]
    settings = decode.Settings(k=3, temperature=0.7, max_new_tokens=12)
    plain = decode.autoregressive(target, prompt.tolist(), settings)
    assert decode.speculative(target, drafter, prompt.tolist(), settings).tokens == plain.tokens
    if responses == "target":
        facts = made.made("responses-train")
        assert facts["written"] > 1000 and facts["rows"] > 10
        assert Study.open("mine.toml").ready("eagle-ps")
        assert not study(project).ready("eagle-ps")  # the corpus's own words are another training
        folder = made.checkpoint("eagle-ps")
        weights = manifest.read_json(folder / "stage.json")["weights"]
        shutil.rmtree(folder)
        words = 'responses = "target"\nresponse_temperature = 1.0'
        study(project, words).computing_in("bfloat16").drafter("eagle-ps")  # asked for so, trained as before
        assert manifest.read_json(folder / "stage.json")["weights"] == weights
        ends = project[0] / "model" / "generation_config.json"
        ends.write_text(json.dumps({**json.loads(ends.read_text()), "eos_token_id": [0, 7]}))
        assert not Study.open("mine.toml").ready("eagle-ps")  # texts would end elsewhere


def test_a_model_without_a_budget_is_refused_before_its_text_is_read(project, monkeypatch):
    save(project, LlamaConfig)
    (project[0] / "mine.toml").write_text(PROFILE.format(data="", target="").split("train =")[0])
    monkeypatch.setattr(Study, "corpus", lambda self: pytest.fail("the text was read"))
    with pytest.raises(UserError, match="profile mine: eagle-ps has no training budget"):
        Study.open("mine.toml").drafter("eagle-ps")


def test_two_processes_do_not_train_one_model_in_one_folder(project):
    save(project, LlamaConfig)
    made = study(project)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        written = made.results / "checkpoints" / f".eagle-ps.{other.pid}.tmp"
        written.mkdir(parents=True)
        with pytest.raises(UserError, match=f"^eagle-ps: another process trains it in .*, delete {written}"):
            made.drafter("eagle-ps")
    made.drafter("eagle-ps")
    assert not written.exists()  # what a process left that is gone does not count, and goes


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_drafters_are_trained_on_a_cpu_whatever_they_decode_in(project, dtype):
    save(project, LlamaConfig)
    (project[0] / "mine.toml").write_text(f'dtype = "{dtype}"\n' + PROFILE.format(data="", target=""))
    made = Study.open("mine.toml")
    drafter = made.drafter("eagle-ps")
    assert str(drafter.fc.weight.dtype) == f"torch.{dtype}" and made.training().step.max() == 3


def test_a_folder_is_found_from_the_projects(project, monkeypatch, tmp_path):
    save(project, LlamaConfig)
    made = study(project)
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)  # an empty one does not come first
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("psnb.study.project", lambda: project[0])
    elsewhere = Study.open(str(project[0] / "mine.toml"), output=tmp_path / "out")
    assert elsewhere.target().hidden_size == 32 and elsewhere._target_id() == made._target_id()
    assert made._target_id().startswith("model@") and made.sizes() == (32, 48, 2, 280)


def test_vicunas_template_is_fastchats(project):
    tokenizer = project[1]
    tokenizer.chat_template = profile.load("hub-vicuna-7b").target.chat_template
    chat = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(("Hi", "Hello.", "Bye", "Ciao."))
    ]
    text = data.render(chat, tokenizer, False)
    assert text.endswith(
        "user's questions. USER: Hi ASSISTANT: Hello.<|endoftext|>USER: Bye ASSISTANT: Ciao.<|endoftext|>"
    )
    ids, mask = data.chat_tokens(chat, tokenizer)
    assert "".join(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])).count("<|endoftext|>") == 2


def test_what_cannot_be_served_is_refused_before_any_training(project):
    with pytest.raises(UserError, match="target model does not load .*a hub name that can be fetched"):
        study(project).drafter("eagle-ps")
    with pytest.raises(UserError, match="target.path = 'model' is no folder, and cannot be fetched from the hub"):
        study(project).ready("eagle-ps")
    save(project, Gemma2Config)
    with pytest.raises(UserError, match="caps its logits"):
        study(project).drafter("eagle-ps")
    save(project, LlamaConfig, vocab=270)
    with pytest.raises(UserError, match="its tokenizer has 280 tokens, the model 270"):
        study(project).drafter("eagle-ps")
    save(project, MistralConfig, sliding_window=64)
    with pytest.raises(UserError, match="rows of 96 tokens, but the target's context has 64"):
        study(project).drafter("eagle-ps")
    save(project, LlamaConfig, template=False)
    with pytest.raises(UserError, match="no chat template: give the profile the one"):
        study(project).drafter("eagle-ps")
    template = json.dumps(data.CHAT_TEMPLATE)
    own = study(project, target=f"chat_template = {template}")
    own.drafter("eagle-ps")
    assert own.ready("eagle-ps")  # and no longer where chats are written in another way
    assert not study(project, target=f'chat_template = {template[:-1]} "').ready("eagle-ps")
    with pytest.raises(UserError, match="profile mine has no drafter 'eagel-ps'; did you mean eagle-ps"):
        own.chosen(["eagel-ps"])
    assert own.chosen(["eagle", "eagle-ps"]) == own.chosen(["medusa"]) == ["eagle-ps"]
    with pytest.raises(UserError, match="responses 'targt'; did you mean target"):
        study(project, 'responses = "targt"')


def test_chats_that_are_cut_or_dropped_are_told(project, capsys):
    save(project, LlamaConfig)
    more = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "It is 3, the sum. " * 40}]
    with open(project[0] / "chats.jsonl", "a") as file:
        file.write("\n" + json.dumps({"messages": more}) + "\n" + json.dumps({"messages": more[:1]}))
    study(project).rows("train")
    told = "tokens of train: 1 chats cut at 96 tokens; dropped: 0 that the template refuses, 1 with nothing to train on"
    assert told in capsys.readouterr().out


AT_THE_END = """
import atexit, os, pathlib, sys
rank, tasks = os.environ.get("LOCAL_RANK"), pathlib.Path("/proc/self/task")
def names(): return " ".join((task / "comm").read_text() for task in tasks.iterdir()) if tasks.is_dir() else ""
if rank: atexit.register(lambda: pathlib.Path({folder!r}, "threads." + rank).write_text(names()))
if rank == "1" and "FALL" in os.environ: os.abort()
"""


def test_train_in_one_process_and_two_and_what_they_refuse(project, monkeypatch, capfd):
    save(project, LlamaConfig)
    study(project)
    with pytest.raises(UserError, match="--stage eagel: no model that this profile trains; did you mean eagle-ps"):
        runner.train("mine.toml", "eagel")
    with pytest.raises(UserError, match="--processes 0"):
        runner.train("mine.toml", "eagle-ps", 0)
    (project[0] / "mine.toml").write_text((project[0] / "mine.toml").read_text().replace("rows = 4", "rows = 3"))
    with pytest.raises(UserError, match=r"^train.rows = 3 cannot be cut evenly in 2 process"):
        runner.train("mine.toml", "eagle-ps", 2)
    assert not Study.open("mine.toml").checkpoint("eagle-ps").exists()
    study(project)
    folder = Study.open("mine.toml").checkpoint("eagle-ps")
    assert runner.train("mine.toml", "eagle-ps") == folder
    assert Study.open("mine.toml").ready("eagle-ps")
    one = load_file(folder / "drafter.safetensors")
    monkeypatch.setenv("PYTHONPATH", f"{project[0]}:{ROOT}")
    (project[0] / "sitecustomize.py").write_text(AT_THE_END.format(folder=str(project[0])))
    capfd.readouterr()
    assert runner.train("mine.toml", "eagle-ps", 2, fresh=True) == folder
    told = [line.split(":")[0] for line in capfd.readouterr().out.splitlines() if ": reused" in line]
    assert "corpus" in told and len(told) == len(set(told))  # by the process that asked, not by each
    for rank in "01":  # gloo's threads are gone before the interpreter ends: they can abort it
        assert "gloo" not in (project[0] / f"threads.{rank}").read_text()
    for name, weight in load_file(folder / "drafter.safetensors").items():
        torch.testing.assert_close(weight, one[name], atol=1e-3, rtol=0)
    monkeypatch.setenv("FALL", "1")
    with pytest.raises(UserError, match=r"^training eagle-ps in 2 processes failed: \(exitcode: -6\) local_rank: 1"):
        runner.train("mine.toml", "eagle-ps", 2, fresh=True)
    assert Study.open("mine.toml").ready("eagle-ps")  # the one before is kept


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_of_a_training_outlives_the_one_that_was_stopped(project, how):
    """Stopped alone, as from a notebook: a terminal's Ctrl-C would reach all of them."""
    save(project, LlamaConfig)
    study(project)
    text = (project[0] / "mine.toml").read_text().replace("steps = 3", "steps = 100000")
    (project[0] / "mine.toml").write_text(text.replace("log_every = 1", "log_every = 50"))
    command = "-m psnb train --profile mine.toml --stage eagle-ps --processes 2"
    with subprocess.Popen(
        [sys.executable, *command.split()],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    ) as asked:
        try:
            assert any("step 50 of" in line for line in asked.stdout)
            others = psutil.Process(asked.pid).children(recursive=True)
            assert len(others) >= 3  # a launcher and its two
            asked.send_signal(how)
            assert asked.wait(20) == (130 if how == signal.SIGINT else -how)
            assert not psutil.wait_procs(others, timeout=20)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(asked.pid, signal.SIGKILL)


def test_the_words_of_the_process_that_fell_first_are_told():
    launched = (
        "Loading weights: 100%\n[rank0]: RuntimeError: Connection closed by peer\n[rank1]: KeyError: 3\n"
        "W1128 11:33:22.2 75 torch/distributed/elastic/multiprocessing/api.py:1027] Sending process 76 SIGTERM\n"
        "E1128 11:33:22.5 75 site/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) "
        "local_rank: 1 (pid: 77)\nTraceback (most recent call last):\n  the launcher's own\n"
    )
    assert runner._cause(launched) == "(exitcode: 1) local_rank: 1 (pid: 77)\n[rank1]: KeyError: 3"
    assert runner._cause("No module named torch.distributed.run\n") == "No module named torch.distributed.run"
