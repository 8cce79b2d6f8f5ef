"""The bench against counts and rates computed from its own rows, at toy size."""

import json
import types

import pytest
import torch
import toys
from datasets import Dataset

from psnb import bench, measure
from psnb.decode import Settings, autoregressive, speculative
from psnb.engine import Engines
from psnb.errors import UserError


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    target = toys.target(torch.float64)
    drafters = {kind: toys.drafter(kind, target) for kind in ("medusa", "eagle-ps")}
    families = ["a", "a", "a", "b"]
    ids = [[1 + i, 2, 3, 4 + i, 5] for i in range(4)]
    prompts = Dataset.from_dict({"id": [f"p{i}" for i in range(4)], "family": families, "input_ids": ids})
    made = types.SimpleNamespace(
        profile=types.SimpleNamespace(name="toy", dtype="float64", drafters=drafters, seed=1),
        root=tmp_path_factory.mktemp("root"),
        target=lambda: target,
        drafter=drafters.__getitem__,
        prompts=lambda: prompts,
        check_files=lambda models: None,
    )
    made.fastest = lambda: made
    return made


def test_prompts_are_spread_over_the_families():
    assert bench.spread(["a", "a", "b"], 2) == [0, 2]
    assert bench.spread(["a", "a", "a", "b", "c"], 4) == [0, 3, 4, 1]
    assert bench.spread(["a"], 5) == [0]


def test_every_way_of_decoding_is_in_the_table(study, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Engines", None)  # on a CPU the study's own loop is faster, so the engine is not used
    found = bench.run(study, k=3, nodes=4, prompts=2, tokens=12, temperatures=[0.0, 0.7])
    table = bench.table(found)
    ways = {(m, t) for m, t in zip(table.method, table.tree, strict=True)}
    assert ways == {(name, "") for name in measure.BASELINES if name != measure.PLAIN32} | {
        ("medusa", "chain"),
        ("eagle-ps", "chain"),
        ("eagle-ps", "best_first"),
        ("medusa", "best_first"),
    }
    assert len(table) == 2 * len(ways)
    plain = table[(table.method == "plain") & (table.temperature == 0)]["tokens/s"].item()
    drafted = table[(table.method == "medusa") & (table.tree == "chain") & (table.temperature == 0)]
    assert drafted["x plain"].item() == pytest.approx(drafted["tokens/s"].item() / plain, rel=0.02)
    assert (table["first token, ms"] > 0).all()
    file = tmp_path / "bench.json"
    bench.write(found, file)
    stored = json.loads(file.read_text())
    assert (
        stored["budget"]["prompts"] == 2 and stored["machine"]["python"] and len(stored["rows"]) == len(found["rows"])
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ["eagle-pss"]}, "unknown drafter.*eagle-ps"),
        ({"k": 0}, "k = 0"),
        ({"prompts": 0}, "prompts = 0"),
        ({"tokens": 1}, "tokens = 1: give 2 or more"),
    ],
)
def test_wrong_requests_are_refused_before_work(study, wrong, message):
    with pytest.raises(UserError, match=message):
        bench.run(study, **wrong)


def test_a_drafter_of_fewer_slots_says_so(study, capsys):
    slots = study.profile.drafters["medusa"].k
    found = bench.run(study, methods=["medusa"], k=99, prompts=1, tokens=4, temperatures=[0.0])
    assert f"medusa: drafts {slots} tokens, not 99" in capsys.readouterr().out
    table = bench.table(found)
    assert table.k.max() == slots and (table["95 %"] == "").all()  # one prompt has no interval


def test_engines_give_what_decode_gives_whatever_changes_between_calls(study):
    target = study.target()
    engines = Engines(target, study.profile.drafters)
    for seed, tokens, temperature in [(0, 9, 0.7), (5, 13, 0.7), (5, 13, 0.0)]:
        settings = Settings(k=3, max_new_tokens=tokens, seed=seed, temperature=temperature, stop_tokens=(7,))
        assert engines("plain", [1, 2, 3], settings).tokens == autoregressive(target, [1, 2, 3], settings).tokens
        drafter = study.drafter("eagle-ps")
        ours, theirs = engines("eagle-ps", [1, 2], settings), speculative(target, drafter, [1, 2], settings)
        assert ours.tokens == theirs.tokens and [r.accepted for r in ours.rounds] == [r.accepted for r in theirs.rounds]
    assert len(engines.made) == 4  # two temperatures of two methods


def test_static_generation_is_plain_greedy_text(study):
    from transformers import StaticCache

    target = study.target()
    cache = StaticCache(target.config, target.context)
    settings = Settings(temperature=0.0, max_new_tokens=9)
    for prompt in ([1, 2, 3], [4, 5]):  # the cache is used again
        made = measure.hf_generate(target, prompt, settings, cache)
        assert made.tokens == autoregressive(target, prompt, settings).tokens
