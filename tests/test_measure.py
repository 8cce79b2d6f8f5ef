"""Measuring against numbers computed by hand; losslessness with planted faults."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from datasets import Dataset

from psnb import decode, measure
from psnb.cache import KVCache
from psnb.decode import Settings
from psnb.errors import UserError
from psnb.profile import DrafterSpec
from psnb.verify import gumbel


def prompts() -> Dataset:
    ids = [[1 + i, 2, 3, 4 + i, 5] for i in range(4)]
    return Dataset.from_dict({"id": ["p0", "p1", "p2", "p3"], "family": ["a", "a", "b", "b"], "input_ids": ids})


@pytest.fixture(scope="module")
def made():
    target = toys.target(torch.float64)
    drafters = {kind: toys.drafter(kind, target) for kind in ("eagle", "eagle-ps")}
    arms = measure.chains({"plain": [0], "hf_generate": [0], "eagle": [2], "eagle-ps": [1, 4]})
    specs = {name: drafter.spec for name, drafter in drafters.items()}
    arms += measure.trees({"eagle": [[3, 8]], "eagle-ps": [[4, 8]]}, specs)
    arms.append(measure.Arm("eagle", 2, "chain", 2, "rejection"))
    runs = measure.run(
        target, drafters, prompts(), arms=arms, temperatures=[0.0, 0.7], max_new_tokens=14, repeats=2,
        hf_prompts=1, seed=3,
    )  # fmt: skip
    return target, runs


def test_run_covers_the_plan(made):
    _, runs = made
    counts = runs[runs.tree.isin(["", "chain"])].groupby(["method", "k", "temperature"]).size()
    assert counts["plain", 0, 0.0] == 4 * 2  # four prompts, two seeds
    assert counts["hf_generate", 0, 0.7] == 2 * 2  # one prompt of each family
    assert counts["eagle-ps", 4, 0.7] == 8
    assert counts["eagle", 2, 0.0] == 8 and counts["eagle", 2, 0.7] == 16  # two rules, which are one at T = 0
    assert set(runs[runs.nodes == 8].tree) == {"dynamic", "best_first"}
    assert (runs.tokens <= 13).all() and (runs.decode_s > 0).all()
    seeds = runs.groupby(["prompt", "repeat"]).seed.nunique()
    assert (seeds == 1).all()
    drafted = runs[runs.k > 0]
    rounds = drafted.histogram.map(lambda h: sum(map(int, h.split())))
    assert ((drafted.rounds - rounds).between(0, 1)).all()  # a limit cuts one round at most


def test_the_fastest_arms_of_each_drafter(made):
    """Given a speed, by hand: eagle's tree before its chain, and a chain at T = 0 that does not count."""
    _, runs = made
    assert {arm.method for arm in measure.drafted_arms(runs, 0.7)} == {"eagle", "eagle-ps"}
    assert len(measure.drafted_arms(runs, 0.7)) == 6 and len(measure.drafted_arms(runs, 0.0)) == 5
    timed = runs.assign(decode_s=1.0 + (runs.tree == "chain"), tokens=100)
    timed.loc[(timed.method == "eagle-ps") & (timed.k == 1) & (timed.temperature == 0.7), "decode_s"] = 0.5
    timed.loc[(timed.method == "eagle") & (timed.tree == "chain") & (timed.temperature == 0.0), "decode_s"] = 0.1
    best = {arm.method: arm for arm in measure.drafted_arms(timed, 0.7, 1)}
    assert best["eagle"] == measure.Arm("eagle", 3, "dynamic", 8)
    assert best["eagle-ps"] == measure.Arm("eagle-ps", 1, "chain", 1)
    assert len(measure.drafted_arms(timed, 0.7, 2)) == 4


