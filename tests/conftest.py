"""Shared by the tests: the command line, and a toy project for the machinery."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
os.environ["OMP_NUM_THREADS"] = "1"  # toy sizes: a second thread costs more than it gives


def psnb(*arguments, cwd=ROOT, **more):
    """Runs the command line in a process of its own."""
    words = [sys.executable, "-m", "psnb", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, **more)


def write_notebook(path, parameters, *cells):
    """A notebook with an annotated parameters cell and code cells."""

    def cell(source, tags=()):
        about = {"tags": list(tags)}
        return {"cell_type": "code", "source": source, "metadata": about, "outputs": [], "execution_count": None}

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source = 'profile: str = "toy"  # which run\noutput: str = ""  # where to\n' + parameters
    book = {"nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}}
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({**book, "cells": [cell(source, ["parameters"]), *map(cell, cells)]}))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A project folder with one profile and two small notebooks; the working directory is there."""
    (tmp_path / "psnb").mkdir()
    (tmp_path / "constraints.txt").write_text("six==1.17.0\n")
    (tmp_path / "toy.toml").write_text(
        'title = "toy"\ndevice = "cpu"\n[target]\ntrain = { steps = 3 }\n'
        '[drafters.eagle]\nkind = "eagle"\ntrain = { steps = 2 }\n'
        '[drafters.eagle-ps]\nkind = "eagle-ps"\nwarm_start = "eagle"\ntrain = { steps = 2 }\n'
        "[notebooks.01_first]\nn = 2\n"
    )
    write_notebook(
        tmp_path / "notebooks" / "01_first.ipynb",
        "n: int = 1  # how many\nks: list[int] = [1, 2]  # lengths\nrate: float = 0.5\nword: str = 'a'\n",
        "from pathlib import Path\nprint('first', n, ks, rate, word)\n"
        "with open(Path(output) / 'log.txt', 'a') as file: file.write('first ')",
    )
    write_notebook(
        tmp_path / "notebooks" / "02_second.ipynb",
        "fail: str = ''  # how to fail\n",
        "from pathlib import Path\nfrom psnb.errors import UserError\nfrom psnb.manifest import DiskError\n"
        "if fail == 'user': raise UserError('too hot: open a window')\n"
        "if fail == 'disk': raise DiskError('cannot write x: the disk is full')\n"
        "if fail == 'bug': 1 / 0\n"
        "if fail == 'die': import os; os.kill(os.getpid(), 9)\n"
        "if fail == 'wait':\n    print('waiting', flush=True)\n    import time; time.sleep(60)\n"
        "with open(Path(output) / 'log.txt', 'a') as file: file.write('second ')",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path
