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
