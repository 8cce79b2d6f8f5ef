"""One real run of profile `smoke`, from scratch, and everything that it makes. It takes longest, and so comes first."""

import re
import time

import nbformat
import pandas as pd
import papermill
import pytest
from conftest import ROOT, psnb

from psnb.manifest import RunManifest

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder in which `psnb run --profile smoke` ran once, from scratch; its output stands in `log.txt`."""
    folder = tmp_path_factory.mktemp("smoke")
    done = psnb("run", "--profile", "smoke", "--output", folder)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_smoke_runs_everything_from_scratch(smoke):
    results, figures = smoke / "results" / "smoke", smoke / "figures" / "smoke"
    found = RunManifest(results / "manifest.json").read()
    assert found["status"] == "complete"
    assert found["machine"]["versions"]["torch"]
    assert found["prompts_sha256"]["got"]
    assert set(found["checkpoints"]) == {"target", "eagle", "medusa", "medusa-ps", "eagle-ps"}
    assert found["data"]["corpus"]["documents"]["train"] > 50
    names = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert [path.name for path in sorted((results / "notebooks").glob("*.ipynb"))] == names
    assert set(found["stages"]) >= {name[:-6] for name in names}
    for path in results.rglob("*"):
        if path.suffix in (".ipynb", ".csv", ".json", ".html") and ".cache" not in path.parts:
            assert str(smoke) not in path.read_text(), path
    assert len(list(figures.glob("*.png"))) == len(list(figures.glob("*.svg"))) > 3


def test_smoke_again_reuses_everything(smoke):
    began = time.monotonic()
    done = psnb("run", "--profile", "smoke", "--output", smoke)
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"{path.stem}: reused" in done.stdout
    assert "report: reused" in done.stdout
    assert time.monotonic() - began < 30


def test_smoke_only(smoke):
    done = psnb("run", "--profile", "smoke", "--output", smoke, "--only", "eagle-ps")
    assert done.returncode == 0, done.stderr
    assert "eagle-ps: reused" in done.stdout
    assert psnb("run", "--profile", "smoke", "--output", smoke, "--only", "report").returncode == 0
    listed = psnb("list", "--profile", "smoke", "--output", smoke).stdout
    assert {line.split()[1] for line in listed.splitlines()[1:]} == {"yes"}, listed


def test_every_executed_copy_is_whole(smoke):
    """All ran in profile smoke: in order, without an error, with pictures where the source saves one."""
    for path in PATHS:
        source, done = (nbformat.read(p, as_version=4) for p in (path, smoke / "results/smoke/notebooks" / path.name))
        outputs = [output for cell in code(done) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output.text for output in outputs if output.get("name") == "stderr"]
        pictures = sum(cell.source.count("plots.save(") for cell in code(source))
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
        for cell in code(source):
            for name in re.findall(r'study\.figures, "(\w+)"', cell.source):
                assert {".png", ".svg"} == {p.suffix for p in (smoke / "figures/smoke").glob(f"{name}.*")}


def test_the_report_page_of_smoke(smoke):
    page = smoke / "results/smoke/report.html"
    text = page.read_text()
    assert page.stat().st_size < 10_000_000 and "<script" not in text
    assert not re.search(r'(src|href)="(?!data:|#|https://)', text) and not re.search(r'src="http', text)
    assert "Claims of the paper" in text and text.count("<section>") == len(PATHS)


def test_last_notebook_runs_alone_from_its_own_folder(smoke, tmp_path, monkeypatch):
    """As in JupyterLab: the working directory is notebooks/, nothing is passed but where the results lie."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    papermill.execute_notebook(
        PATHS[-1], tmp_path / "out.ipynb", {"profile": "smoke", "output": str(smoke)}, cwd=ROOT / "notebooks",
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    assert "Claims" in (tmp_path / "out.ipynb").read_text()


def test_some_methods_with_their_best_drafts(smoke):
    """Of the drafts of notebook 3 the fastest of each drafter that is named. Changes what the tests above look at."""
    changes = ("-p", '04_speedup.methods=["eagle-ps"]', "-p", "04_speedup.best_of_03=1")
    done = psnb("run", "--profile", "smoke", "--output", smoke, "--only", "04_speedup", *changes)
    assert done.returncode == 0, done.stderr
    drafted, timed = (pd.read_csv(smoke / f"results/smoke/{name}.csv") for name in ("03_runs", "04_runs"))
    assert set(timed.method) == {"plain", "hf_generate", "eagle-ps"}
    sums = drafted[drafted.method == "eagle-ps"].groupby(["tree", "k", "nodes"])[["tokens", "decode_s"]].sum()
    best = (sums.tokens / sums.decode_s).idxmax()
    assert set(timed[timed.method == "eagle-ps"][["tree", "k", "nodes"]].itertuples(index=False, name=None)) == {best}
