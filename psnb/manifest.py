"""What a run leaves behind: atomic writes, hashes, the machine it ran on, its manifest, and its progress lines."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import psutil

from psnb.errors import UserError

T = TypeVar("T")
EVERY = 5.0  # seconds between two progress lines


class DiskError(UserError):
    """A file could not be written: no permission, read-only or full disk."""


CURES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EACCES: "no permission to write there: change its owner or mode, or choose another folder with --output",
    errno.EPERM: "no permission to write there: change its owner or mode, or choose another folder with --output",
    errno.EROFS: "the file system is read-only: choose another folder with --output",
}


# --- 1. atomic writes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Disk errors that a user can mend become a DiskError that names the path, the cause and the cure."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:  # safetensors wraps the system's error in one of its own
        inner = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(inner[1]) if inner else None)
        if number not in CURES:
            raise
        raise DiskError(f"cannot write {path}: {CURES[number]}; what was finished is kept") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        cure = "give a folder, or a place where one can be made"
        raise DiskError(f"cannot write {path}: {path.parent} is no folder; {cure}") from error


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _left(path: Path, living: bool) -> list[Path]:
    """Temporary neighbours of `path` that another living process writes, or that a killed run left.

    Of this process there are none yet: one with its number was left by a killed one (in containers numbers recur).
    """
    named = re.compile(rf"\.{re.escape(path.name)}(\.old)?\.(\d+)\.tmp")
    found = [(left, int(it[2])) for left in path.parent.glob(".*.tmp") if (it := named.fullmatch(left.name))]
    return [left for left, pid in found if (pid != os.getpid() and psutil.pid_exists(pid)) == living]


def written_elsewhere(path: Path) -> Path | None:
    """The temporary neighbour of `path` that another living process writes, if any."""
    return next(iter(_left(path, living=True)), None)


def _sweep(path: Path) -> None:
    for left in _left(path, living=False):
        if left.name.startswith(f".{path.name}.old.") and not path.exists():  # killed between the two renames
            os.replace(left, path)
        else:
            _remove(left)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed over it at success, removed at failure. Raises DiskError.

    A folder is replaced by a folder alone.
    """
    with _explained(path):
        _make_parent(path)
        _sweep(path)
        temporary = _temporary(path)
        try:
            yield temporary
            if path.is_dir() and not temporary.is_dir():
                raise DiskError(f"cannot write {path}: a folder stands there; give the name of a file")
            if path.is_dir():  # a folder cannot be renamed over a full one
                old = temporary.with_name(f".{path.name}.old.{os.getpid()}.tmp")
                os.replace(path, old)
                os.replace(temporary, path)
                _remove(old)
            else:
                os.replace(temporary, path)
        finally:
            _remove(temporary)


def check_writable(path: Path) -> None:
    """Refuses, before any work, a file that could not be written in the end. Raises DiskError."""
    if path.is_dir():
        raise DiskError(f"cannot write {path}: a folder stands there; give the name of a file")
    with _explained(path):
        _make_parent(path)
        _temporary(path).touch()
        _temporary(path).unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) so that `path` is the old file or the whole new one. Raises DiskError."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically. Raises DiskError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that stands there; empty if nothing readable does."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def csv(frame: pd.DataFrame) -> str:
    """`frame` as CSV without its index, floats with six digits."""
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Writes `frame` as `csv` has it, atomically. Raises DiskError."""
    write_text(path, csv(frame))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `path`; it takes the place of `path` at success and vanishes at failure.

    A killed process leaves `path` as it was; the next call removes what it left. Raises DiskError.
    """
    with replacing(Path(path)) as temporary:
        temporary.mkdir()
        yield temporary


# --- 2. hashes ------------------------------------------------------------------------------------------------------


def digest(obj: Any) -> str:
    """sha256 of `obj` as canonical JSON: the order of a dictionary's keys does not matter. Raises TypeError."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(spec: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of what differs from its defaults, so that a new field changes no old hash."""
    found = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            found[field.name] = plain(value) if dataclasses.is_dataclass(value) else value
    return found


# --- 3. where a run happened ----------------------------------------------------------------------------------------


def now() -> str:
    """The time as `2026-11-23T19:05:00Z`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def revision(root: Path) -> str:
    """The project's git revision, with `-dirty` where its sources differ from it.

    Outside git (a copy on another machine) what PSNB_REVISION says, else `unknown`.
    `results`, `figures` and `README.md` do not count: runs and reports write them.
    """
    told = os.environ.get("PSNB_REVISION", "unknown")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").split()
        if Path(top).resolve() != Path(root).resolve():  # a copy inside somebody else's repository
            return told
        written = [f":(exclude){name}" for name in ("results", "figures", "README.md")]
        changed = git("status", "--porcelain", "--", ".", *written)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return told
    return head + ("-dirty" if changed.strip() else "")


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Installed versions of the project's direct dependencies."""
    try:
        wanted = importlib.metadata.requires("psnb") or []
    except importlib.metadata.PackageNotFoundError:  # not installed: run from its folder
        wanted = ["torch", "transformers", "datasets", "tokenizers"]
    versions = {}
    for name in sorted({re.match(r"[\w.-]+", line)[0] for line in wanted if "extra ==" not in line}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """CPU, cores, memory (GB), GPU or null, system, Python, torch threads, package versions, attention backend."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "attention": "auto: bmm or sdpa, by rows (cache.attend)" if torch.cuda.is_available() else "sdpa",
        "versions": _versions(),
    }


def machine_name(facts: dict[str, Any]) -> str:
    """`machine()` in one line: the GPU where there is one, else the CPU."""
    return facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"


# --- 4. the manifest of a run ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class RunManifest:
    """`manifest.json`: started first, completed last. The file is the truth; every change rewrites it atomically."""

    path: Path

    def read(self) -> dict[str, Any]:
        return read_json(self.path)

    def start(self, **facts: Any) -> None:
        """A new manifest with status `running`. Raises DiskError."""
        write_json(self.path, {"status": "running", "started": now(), **facts})

    def update(self, **facts: Any) -> None:
        """Sets `facts`. Raises DiskError."""
        write_json(self.path, {**self.read(), **facts})

    def restore(self, stood: dict[str, Any]) -> None:
        """The manifest that was read before a start; none if it was empty. Raises DiskError."""
        write_json(self.path, stood) if stood else self.path.unlink(missing_ok=True)

    def finish(self, status: str, **facts: Any) -> None:
        """Sets `facts`, the status (`complete`, `failed`, `interrupted`) and the time. Raises DiskError."""
        self.update(**facts, status=status, finished=now())


# --- 5. progress ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line to the user, at once."""
    print(text, flush=True)


def live() -> bool:
    """True in a notebook that a person has open: not under papermill or nbconvert, nor outside Jupyter."""
    front = any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"))
    return "ipykernel" in sys.modules and front and "PSNB_NOTEBOOK" not in os.environ


def progress(items: Collection[T], label: str = "") -> Iterator[T]:
    """Passes the items on: with a bar for a person at a terminal or notebook, else with a line every few seconds."""
    if live() or sys.stderr.isatty():
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            left = (last - began) * (len(items) - done) / done
            say(f"{label}: {done} of {len(items)}, {last - began:.0f} s, {left:.0f} s left")
