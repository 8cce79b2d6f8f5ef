"""The command line, the two `make` commands' plumbing, and what a user's mistakes look like."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml
from conftest import ROOT, psnb, write_notebook
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from psnb import runner
from psnb.__main__ import main
from psnb.errors import UserError
from psnb.manifest import RunManifest, digest
from psnb.study import Study

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def plain_report(monkeypatch):
    """A stand-in for rendering."""
    from psnb import report

    def html(notebooks, facts, path):
        path.write_text(" ".join(p.stem for p in notebooks))

    monkeypatch.setattr(report, "html", html)


def refused(capsys, *arguments, code=2):
    assert main(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("psnb: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "smoek"], "unknown profile 'smoek'; did you mean smoke?"),
        (["list", "--profile", "nothing.toml"], "nothing.toml does not exist"),
        (["run", "--profile", "toy.toml", "--only", "eagel"], "unknown stage 'eagel'; did you mean eagle"),
        (["run", "--profile", "toy.toml", "--only", "02"], "unknown stage '02'"),
        (["run", "--profile", "toy.toml", "-p", "n=3"], "write it as NOTEBOOK.name=value"),
        (["run", "--profile", "toy.toml", "-p", "01_fist.n=3"], "unknown notebook '01_fist'; did you mean 01_first"),
        (["run", "--profile", "toy.toml", "-p", "01_first.m=3"], "unknown parameter 01_first.m; valid names: ks, n"),
        (["run", "--profile", "toy.toml", "-p", "01_first.output=3"], "unknown parameter 01_first.output"),
        (["run", "--profile", "toy.toml", "-p", "01_first.n=many"], "01_first.n wants int, not 'many'"),
        (["run", "--profile", "toy.toml", "-p", "01_first.n=1.5"], "01_first.n wants int, not 1.5"),
        (["run", "--profile", "toy.toml", "-p", "01_first.ks=3"], r"01_first.ks wants list\[int\], not 3"),
        (["run", "--profile", "toy.toml", "-p", "01_first.ks=[1,'a']"], r"01_first.ks wants list\[int\]"),
        (["run", "--profile", "toy.toml", "-p", "01_first.rate=True"], "01_first.rate wants float, not True"),
        (
            ["run", "--profile", "toy.toml", "--only", "02_second", "-p", "01_first.n=3"],
            "02_second does not run 01_fir",
        ),
        (["run", "--profile", "toy.toml", "--only", "eagle", "-p", "01_first.n=3"], "-p 01_first.n: --only eagle does"),
        (["bench", "--profile", "toy.toml", "--methods", "eagel"], "unknown drafter 'eagel'; did you mean eagle"),
        (["bench", "--profile", "toy.toml", "--nodes", "-3"], "nodes = -3"),
        (["bench", "--profile", "toy.toml", "--temperatures", "nan"], "none may be below 0"),
        (["list", "--profile", "toy.toml", "--output", "toy.toml"], "--output toy.toml: a file; give a folder"),
        (["report", "--profile", "smokey", "--readme"], "unknown profile 'smokey'; did you mean smoke"),
        (["report", "--profile", "toy.toml"], "not run yet: 01_first, 02_second; `psnb run --profile toy.toml` runs"),
    ],
)
def test_mistakes_are_one_line_before_any_work(toy, capsys, arguments, message):
    assert re.search(message, refused(capsys, *arguments))
    assert not (toy / "results").exists()


def test_types_of_parameters():
    assert runner._fits({"eagle": 3}, "dict[str, int]")
    assert not runner._fits({"eagle": "3"}, "dict[str, int]")
    assert runner._fits([0, 0.7], "list[float]")
    assert not runner._fits(True, "int")
    assert runner._fits("anything", "None")
    assert runner._fits([1, "a"], "list")
    assert runner._value("1", "str") == "1"
    assert runner._value("true", "bool") is True
    assert runner._value("'a b'", "str") == "a b"


def test_profiles_own_parameters_are_checked(toy, capsys):
    text = (toy / "toy.toml").read_text()
    (toy / "toy.toml").write_text(text.replace("n = 2", 'n = "two"'))
    assert "profile toy: 01_first.n wants int" in refused(capsys, "run", "--profile", "toy.toml")
    (toy / "toy.toml").write_text(text.replace("n = 2", "nn = 2"))
    assert "unknown parameter 01_first.nn" in refused(capsys, "run", "--profile", "toy.toml")


def test_run_reuse_change_and_fresh(toy, capsys, plain_report):
    def go(*arguments):
        (toy / "log.txt").unlink(missing_ok=True)
        assert main(["run", "--profile", "toy.toml", *arguments]) == 0
        ran = (toy / "log.txt").read_text().split() if (toy / "log.txt").exists() else []
        return ran, capsys.readouterr().out

    ran, out = go()
    assert ran == ["first", "second"]
    assert "first 2 [1, 2] 0.5 a" in out  # a notebook's prints are the run's progress; n comes from the profile
    assert f"report:   {toy / 'results' / 'toy' / 'report.html'}" in out
    found = RunManifest(toy / "results" / "toy" / "manifest.json").read()
    assert found["status"] == "complete"
    assert found["executed"] == ["01_first", "02_second"]
    assert found["stages"]["01_first"]["seconds"] > 0
    assert found["command"] == "psnb run --profile toy.toml"
    executed = toy / "results" / "toy" / "notebooks" / "01_first.ipynb"
    assert str(toy) not in executed.read_text()

    ran, out = go()
    assert ran == []
    for stage in ("01_first", "02_second", "report"):
        assert f"{stage}: reused" in out
    ran, out = go("-p", "01_first.n=5", "-p", "01_first.rate=1", "-p", "01_first.word=b")
    assert "first 5 [1, 2] 1 b" in out
    assert ran == ["first", "second"]  # the last one reports on the others
    assert go()[0] == ["first", "second"]  # back to the profile's own value
    write_notebook(toy / "notebooks" / "02_second.ipynb", "", "open('log.txt', 'a').write('changed ')")
    assert go()[0] == ["changed"]
    assert go("--only", "01_first")[0] == []
    assert go("--only", "01_first", "--fresh")[0] == ["first"]
    assert go()[0] == ["changed"]
    assert go("--fresh")[0] == ["first", "changed"]
    executed.unlink()
    assert go()[0] == ["first", "changed"]
    assert main(["list", "--profile", "toy.toml"]) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["01_first"] == lines["02_second"] == "yes"
    assert lines["corpus"] == lines["target"] == lines["eagle"] == lines["report"] == "no"


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("user", 2, "02_second: too hot: open a window"),
        ("disk", 1, "02_second: cannot write x: the disk is full"),
        ("bug", 2, "02_second: ZeroDivisionError: division by zero"),
        ("die", 2, "02_second: its kernel died"),
    ],
)
def test_failing_notebook_is_kept_and_the_rest_reused(toy, capsys, plain_report, fail, code, message):
    line = refused(capsys, "run", "--profile", "toy.toml", "-p", f"02_second.fail={fail}", code=code)
    assert message in line
    assert "02_second.failed.ipynb" in line
    folder = toy / "results" / "toy" / "notebooks"
    assert sorted(p.name for p in folder.iterdir()) == ["01_first.ipynb", "02_second.failed.ipynb"]
    found = RunManifest(toy / "results" / "toy" / "manifest.json").read()
    assert (found["status"], found["error"]) == ("failed", line.removeprefix("psnb: error: "))
    assert main(["run", "--profile", "toy.toml"]) == 0
    assert "01_first: reused" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]


def test_one_notebook_on_a_clone(toy, capsys, plain_report):
    """The others' records stay; what is shown is what this call made."""
    write_notebook(toy / "notebooks" / "03_third.ipynb", "")
    book = RunManifest(toy / "results" / "toy" / "manifest.json")
    assert main(["run", "--profile", "toy.toml"]) == 0
    theirs = book.read()
    theirs["stages"]["02_second"]["machine"] = "an H100"
    book.restore(theirs)
    shutil.rmtree(toy / "results" / "toy" / ".cache")
    refused(capsys, "run", "--profile", "toy.toml", "--only", "02_second", "-p", "02_second.fail=user")
    assert book.read() == theirs  # nothing was made
    refused(capsys, "run", "--profile", "toy.toml", "-p", "02_second.fail=user")
    found = book.read()
    assert found["status"] == "failed" and found["stages"].keys() == theirs["stages"].keys()
    assert found["stages"]["01_first"] != theirs["stages"]["01_first"]
    assert found["stages"]["02_second"] == theirs["stages"]["02_second"]
    capsys.readouterr()
    assert main(["run", "--profile", "toy.toml", "--only", "03_third"]) == 0
    assert "report:" not in capsys.readouterr().out  # it lies there, but is of another run
    found = book.read()
    assert found["status"] == "partial" and found["stages"].keys() == theirs["stages"].keys()
    assert found["warnings"] == ["02_second was measured elsewhere: on an H100"]
    assert main(["run", "--profile", "toy.toml", "--only", "02_second"]) == 0
    found = book.read()
    assert found["status"] == "complete" and found["warnings"] == []