def test_every_method_gives_plain_text_and_faults_are_counted(made):
    target, runs = made
    table = measure.lossless(runs, target, prompts(), "x").set_index(["method", "k", "temperature", "metric"]).value
    assert table.xs("greedy_mismatches", level="metric").sum() == 0
    assert table.xs("coupled_mismatches", level="metric").sum() == 0
    assert table["eagle", 2, 0.7, "tokens_compared"] == sum(
        len(o.split()) for o in runs[(runs.method == "plain") & (runs.temperature == 0.7)].output
    )
    broken = runs.copy()
    line = broken.index[(broken.method == "eagle") & (broken.temperature == 0.7)][0]
    tokens = broken.loc[line, "output"].split()
    broken.loc[line, "output"] = " ".join([*tokens[:5], str((int(tokens[5]) + 1) % toys.VOCAB), *tokens[6:]])
    found = measure.lossless(broken, target, prompts(), "x").set_index(["method", "k", "temperature", "metric"]).value
    assert found["eagle", 2, 0.7, "coupled_mismatches"] == 1
    assert found["eagle", 2, 0.7, "tokens_compared"] == table["eagle", 2, 0.7, "tokens_compared"] - len(tokens) + 5
    broken.loc[line, "output"] = " ".join(tokens[:5])
    short = measure.lossless(broken, target, prompts(), "x").set_index(["method", "k", "temperature", "metric"]).value
    assert short["eagle", 2, 0.7, "coupled_mismatches"] == 1


def test_a_tie_is_counted_as_a_tie(made, monkeypatch):
    target, runs = made
    broken = runs.copy()
    line = broken.index[(broken.method == "eagle") & (broken.k == 2) & (broken.temperature == 0.0)][0]
    broken.loc[line, "output"] = "0 " + broken.loc[line, "output"]
    monkeypatch.setattr(measure, "gap", lambda *arguments: 5e-5)
    found = measure.lossless(broken, target, prompts(), "x").set_index(["method", "k", "temperature", "metric"]).value
    assert found["eagle", 2, 0.0, "numeric_ties"] == 1 and found["eagle", 2, 0.0, "greedy_mismatches"] == 0


def test_gap_is_the_distance_of_the_two_best_scores(made):
    target, _ = made
    logits = target.model(torch.tensor([[1, 2, 3]])).logits[0, -1].sort(descending=True).values
    assert measure.gap(target, [1, 2, 3], Settings(temperature=0.0)) == pytest.approx((logits[0] - logits[1]).item())


def by_hand() -> pd.DataFrame:
    """Two prompts; plain takes 1 s for 10 tokens, eagle-ps at k = 2 half of it on one prompt."""
    common = {
        "temperature": 0.7,
        "rule": "coupled",
        "repeat": 0,
        "prefill_s": 0.1,
        "commit_s": 0.0,
        "host_s": 0.0,
        "repeated_8gram": 1,
    }
    none, pair = {"tree": "", "nodes": 0}, {"tree": "chain", "nodes": 2}
    rows = []
    for prompt, task, seconds, histogram in (("p", "a", 0.5, "2 1 1"), ("q", "b", 1.0, "4 0 2")):
        rows.append({**common, "method": "plain", "k": 0, **none, "task": task, "prompt": prompt, "tokens": 10,
                     "rounds": 10, "histogram": "", "draft_s": 0.0, "verify_s": 1.0, "decode_s": 1.0})  # fmt: skip
        rows.append({**common, "method": "eagle-ps", "k": 2, **pair, "task": task, "prompt": prompt, "tokens": 10,
                     "rounds": 5, "histogram": histogram, "draft_s": 0.1, "verify_s": seconds - 0.1,
                     "decode_s": seconds})  # fmt: skip
    return pd.DataFrame(rows)


