"""Atomic writes, hashes, the machine, the manifest, progress lines."""

import errno
import json
import os
import socket
import subprocess
from dataclasses import dataclass, field

import pandas as pd
import pytest

from psnb import manifest
from psnb.errors import UserError


def refuse(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_refused_write_keeps_the_old_file_and_says_the_cure(tmp_path, monkeypatch, number):
    path = tmp_path / "a.txt"
    manifest.write_text(path, "old")
    monkeypatch.setattr(manifest.os, "replace", refuse(number))
    with pytest.raises(manifest.DiskError, match="a.txt: .*: ") as error:
        manifest.write_text(path, "new")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UserError)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest.os, "replace", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        manifest.write_text(tmp_path / "a", "x")
    with pytest.raises(ZeroDivisionError), manifest.atomic_folder(tmp_path / "b"):
        raise ZeroDivisionError


def test_disk_error_that_a_library_wrapped(tmp_path):
    with pytest.raises(manifest.DiskError, match="disk is full"), manifest.atomic_folder(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_atomic_folder_replaces_or_leaves(tmp_path):
    path = tmp_path / "deep" / "folder"
    for text in ("one", "two"):
        with manifest.atomic_folder(path) as folder:
            (folder / text).write_text(text)
            assert folder.parent == path.parent
    assert [p.name for p in path.iterdir()] == ["two"]
    with pytest.raises(KeyboardInterrupt), manifest.atomic_folder(path) as folder:
        (folder / "three").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


def test_a_file_never_takes_a_folders_place(tmp_path):
    kept = tmp_path / "folder" / "thesis.txt"
    manifest.write_text(kept, "years of work")
    for refused in (
        lambda: manifest.write_text(tmp_path / "folder", "x"),
        lambda: manifest.check_writable(kept.parent),
    ):
        with pytest.raises(manifest.DiskError, match="folder: a folder stands there; give the name of a file"):
            refused()
    assert kept.read_text() == "years of work" and os.listdir(tmp_path) == ["folder"]
    with pytest.raises(manifest.DiskError, match=r"thesis.txt is no folder; give a folder"):
        manifest.check_writable(kept / "x.json")
    manifest.check_writable(tmp_path / "new" / "x.json")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("again", [False, True])
def test_leftovers_of_a_killed_process_are_swept(tmp_path, again):
    dead = subprocess.Popen(["true"])
    dead.wait()
    pid = os.getpid() if again else dead.pid  # in a container the next process may have the same number
    (tmp_path / f".a.{pid}.tmp").mkdir()
    (tmp_path / f".a.{os.getppid()}.tmp").mkdir()  # somebody else is at work
    (tmp_path / f".a.csv.{pid}.tmp").touch()  # another file's
    (tmp_path / f".a.old.{pid}.tmp").mkdir()  # killed between the two renames: this was `a`
    (tmp_path / f".a.old.{pid}.tmp" / "kept").touch()
    with pytest.raises(ZeroDivisionError), manifest.atomic_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".a.{os.getppid()}.tmp", f".a.csv.{pid}.tmp", "a"]
    assert (tmp_path / "a" / "kept").exists()
    assert manifest.written_elsewhere(tmp_path / "a") == tmp_path / f".a.{os.getppid()}.tmp"
    assert manifest.written_elsewhere(tmp_path / "a.csv") is None


def test_frame_and_json(tmp_path):
    manifest.write_frame(tmp_path / "a.csv", pd.DataFrame({"x": [1 / 3], "y": ["b, c"]}))
    assert (tmp_path / "a.csv").read_bytes() == b'x,y\n0.333333,"b, c"\n'
    manifest.write_json(tmp_path / "a.json", {"ü": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ü": 1}


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"3"])
def test_what_is_no_object_counts_as_nothing(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert manifest.read_json(tmp_path / "manifest.json") == manifest.read_json(tmp_path / "absent.json") == {}
    manifest.RunManifest(tmp_path / "manifest.json").update(a=1)
    assert manifest.read_json(tmp_path / "manifest.json") == {"a": 1}


def test_digest_is_canonical():
    assert manifest.digest({"a": 1, "b": [1.5, None]}) == manifest.digest({"b": [1.5, None], "a": 1})
    assert manifest.digest([1]) != manifest.digest(["1"])
    with pytest.raises(TypeError):
        manifest.digest({"a": object()})


def test_plain_leaves_defaults_out():
    @dataclass
    class Inner:
        steps: int
        rate: float = 0.5

    @dataclass
    class Outer:
        inner: Inner
        names: list = field(default_factory=list)

    assert manifest.plain(Outer(Inner(3))) == {"inner": {"steps": 3}}
    assert manifest.plain(Outer(Inner(3, 0.1), ["a"])) == {"inner": {"steps": 3, "rate": 0.1}, "names": ["a"]}


def test_revision(tmp_path, monkeypatch):
    assert manifest.revision(tmp_path) == "unknown"
    monkeypatch.setenv("PSNB_REVISION", "told")
    assert manifest.revision(tmp_path) == "told"
    monkeypatch.delenv("PSNB_REVISION")
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = manifest.revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "made").write_text("a run's own product")
    (tmp_path / "README.md").write_text("a report's numbers")
    assert manifest.revision(tmp_path) == clean
    (tmp_path / "a").write_text("2")
    assert manifest.revision(tmp_path) == f"{clean}-dirty"
    (tmp_path / "inner").mkdir()
    assert manifest.revision(tmp_path / "inner") == "unknown"  # a copy inside another repository


def test_machine_names_no_host():
    facts = manifest.machine()
    assert {"cpu", "cores", "memory_gb", "gpu", "python", "torch_threads", "attention", "versions"} <= facts.keys()
    assert facts["versions"]["torch"]
    assert "pytest" not in facts["versions"]  # of the dev extra
    assert socket.gethostname() not in json.dumps(facts)
    assert manifest.machine_name({**facts, "gpu": None}).endswith(" cores")


def test_run_manifest(tmp_path):
    book = manifest.RunManifest(tmp_path / "results" / "manifest.json")
    assert book.read() == {}
    book.start(stages={"a": 1}, seed=3)
    assert book.read()["status"] == "running"
    book.update(stages={"b": 2})
    book.finish("complete", seconds=1.5)
    found = book.read()
    assert (found["status"], found["stages"], found["seed"], found["seconds"]) == ("complete", {"b": 2}, 3, 1.5)
    assert found["started"] <= found["finished"]
    book.start()
    book.restore(found)
    assert book.read() == found
    book.restore({})
    assert not book.path.exists()
    book.path.write_text("{")
    assert book.read() == {}


def test_progress_prints_lines_where_nobody_looks(monkeypatch, capsys):
    monkeypatch.setattr(manifest, "EVERY", 0.0)
    assert list(manifest.progress("ab", label="letters")) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("letters: 1 of 2, 0 s, 0 s left")
    monkeypatch.setattr(manifest, "EVERY", 60.0)
    capsys.readouterr()
    assert list(manifest.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_live_is_a_person_at_a_notebook(monkeypatch):
    monkeypatch.delenv("PSNB_NOTEBOOK", raising=False)
    assert not manifest.live()
    monkeypatch.setitem(manifest.sys.modules, "ipykernel", manifest)
    monkeypatch.setenv("JPY_SESSION_NAME", "a")
    assert manifest.live()
    monkeypatch.setenv("PSNB_NOTEBOOK", "03_draft_length")  # psnb run, started in a notebook's terminal
    assert not manifest.live()