def test_a_changed_profile_is_told_until_all_is_run_again(toy):
    book = RunManifest(toy / "results" / "toy" / "manifest.json")
    assert main(["run", "--profile", "toy.toml"]) == 0 and book.read()["status"] == "complete"
    (toy / "toy.toml").write_text("seed = 7\n" + (toy / "toy.toml").read_text())
    assert main(["run", "--profile", "toy.toml", "--only", "02_second"]) == 0
    found = book.read()
    assert found["status"] == "partial"
    assert found["warnings"] == ["01_first was run with another profile, other weights or prompts: run it"]
    assert main(["run", "--profile", "toy.toml"]) == 0
    assert book.read()["status"] == "complete" and book.read()["warnings"] == []


def test_one_notebook_does_not_make_a_run_complete(toy):
    assert main(["run", "--profile", "toy.toml", "--only", "02_second"]) == 0
    assert RunManifest(toy / "results" / "toy" / "manifest.json").read()["status"] == "partial"


def test_a_first_run_that_measured_nothing_leaves_no_manifest(toy, capsys):
    making = "from psnb.study import Study\nStudy.open('toy.toml')._data('corpus', [1], lambda folder: {})\n1 / 0"
    write_notebook(toy / "notebooks" / "02_second.ipynb", "", making)
    assert main(["run", "--profile", "toy.toml", "--only", "02_second"]) == 2
    assert (toy / "results" / "toy" / ".cache" / "corpus").is_dir()
    assert not (toy / "results" / "toy" / "manifest.json").exists()