def test_summary_equals_the_arithmetic():
    table = measure.summary(by_hand(), "s")
    assert list(table.columns) == measure.COLUMNS
    value = table.set_index(["method", "task", "metric"]).value
    # rounds that accepted 0, 1, 2: 6, 1, 3
    assert value["eagle-ps", "all", "tokens_per_step"] == pytest.approx(1 + 7 / 10)
    assert value["eagle-ps", "all", "accepted_per_step"] == pytest.approx(7 / 10)
    assert value["eagle-ps", "all", "accept_cond_0"] == pytest.approx(4 / 10)
    assert value["eagle-ps", "all", "accept_cond_1"] == pytest.approx(3 / 4)
    assert value["eagle-ps", "all", "accept_uncond_1"] == pytest.approx(3 / 10)
    assert value["eagle-ps", "all", "speedup_vs_plain"] == pytest.approx((20 / 1.5) / (20 / 2))
    assert value["eagle-ps", "all", "speedup_mean_rate"] == pytest.approx(((20 + 10) / 2) / 10)
    assert value["eagle-ps", "a", "speedup_vs_plain"] == pytest.approx(2.0)
    assert value["eagle-ps", "all", "draft_ms"] == pytest.approx(1e3 * 0.2 / 10)
    assert value["plain", "all", "verify_ms"] == pytest.approx(100)
    assert value["plain", "all", "repeated_8gram_share"] == pytest.approx(0.1)
    row = table[(table.task == "all") & (table.metric == "speedup_vs_plain")].iloc[0]
    assert row.low == pytest.approx(1.0) and row.high == pytest.approx(2.0)  # both draws of one prompt twice occur
    model = measure.cost_model(table)
    assert model.predicted[0] == pytest.approx(1.7 * 100 / (20 + 130))


def test_unknown_methods_are_refused():
    target = toys.target()
    with pytest.raises(UserError, match="unknown method 'eagel'; did you mean eagle"):
        measure.generate(target, {"eagle": None}, "eagel", [1], Settings())


def test_nothing_to_measure_is_refused():
    target = toys.target()
    budget = {"arms": measure.chains({"plain": [0]}), "max_new_tokens": 4}
    with pytest.raises(UserError, match="speedup: there are no temperatures"):
        measure.run(target, {}, prompts(), temperatures=[], label="speedup", **budget)
    for ks in ([16], [0, 2]):
        with pytest.raises(UserError, match=rf"draft lengths {re.escape(str(ks))}: give lengths from 1 to {toys.K}"):
            measure.draft_times(target, {"eagle": toys.drafter("eagle", target)}, ks)


@pytest.mark.parametrize("compiled", [True, False])
def test_engines_of_a_gpu_are_compiled_as_asked(compiled, monkeypatch):
    made, of = [], toys.target(torch.float64)

    def engines(target, drafters, **options):
        made.append(options)
        return lambda method, prompt, settings: decode.autoregressive(of, prompt, settings)

    monkeypatch.setattr(measure, "Engines", engines)
    monkeypatch.setattr(measure, "refuse", lambda target: None)
    target = SimpleNamespace(device=torch.device("cuda"), stop_tokens=(), context=99)
    budget = {"arms": measure.chains({"plain": [0]}), "temperatures": [0.7], "max_new_tokens": 8}
    runs = measure.run(target, {}, prompts(), compiled=compiled, **budget)
    assert made == [{"compile_layers": compiled, "length": 5 + 8}] and len(runs) == 4  # five tokens a prompt


def test_on_a_gpu_the_engine_decodes_what_it_can(monkeypatch, capsys):
    target = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(measure, "refuse", lambda target: None)
    assert measure.engine_plays(target) and not measure.engine_plays(SimpleNamespace(device=torch.device("cpu")))

    def refuse(target):
        raise UserError("it turns")

    monkeypatch.setattr(measure, "refuse", refuse)
    assert not measure.engine_plays(target) and "decoding without the engine: it turns" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draft_times_cover_every_arm(temperature):
    target = toys.target()
    drafters = {kind: toys.drafter(kind, target) for kind in ("eagle", "eagle-ps", "medusa")}
    table = measure.draft_times(target, drafters, [1, toys.K, 99], context=16, repeats=4, temperature=temperature)
    assert len(table) == 6 and set(table.k) == {1, toys.K}
    assert (table.n == 4).all() and (table.low <= table.draft_ms).all() and (table.draft_ms <= table.high).all()
    assert np.isfinite(table.draft_ms).all()


