"""The recipe's grid: judging by a walk equals decoding, and a grid that resumes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import toys

from psnb import drafters, recipe
from psnb.decode import Settings, speculative
from psnb.errors import UserError
from psnb.profile import DrafterSpec, FitSpec, load
from psnb.target import as_batch

PREFIX, SEED = 5, 4


@pytest.fixture(scope="module")
def target():
    return toys.target()


@pytest.fixture(scope="module")
def written(target):
    rows = as_batch(toys.rows(6, 40))
    rows["document"].zero_()
    return recipe.text(target, rows, PREFIX, 0.7, SEED)


def test_text_ends_behind_its_end_token(written):
    ids, document = written["input_ids"], written["document"]
    ends = (document == 0).sum(1)
    assert ids.shape == (6, 40) and set(document.unique().tolist()) == {0, -1}
    for row, of, end in zip(ids, document, ends.tolist(), strict=True):
        assert (of[:end] == 0).all() and (of[end:] == -1).all()
        assert end == 40 or row[end - 1] == toys.VOCAB - 1
        assert toys.VOCAB - 1 not in row[PREFIX : end - 1]


def test_text_answers_the_prompts_of_chats(target):
    rows = as_batch(toys.rows(2, 40))
    rows["document"][:, :] = torch.arange(40) // 20  # two chats of 20 tokens a row
    rows["loss_mask"] = ((torch.arange(40) % 20) >= torch.where(torch.arange(40) < 20, 6, 9)).long().repeat(2, 1)
    assert len(recipe.text(target, rows, PREFIX, 0.7, SEED, most=3)["prefix"]) == 3
    made = recipe.text(target, rows, PREFIX, 0.7, SEED)
    assert made["prefix"].tolist() == [6, 9, 6, 9]
    for r, (ids, prefix) in enumerate(zip(made["input_ids"], (6, 9, 6, 9), strict=True)):
        begin = 20 * (r % 2)
        assert ids[:prefix].tolist() == rows["input_ids"][r // 2, begin : begin + prefix].tolist()
    drafter = toys.drafter("eagle-ps", target)
    ids, end = made["input_ids"][0].tolist(), int((made["document"][0] == 0).sum())
    settings = Settings(
        k=2, seed=SEED, temperature=0.7, max_new_tokens=end - 6, repeat_stop=0, stop_tokens=(toys.VOCAB - 1,)
    )
    done = speculative(target, drafter, ids[:6], settings)
    assert done.tokens == ids[6:end] and end > 12
    found = recipe.rounds(drafter, made, [2], 0.7, SEED, settings.sharpen)[2]
    assert found[0] == [r.accepted for r in done.rounds][: len(found[0])] and len(found[0]) > 2


def test_text_needs_prompts(target):
    with pytest.raises(UserError, match="lower prefix"):
        recipe.text(target, as_batch(toys.rows(3, 24)), 20, 0.7, SEED)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in ("eagle", "eagle-ps", "medusa", "medusa-ps")),
        ("eagle", {"attention": "dense"}),
        ("eagle-ps", {"taps": [1], "layers": 2}),
        ("eagle-ps", {"mask_mode": "shared"}),
        ("medusa-ps", {"link": 8}),
    ],
)
def test_rounds_are_those_of_decoding(target, written, kind, changes, monkeypatch):
    """Row 0's noise is that of a generation with the same seed: same text, same rounds."""
    monkeypatch.setattr(drafters.parallel, "WIDTH", toys.VOCAB)  # every token is a candidate, as in `drafted`
    drafter = toys.drafter(kind, target, **changes)
    ids, end = written["input_ids"][0].tolist(), int((written["document"][0] == 0).sum())
    settings = Settings(
        k=3, seed=SEED, temperature=0.7, max_new_tokens=40 - PREFIX, repeat_stop=0, stop_tokens=(toys.VOCAB - 1,)
    )
    done = speculative(target, drafter, ids[:PREFIX], settings)
    assert done.tokens == ids[PREFIX:end]
    found = recipe.rounds(drafter, written, [3], 0.7, SEED, settings.sharpen)[3]
    assert recipe.rounds(drafter, written, [4, 3], 0.7, SEED, settings.sharpen)[3] == found
    assert len(found) == 6 and len(found[0]) >= 4
    assert found[0] == [r.accepted for r in done.rounds][: len(found[0])]


def test_walk():
    assert recipe.walk(np.array([2, 0, 1, 0, 0, 0]), 1, 7, 2) == [2, 0]
    assert recipe.walk(np.array([3, 0, 0, 0, 1, 0, 0]), 1, 7, 1) == [1, 0, 0, 1]


def test_tokens_per_step():
    value, low, high, n = recipe.tokens_per_step([[2, 0], [1], [3, 3, 3]])
    assert value == pytest.approx(1 + 12 / 6) and n == 6
    assert 1.9 < low < value < high <= 4


