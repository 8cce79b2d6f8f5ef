"""Profiles are refused before any work where they say something wrong."""

import dataclasses
import sys
from pathlib import Path

import pytest

from psnb import profile, runner
from psnb.drafters import KINDS
from psnb.errors import UserError
from psnb.study import Study


@pytest.mark.parametrize("name", profile.names())
def test_shipped_profiles_load_and_fit_the_notebooks(name):
    loaded = profile.load(name)
    assert loaded.name == name
    assert loaded.title
    runner.check_parameters(Study.open(loaded), {})


def test_the_longer_study_trains_the_same_for_longer():
    """Its target is that of h200: else weights that are copied would not fit. Its drafters differ in budget alone."""
    short, long = profile.load("h200"), profile.load("h200-long")
    assert (long.seed, long.data, long.target) == (short.seed, short.data, short.target)
    assert list(long.drafters) == list(short.drafters)
    for name, brief in short.drafters.items():
        full = long.drafters[name]
        assert full.train.steps > 3 * brief.train.steps and dataclasses.replace(full, train=brief.train) == brief


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 1", "title: str is wanted, not 1"),
        ("", "title missing"),
        ('titel = "a"', "unknown key 'titel'; did you mean title"),
        ("title =", "not valid TOML"),
        ('title = "a"\nseed = 1.5', "seed: int is wanted"),
        ('title = "a"\ndata = 3', "a table is wanted"),
        ('title = "a"\n[data]\npackages = "six"', "data.packages: a list is wanted"),
        ('title = "a"\n[data]\npackages = [1]', "packages: str is wanted"),
        ('title = "a"\n[target]\nhiden_size = 3', "did you mean hidden_size"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nk = 0', "drafters.x: k = 0; it is 1 or more"),
        ('title = "a"\n[drafters.x]\nk = 3', "drafters.x: kind missing"),
        ('title = "a"\n[drafters.x]\nkind = "egle-ps"', "drafters.x: kind 'egle-ps'; did you mean eagle-ps"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nkeep = 0.0', "keep = 0.0; it is a share in"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nanchors = 1.5', "anchors = 1.5; it is a share in"),
        ('title = "a"\n[drafters.x]\nkind = "eagle-ps"\ncurriculum = 1.5', "curriculum is a share"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\ncurriculum = 0.5', "curriculum would change nothing of eagle"),
        ('title = "a"\n[drafters.x]\nkind = "medusa"\ntaps = [1]', "taps would change nothing of medusa"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nlink = 8', "link would change nothing of eagle"),
        ('title = "a"\n[drafters.x]\nkind = "medusa"\nlayers = 2', "layers would change nothing of medusa"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nkeep = 0.5\nanchors = 0.5', "keep, anchors would change nothing"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nlabels = "softe"', "did you mean soft"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nattention = "dens"', "did you mean dense"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nmask_mode = "share"', "did you mean shared"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nwarm_start = "y"', "must be a drafter listed before"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nwarm_start = "x"', "must be a drafter listed before"),
        ('title = "a"\n[target.train]\nsteps = 1\noptimizer = "moun"', "target.train: .*did you mean muon"),
        ('title = "a"\ndtype = "float16"', "float32, float64 or bfloat16"),
        ('title = "a"\ndevice = "gpu"', "device 'gpu'; auto, cpu, cuda"),
        ('title = "a"\n[target.train]\nsteps = 0', "target.train: steps = 0; it is 1 or more"),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\ntrain = { steps = 1, log_every = 0 }', "x.train: log_every = 0"),
        ('title = "a"\n[target.train]\nsteps = 1\nlearning_rate = nan', "learning_rate = nan; it is a number above 0"),
        (
            'title = "a"\n[drafters.x]\nkind = "eagle"\nslot_decay = -1',
            "slot_decay = -1.0; it is a number of 0 or more",
        ),
        ('title = "a"\n[drafters.x]\nkind = "eagle"\nfeature_weight = nan', "feature_weight = nan"),
        ('title = "a"\n[target]\nhidden_size = 32\nheads = 3', "hidden_size is a multiple of twice the heads"),
        ('title = "a"\nseed = -1', "seed = -1"),
        ('title = "a"\n[drafters.x]\nkind = "eagle-ps"\nlink = -4', "link = -4; it is 0 or more"),
        ('title = "a"\n[data]\nlength = 1', "data: length = 1; it is 16 or more"),
        ('title = "a"\n[data]\nsource = " , "', "source is empty"),
        ('title = "a"\n[drafters.plain]\nkind = "eagle"', "drafters.plain: .*rename it"),
        ('title = "a"\n[drafters."../up"]\nkind = "eagle"', "rename it"),
        ('title = "a"\n[drafters.01_x]\nkind = "eagle"', "rename it"),
    ],
)
def test_one_clear_line(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        profile.load(str(path))
    assert "\n" not in str(error.value).split("TOML:")[0]


def test_a_file_may_not_take_the_name_of_a_shipped_profile(tmp_path):
    """Its results would stand in the place of those that came with the project."""
    shipped = Path(profile.__file__).parent / "profiles" / "embedded.toml"
    (tmp_path / "embedded.toml").write_text(shipped.read_text() + "\n# mine")
    with pytest.raises(UserError, match="another profile embedded comes with psnb; rename the file"):
        profile.load(str(tmp_path / "embedded.toml"))
    assert profile.load(str(shipped)) == profile.load("embedded")


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'title = "caf\xe9"\n')
    with pytest.raises(UserError, match="profile latin: not valid TOML in UTF-8"):
        profile.load(str(tmp_path / "latin.toml"))


def test_cost_hints_are_near_what_trainings_took():
    """Minutes on one H200 or H100 of the shipped trainings (checkpoints/*/training.csv), within a factor 3."""
    took = {"target": 5.5, "eagle": 1.1, "medusa": 1.1, "eagle-ps": 9.0}
    for name, minutes in took.items():
        told = float(runner._estimate(Study.open("embedded"), name).split(", ")[1].split()[0])
        assert minutes / 3 < told < minutes * 3, name


def test_cost_hints_are_of_this_machine_and_in_units_to_read(monkeypatch):
    assert [runner._long(m) for m in (0.01, 120, 150, 5760)] == ["0.1 min", "120.0 min", "2.5 h", "4.0 days"]
    told = {}
    for cores in (1, 4):
        monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        told[cores] = runner._estimate(Study.open("h200-long"), "eagle-ps").split(",")[0].removeprefix("about ").split()
    assert told[1][2:] == ["on", "1", "core"] and told[4][1:] == ["days", "on", "4", "cores"]
    assert float(told[1][0]) == pytest.approx(4 * float(told[4][0]), abs=0.3)


def test_a_model_alone_needs_no_notebooks_tools(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    monkeypatch.setattr(Study, "make", lambda self, stage: None)
    assert runner.run("toy.toml", only="target") == toy / "results" / "toy"
    with pytest.raises(ImportError):
        runner.run("toy.toml")


def test_a_profile_without_drafters_is_refused_before_the_first_notebook(tmp_path):
    (tmp_path / "bare.toml").write_text('title = "a"')
    with pytest.raises(UserError, match="profile bare has no drafter: add a table such as"):
        runner.run(str(tmp_path / "bare.toml"), output=tmp_path)


def test_the_kinds_are_those_that_can_be_built():
    assert profile.CHOICES["kind"] == tuple(KINDS)


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text('title = "a"\n[drafters.x]\nkind = "eagle"\nkeep = 1\n[notebooks.01_a]\nn = 2')
    found = profile.load(str(tmp_path / "mine.toml"))
    assert (found.name, found.notebooks) == ("mine", {"01_a": {"n": 2}})
    assert isinstance(found.drafters["x"].keep, float)
    (tmp_path / "other.toml").write_text('name = "embedded"\ntitle = "a"')  # whose results it would write
    with pytest.raises(UserError, match="profile other: name = 'embedded'; a profile is named as its file is"):
        profile.load(str(tmp_path / "other.toml"))
    (tmp_path / "other.toml").unlink()
    with pytest.raises(UserError, match="does not exist; profiles that come with psnb: embedded, h200"):
        profile.load(str(tmp_path / "other.toml"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"unknown profile 'mine'; did you mean mine\.toml\?"):
        profile.load("mine")
    with pytest.raises(UserError, match="did you mean smoke"):
        profile.load("smok")