def test_coupling_stays_between_its_bounds():
    target = toys.target(torch.float64)
    for kind in ("eagle", "eagle-ps"):
        found = measure.coupling(target, toys.drafter(kind, target), [list(range(1, 30))] * 20, 1.0)
        assert len(found) == 20 * 28
        assert (found.low <= found.coupled + 1e-9).all() and (found.coupled <= found.rejection + 1e-9).all()
        assert abs(found.measured.mean() - found.coupled.mean()) < 4 * (0.25 / len(found)) ** 0.5  # standard errors


def test_coupling_judges_slot_0_as_decoding_does():
    """The row of anchor t against a draft from the same context."""
    target = toys.target(torch.float64)
    drafter, text = toys.drafter("eagle-ps", target), [3, 1, 4, 1, 5, 9, 2, 6]
    found = measure.coupling(target, drafter, [text], 1.0)
    ids = torch.tensor([text])
    features = target.features(ids, torch.arange(len(text))[None], None)
    cache = KVCache(1, 20)
    drafter.prefill(features[:, :5], ids[:, 1:6], cache)
    q = drafter.marginals(features[:, 5:6], ids[:, 6:7], 1, cache).softmax(-1)  # of x_7, given x_0 .. x_6
    p = target.logits(features[0, 6]).softmax(-1)
    assert found.rejection[5] == pytest.approx(torch.minimum(p, q[0]).sum().item())


def enumerated(target, text: list[int], slots: int, temperature: float) -> torch.Tensor:
    """Marginals [slots, V] of the tokens after `text`, every continuation weighed by its probability."""
    p = (target.model(torch.tensor([text])).logits[0, -1] / temperature).softmax(-1)
    if slots == 1:
        return p[None]
    after = [enumerated(target, [*text, token], slots - 1, temperature) for token in range(len(p))]
    return torch.cat([p[None], (p[:, None, None] * torch.stack(after)).sum(0)])


def test_slot_marginals_equal_full_enumeration():
    target, known, samples = toys.target(torch.float64, vocab_size=13, eos_token_id=12), [3, 1, 4, 1, 5], 1500
    wanted = enumerated(target, known, 3, 0.2)
    cache = KVCache(target.layers, 7 + 2 * samples)
    features = decode._forward(target, torch.tensor([*known, 9, 2]), cache)[0]  # two tokens more than are known
    logits, sampling = target.logits(features[4:5]), {"samples": samples, "draw": torch.Generator().manual_seed(0)}
    found = measure.slot_marginals(target, cache, 5, logits, 3, temperature=0.2, **sampling)
    assert cache.length == 7
    torch.testing.assert_close(found[0], wanted[0])
    error = 4 * (0.25 / samples) ** 0.5  # four standard errors of a share, at most
    assert (found - wanted).abs().max() < error
    assert ((wanted[1:] - wanted[:-1]).abs().amax(-1) > error).all()  # or this would prove nothing


def test_marginals_draft_what_enumeration_drafts():
    """k = 2, seen and blind: exact marginals, the noise of the positions, and what plain decoding makes of it."""
    target, prompt = toys.target(torch.float64, vocab_size=13, eos_token_id=12), [3, 1, 4, 1, 5]
    target.stop_tokens = ()
    found = measure.marginals(target, [prompt], 2, temperature=0.4, samples=500, positions=8, seed=1)
    plain = decode.autoregressive(target, prompt, Settings(temperature=0.4, max_new_tokens=25, seed=1)).tokens
    text, wanted = prompt + plain, []
    for seen in (True, False):
        at = 6  # the prompt and the root
        for _ in range(8):
            noise = gumbel(1, torch.arange(at, at + 2), 13, torch.float64)
            exact = enumerated(target, text[: at - (not seen)], 2 + (not seen), 0.4)[-2:]
            right = [a == b for a, b in zip((exact.log() + noise).argmax(-1).tolist(), text[at:], strict=False)]
            wanted.append((seen, at, right[0] + (right[0] and right[1])))
            at += wanted[-1][-1] + 1
    assert len({accepted for seen, _, accepted in wanted if not seen}) == 3  # all cases occur
    assert list(found[["seen", "position", "accepted"]].itertuples(index=False, name=None)) == wanted