def test_variants_change_the_base():
    budget = FitSpec(steps=9, rows=8, optimizer="muon")
    base = dataclasses.replace(load("embedded").drafters["eagle-ps"], train=budget)
    spec = recipe.Variant("x", {"keep": 0.5, "learning_rate": 7e-3}).spec(base, 4)
    budget = dataclasses.replace(budget, steps=4, learning_rate=7e-3)
    assert spec == dataclasses.replace(base, keep=0.5, train=budget)
    made = [variant.spec(base, 4) for variant in recipe.GRID if variant.responses == "corpus"]
    assert sum(spec == made[0] for spec in made) == 1  # all but the base differ from it
    with pytest.raises(UserError, match="did you mean 1 layer"):
        recipe.select(["1 layers"])


def test_a_grid_goes_on_where_it_was(target, tmp_path):
    spec = DrafterSpec(kind="eagle-ps", k=4, train=FitSpec(steps=2, rows=2, warmup=1, log_every=1))
    drafters = {"eagle-ps": spec, "medusa": dataclasses.replace(spec, kind="medusa")}
    rows = as_batch(toys.rows(6, 40))
    rows["document"].zero_()
    study = SimpleNamespace(
        results=tmp_path / "own",
        root=tmp_path,
        profile=dataclasses.replace(load("smoke"), name="toy", drafters=drafters),
        target=lambda: target,
        _training_rows=lambda name="target": (rows, rows),
        for_training=lambda: calls.append("in its format") or study,
        uses=lambda path: path,
    )
    calls = []
    two = [recipe.Variant("base"), recipe.Variant("shared masks", {"mask_mode": "shared"})]
    assert recipe.load(study).empty
    first = recipe.run(study, two[:1], 2, [1], PREFIX)
    assert list(first.columns) == list(recipe.COLUMNS) and set(first.variant) == {"base"}
    assert calls == ["in its format"]
    recipe_train = recipe.train_variant
    try:
        recipe.train_variant = lambda spec, *a, **k: calls.append(spec.mask_mode) or recipe_train(spec, *a, **k)
        both = recipe.run(study, two, 2, [1], PREFIX)
    finally:
        recipe.train_variant = recipe_train
    assert calls == ["in its format"] * 2 + ["shared"]
    with pytest.raises(UserError, match="did you mean eagle-ps"):
        recipe.run(study, two, 2, [1], PREFIX, base="eagle-p")
    with pytest.raises(UserError, match="1 token or more"):
        recipe.run(study, two, 2, [1], PREFIX, ks=[5, 0])
    with pytest.raises(UserError, match="warm start: no drafter 'eagle'"):
        recipe.run(study, recipe.select(["warm start"]), 2, [1], PREFIX)
    with pytest.raises(UserError, match="texts = 0"):
        recipe.run(study, two, 2, [1], PREFIX, texts=0)
    pd.testing.assert_frame_equal(recipe.load(study), both, check_dtype=False)
    table = recipe.compare(both)
    values = table.set_index("variant").tokens_per_step
    assert set(table.k) == {4} and (table.tokens == 2 * 2 * 40).all()
    assert table.set_index("variant").gain["shared masks"] == pytest.approx(values["shared masks"] - values["base"])
    other = recipe.run(study, two[:1], 2, [1], PREFIX, base="medusa", batch="full", ks=[1, 2])
    other = other[len(both) :]
    assert set(zip(other.batch, other.variant, strict=True)) == {("full", "medusa, base")}
    assert sorted(other.k.dropna()) == [1, 2]
    assert sorted(recipe.compare(recipe.load(study)).k) == [1, 4, 4]  # of each training its shortest chains


def test_a_variant_is_compared_with_its_own_base():
    rows = [
        ("one", "base", 2.0),
        ("one", "1 layer", 1.5),
        ("one", "medusa-ps, base", 1.4),
        ("one", "medusa-ps, x", 1.5),
    ]
    rows += [("two", "1 layer", 1.0), ("two", "keep 0.7, 0.2", 1.2)]
    frame = pd.DataFrame(rows, columns=["batch", "variant", "value"])
    frame = frame.assign(metric="tokens_per_step", k=5, seed=1).reindex(columns=recipe.COLUMNS)
    gain = recipe.compare(frame).set_index(["batch", "variant"]).gain
    told = [gain["one", name] for _, name, _ in rows[:4]]
    assert told == pytest.approx([0, -0.5, 0, 0.1]) and gain["two"].isna().all()


def test_noise_stays_within_its_limit():
    assert recipe.ROWS * recipe.ROW <= 2**28
    assert torch.equal(
        recipe.gumbels(1, torch.tensor([2]), 3, 5)[0, 1], recipe.gumbels(1, torch.tensor([2]), 2, 5)[0, 1]
    )