@pytest.mark.parametrize("field", ["source", "validation", "questions"])
def test_missing_data_is_told_before_any_work(toy, capsys, field):
    text = (toy / "toy.toml").read_text()
    (toy / "here.jsonl").touch()
    names = {"source": "here.jsonl", field: "gone.jsonl"}
    data = "[data]\n" + "".join(f'{name} = "{value}"\n' for name, value in names.items())
    (toy / "toy.toml").write_text(text.replace("[target]", data + "[target]"))
    for name in Study.open("toy.toml").models:  # as in a clone without weights
        folder = Study.open("toy.toml").checkpoint(name)
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"key": digest(Study.open("toy.toml")._spec(name))}))
    assert f"data.{field}: no such file {toy}/gone.jsonl" in refused(capsys, "run", "--profile", "toy.toml")
    assert [path.name for path in (toy / "results" / "toy").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_a_notebook(toy, number):
    """Ctrl-C is one line and code 130; after a kill too the next run goes on at the notebook that died."""
    words = [sys.executable, "-m", "psnb", "run", "--profile", "toy.toml", "-p", "02_second.fail=wait"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # where the tests themselves run in the background, Ctrl-C is ignored, and children inherit that
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(words, preexec_fn=heard, **pipes)
    for line in running.stdout:
        if line.startswith("waiting"):
            break
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    if number == signal.SIGINT:
        assert running.returncode == 130
        assert err.splitlines()[-1].startswith("psnb: stopped; what was finished is kept")
        assert "Traceback" not in err
        assert RunManifest(toy / "results" / "toy" / "manifest.json").read()["status"] == "interrupted"
    folder = toy / "results" / "toy" / "notebooks"
    assert [p.name for p in folder.iterdir()] == ["01_first.ipynb"]
    again = psnb("run", "--profile", "toy.toml", "--only", "02_second", cwd=toy)
    assert again.returncode == 0, again.stderr
    assert (toy / "log.txt").read_text() == "first second "
    left = [p.name for p in (toy / "results" / "toy" / ".cache").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")]


def test_no_permission_for_the_results(toy, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    Study.open("toy.toml").fastest()  # so that the manifest is the first file that is written
    monkeypatch.setattr(runner.manifest.os, "replace", refuse)
    line = refused(capsys, "run", "--profile", "toy.toml", code=1)
    assert "manifest.json: no permission to write there: " in line
    assert not (toy / "log.txt").exists()


def test_a_folder_is_no_file_for_bench(toy, capsys):
    line = refused(capsys, "bench", "--profile", "toy.toml", "--json", "notebooks", code=1)
    assert "notebooks: a folder stands there; give the name of a file" in line
    assert (toy / "notebooks" / "01_first.ipynb").is_file() and not (toy / "results").exists()


def test_the_readme_is_written_from_the_results_that_were_named(toy, capsys):
    (toy / "README.md").write_text("<!-- results of toy: begin -->\n<!-- results of toy: end -->\n")
    assert "/elsewhere/results/toy/summary.csv" in refused(
        capsys, "report", "--profile", "toy.toml", "--readme", "--output", "elsewhere"
    )


def test_other_commands_in_a_process(toy):
    listed = psnb("list", "--profile", "toy.toml")
    assert listed.returncode == 2  # the toy is not in the project's own folder
    listed = psnb("list", "--profile", "embedded")
    assert listed.returncode == 0
    assert {"corpus", "target", "eagle-ps", "04_speedup", "report"} <= {
        x.split()[0] for x in listed.stdout.splitlines()
    }
    assert psnb("--version").stdout.startswith("psnb ")
    wrong = psnb("rnu")
    assert wrong.returncode == 2
    assert "invalid choice: 'rnu'" in wrong.stderr
    began = time.monotonic()
    psnb("run", "--profile", "nothing")
    assert time.monotonic() - began < 5  # torch is not loaded to say so


def test_the_kernel_is_this_python(toy, monkeypatch, tmp_path):
    """A kernel that the user installed under the same name does not get in the way."""
    bad = tmp_path / "user" / "kernels" / "python3"
    bad.mkdir(parents=True)
    (bad / "kernel.json").write_text('{"argv": ["/nonexistent/python"], "display_name": "bad", "language": "python"}')
    where = "import sys\nopen('where.txt', 'w').write(sys.executable)"
    write_notebook(toy / "notebooks" / "01_first.ipynb", "n: int = 1\n", where)
    environment = {**os.environ, "JUPYTER_PATH": str(tmp_path / "user"), "PATH": "/usr/bin:/bin"}
    done = psnb("run", "--profile", "toy.toml", "--only", "01_first", cwd=toy, env=environment)
    assert done.returncode == 0, done.stderr
    assert (toy / "where.txt").read_text() == sys.executable


def test_the_notebooks_of_a_run_are_one_job_of_the_compiler(toy, plain_report):
    """What one compiled is then found by the next; another run begins anew."""
    note = "import os\nopen('jobs.txt', 'a').write(os.environ['TORCH_COMPILE_JOB_ID'] + '\\n')"
    for name in ("01_first", "02_second"):
        write_notebook(toy / "notebooks" / f"{name}.ipynb", "n: int = 1\n", note)
    runner.run("toy.toml")
    runner.run("toy.toml", fresh=True)
    jobs = (toy / "jobs.txt").read_text().split()
    assert len(jobs) == 4 and jobs[0] == jobs[1] != jobs[2] == jobs[3]


# --- the environment ------------------------------------------------------------------------------------------------


def pins():
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_constraints_pin_what_pyproject_asks_for():
    extra = PROJECT["optional-dependencies"]["dev"]
    for text in [*PROJECT["dependencies"], *extra]:
        wanted = Requirement(text)
        assert pins()[canonicalize_name(wanted.name)] in wanted.specifier, text
        assert wanted.specifier, f"{text}: no range"
    assert "psnb" not in pins()
    assert not [version for version in pins().values() if "+" in version]  # a local build is not in any index


def test_conda_gives_the_same_set():
    book = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = book["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[dev]"]}
    make = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt -e '.[dev]'" in make


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    for text in PROJECT["dependencies"]:
        name = canonicalize_name(Requirement(text).name)
        assert version(name).split("+")[0] == pins()[name], "the environment is not the pinned one: make clean test"


def test_imports_are_declared():
    declared = {canonicalize_name(Requirement(text).name).replace("-", "_") for text in PROJECT["dependencies"]}
    declared |= {"nbclient", "nbformat", "jinja2", "IPython", "pygments", "huggingface_hub", "psnb"}  # theirs, or ours
    for path in (ROOT / "psnb").rglob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE):
            assert name in sys.stdlib_module_names or name in declared, f"{path.name}: {name}"


# --- make -----------------------------------------------------------------------------------------------------------


def make(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def test_make_runs_the_two_commands(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    reproduce, test = make("-n", "reproduce", cwd=tmp_path).stdout, make("-n", "test", cwd=tmp_path).stdout
    for printed in (reproduce, test):
        assert printed.index("-m venv .venv") < printed.index("pip install") < printed.index("touch .venv/.installed")
    assert ".venv/bin/psnb run --profile embedded" in reproduce
    for part in ("ruff check", "ruff format --check", "nbstripout", "-m pytest"):
        assert part in test
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip install" not in make("-n", "test", cwd=tmp_path).stdout  # the second call installs nothing
    assert "make reproduce" in make(cwd=tmp_path).stdout


def test_make_with_an_old_python(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("reproduce", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode != 0
    assert "psnb needs Python 3.11 or newer" in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_make_test():
    text = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in text
    assert "make test" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("command", [["run"], ["train", "--stage", "eagle"], ["bench"]])
def test_a_missing_file_of_data_is_refused_at_the_start(toy, capsys, command):
    text = (toy / "toy.toml").read_text()
    (toy / "toy.toml").write_text(text.replace("[target]", '[data]\nsource = "a/../gone.jsonl"\n[target]'))
    line = refused(capsys, *command, "--profile", "toy.toml")
    assert f"data.source: no such file {toy}/gone.jsonl; put it there, or let data.source name another" in line
    assert not (toy / "results").exists()
    assert main(["list", "--profile", "toy.toml"]) == 0


def test_bare_psnb_prints_the_help(capsys):
    assert main([]) == 2
    assert "examples:" in (told := capsys.readouterr().err) and "error" not in told


def test_a_profile_may_run_some_notebooks_alone():
    study = Study.open("shapes")
    assert list(runner.notebooks(study)) == ["07_cost"]
    wrong = dataclasses.replace(study, profile=dataclasses.replace(study.profile, stages=["07_costs"]))
    with pytest.raises(UserError, match=r"profile shapes: unknown notebook '07_costs' in stages.*07_cost"):
        runner.notebooks(wrong)