def test_marginals_start_where_a_draft_would():
    """At T = 0 nothing is lost, seen or blind; above, the first slot of one that sees the root has p itself."""
    target, texts = toys.target(torch.float64), prompts()["input_ids"]
    greedy = measure.marginals(target, texts, 3, temperature=0.0, samples=3, positions=4)
    assert (greedy.accepted == 3).all() and set(greedy.seen) == {True, False}
    found = measure.marginals(target, texts, 1, temperature=1.0, samples=8, positions=6, seed=5)
    assert (found[found.seen].accepted == 1).all() and (found[~found.seen].accepted == 0).any()
    first = found[found.seen & (found.text == 0)]
    assert first.position.tolist() == list(range(6, 6 + 2 * len(first), 2)) and len(first) == 6  # the root is known


def test_rows_of_marginals_equal_the_arithmetic():
    found = pd.DataFrame(
        [
            (0, 6, True, 1.0, 2),
            (0, 8, True, 1.0, 1),
            (1, 6, True, 1.0, 0),
            (0, 6, False, 1.0, 0),
            (1, 6, False, 1.0, 1),
        ],
        columns=["text", "position", "seen", "sharpen", "accepted"],
    )
    table = measure.marginal_rows(found, 2, 0.7, "s")
    assert list(table.columns) == measure.COLUMNS and set(table.stage) == {"s"} and (table.k == 2).all()
    value = table.set_index(["method", "metric"]).value
    assert value["exact marginals", "tokens_per_step"] == pytest.approx(1 + 3 / 3)
    assert value["exact marginals", "accept_cond_0"] == pytest.approx(2 / 3)
    assert value["exact marginals", "accept_cond_1"] == pytest.approx(1 / 2)
    assert value["exact marginals, blind", "tokens_per_step"] == pytest.approx(1.5)
    seen = table[(table.method == "exact marginals") & (table.metric == "tokens_per_step")].iloc[0]
    assert seen.low == pytest.approx(1.0) and seen.high == pytest.approx(2.5) and seen.n == 2  # one text twice


def test_tree_times_cover_the_sizes():
    table = measure.tree_times(toys.target(), 3, [4, 8], context=12, repeats=3)
    assert table.nodes.tolist() == [4, 8] and (table[["build_ms", "walk_ms", "forward_ms"]] > 0).all().all()


