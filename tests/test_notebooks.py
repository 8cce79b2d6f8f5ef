"""The source notebooks: their parameters, their size, their formulas; and one of them run as a reader would."""

import ast
import re

import nbformat
import papermill
import pytest
from conftest import ROOT

from psnb import report

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 15  # lines of a code cell


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_all_are_there():
    names = [path.stem for path in PATHS]
    assert names[:4] == ["01_target", "02_train_drafters", "03_draft_length", "04_speedup"]
    assert names[-1].endswith("_report") and [name[:2] for name in names] == [
        f"{i:02d}" for i in range(1, len(names) + 1)
    ]


def test_stripped_and_minimal(book):
    nbformat.validate(book)
    assert set(book.metadata) <= {"kernelspec", "language_info"} and book.metadata.kernelspec.name == "python3"
    assert set(book.metadata.get("language_info", {})) <= {"name"}
    for cell in book.cells:
        assert set(cell.metadata) <= {"tags"} and not cell.get("outputs") and cell.get("execution_count") is None


def test_parameters_are_annotated_and_commented(book):
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is code(book)[0]
    lines = tagged[0].source.splitlines()
    assert lines[0].startswith('profile: str = "embedded"  # ') and lines[1].startswith('output: str = ""  # ')
    for line in lines:
        node = ast.parse(line).body[0]
        assert isinstance(node, ast.AnnAssign) and re.search(r"  # \w.{5,}$", line), line
        ast.literal_eval(node.value)


def test_papermill_sees_the_same_parameters(book):
    path = PATHS[[nbformat.read(p, as_version=4) for p in PATHS].index(book)]
    found = papermill.inspect_notebook(str(path))
    names = [line.split(":")[0] for line in code(book)[0].source.splitlines()]
    assert list(found) == names and all(
        about["inferred_type_name"] != "None" and about["help"] for about in found.values()
    )


def test_cells_are_short_and_parse(book):
    for cell in code(book):
        tree = ast.parse(cell.source)
        assert len(cell.source.splitlines()) <= LONGEST, cell.source
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                assert isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 5, node.name


def test_prose_leads_every_step(book):
    """A notebook opens with its title, no two code cells in a row make pictures without a word between them."""
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    assert sum(cell.cell_type == "markdown" for cell in book.cells) >= len(code(book)) // 2
    titles = [
        line
        for cell in book.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line[:2] == "# "
    ]
    assert len(titles) == 1


def test_formulas_can_be_read_without_network(book):
    for cell in book.cells:
        if cell.cell_type == "markdown":
            rendered = report.formulas(cell.source)
            assert "$" not in re.sub(r"`[^`]*`", "", rendered), cell.source
            assert rendered.count("<code>") == cell.source.count("<code>"), cell.source


def test_prose_quotes_no_measured_number(book):
    """Numbers with decimals in prose are temperatures, definitions or the paper's number; results come from data."""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            numbers = set(re.findall(r"\d+\.\d+", re.sub(r"`[^`]*`", "", cell.source)))
            assert numbers <= {"0.7", "1.00", "2410.05589"}, numbers


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