def test_two_arms_beside_each_other_are_paired_by_prompt():
    """Speeds differ tenfold between prompts and by exactly 1.5 within each: no interval has any width."""
    arms = measure.Arm("eagle-ps", 2, "chain", 2), measure.Arm("eagle", 1, "chain", 1)
    rows = []
    for i, (arm, slower) in enumerate((*((arms[0], 1.0),) * 4, *((arms[1], 1.5),) * 4)):
        about = {"temperature": 0.7, "prompt": f"p{i % 4}", "repeat": 0}
        shares = {"tokens": 10, "decode_s": slower * (1 + 9 * (i % 2)), "histogram": "4 2 2" if i < 4 else "6 2"}
        rows.append({**vars(arm), **about, **shares})
    runs = pd.DataFrame(rows)
    assert measure.beside(runs, *arms, 0.7, "tokens_per_second") == pytest.approx((1.5, 1.5, 1.5))
    assert measure.beside(runs, *arms, 0.7, "tokens_per_step") == pytest.approx(((14 / 8) / (10 / 8),) * 3)
    assert measure.beside(runs, *arms, 0.7, "accept_cond_0") == pytest.approx(((4 / 8) / (2 / 8),) * 3)
    assert measure.beside(runs, *arms[::-1], 0.7, "tokens_per_second") == pytest.approx((2 / 3,) * 3)
    runs.loc[7, "decode_s"] *= 2  # one prompt of the second arm: the ratio, and now an interval about it
    at, low, high = measure.beside(runs, *arms, 0.7, "tokens_per_second")
    assert at == pytest.approx((40 / 22) / (40 / (1.5 * 22 + 15))) and low < at < high
    assert measure.beside(runs[runs.prompt != "p0"], *arms, 0.7, "tokens_per_second")[0] != pytest.approx(at)
    assert measure.beside(runs, *arms, 0.0, "tokens_per_second") is None
    nothing = runs.assign(histogram=runs.histogram.replace({"6 2": "8 0"}))
    assert measure.beside(nothing, *arms, 0.7, "accept_cond_0") is None
    assert measure.beside(runs.iloc[[0, 5]], *arms, 0.7, "tokens_per_second") is None  # no prompt in common
    at, low, high = measure.beside(runs.iloc[[0, 4]], *arms, 0.7, "tokens_per_second")
    assert (at, low, high) == (pytest.approx(1.5), 0.0, np.inf)  # one prompt: nothing is known of others


def test_one_prompt_has_no_interval():
    table = measure.summary(by_hand(), "s").set_index(["method", "task", "metric"])
    one, both = (table.loc["eagle-ps", task, "speedup_vs_plain"] for task in ("a", "all"))
    assert one.n == 1 and one.value == pytest.approx(2.0) and np.isnan([one.low, one.high]).all()
    assert both.n == 2 and both.low < both.value < both.high


def test_trees_fit_the_drafters_there_are():
    """Drafters are known by their kind, whatever their name; a tree that is grown has 8 nodes at k = 1, 72 at 2."""
    sizes = {"eagle": [[2, 8]], "eagle-ps": [[5, 8], [8, 16], [8, 32]], "mine": [[2, 4], [4, 99]], "short": [[4, 16]]}
    specs = {"eagle-ps": ("eagle-ps", 4), "mine": ("eagle", 2), "short": ("eagle", 1), "other": ("medusa", 3)}
    found = measure.trees(sizes, {name: DrafterSpec(kind=kind, k=k) for name, (kind, k) in specs.items()})
    shapes = [(arm.method, arm.k, arm.tree, arm.nodes) for arm in found]
    for wrong in ([3, 8], [[0, 8]], [[3]]):
        with pytest.raises(UserError, match="trees of mine: .*; give pairs"):
            measure.trees({"mine": wrong}, {})
    grown = [("mine", 2, "dynamic", 4), ("mine", 2, "dynamic", 72), ("short", 1, "dynamic", 8)]
    assert shapes == [*(("eagle-ps", 4, "best_first", n) for n in (8, 16, 32)), *grown]


def test_plain_decoding_in_float32_stands_beside_another_format():
    target, wide = toys.target(torch.bfloat16), toys.target(torch.float32)
    arms = measure.chains({"plain": [0], measure.PLAIN32: [0]})
    runs = measure.run(target, {}, prompts(), arms=arms, temperatures=[0.7], max_new_tokens=8, wide=wide)
    first = runs[runs.method == measure.PLAIN32].iloc[0]
    settings = Settings(temperature=0.7, max_new_tokens=8, seed=int(first.seed), stop_tokens=wide.stop_tokens)
    assert first.output == " ".join(map(str, decode.autoregressive(wide, prompts()[0]["input_ids"], settings).tokens))
    table = measure.summary(runs, "s").set_index(["method", "task", "metric"]).value
    speed = runs.groupby("method")[["tokens", "decode_s"]].sum().pipe(lambda of: of.tokens / of.decode_s)
    assert table[measure.PLAIN32, "all", "speedup_vs_plain"] == pytest.approx(speed[measure.PLAIN32] / speed["plain"])
