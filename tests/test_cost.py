"""Rounds taken apart: arithmetic by hand, shapes against their parameters, replays against what was recorded."""

import numpy as np
import pandas as pd
import pytest
import torch
import toys

from psnb import cost
from psnb.errors import UserError
from psnb.measure import Arm
from psnb.profile import DrafterSpec

ARM = Arm("eagle-ps", 3, "chain", 3)


def test_a_shape_reads_all_its_weights_but_the_input_embedding():
    target = cost.shape("toy", torch.device("cpu"), torch.bfloat16)
    assert target.dtype == torch.bfloat16 and target.context == cost.CONTEXT
    hidden, layers, _, keys, inner, vocab = cost.SHAPES["toy"]
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // 4) * keys + 3 * hidden * inner + 2 * hidden
    assert cost.step_bytes(target) == 2 * (layers * layer + hidden + vocab * hidden)
    tied = toys.target(tie_word_embeddings=True)
    assert cost.step_bytes(tied) == 4 * sum(w.numel() for w in tied.model.parameters())
    with pytest.raises(UserError, match="llama-2-7c.*llama-2-7b"):
        cost.shape("llama-2-7c", torch.device("cpu"), torch.bfloat16)


def test_recorded_counts_are_those_of_the_arm():
    lines = [(*("eagle-ps", "chain", 3, 3, "coupled"), 0.7, h) for h in ("2 0 1 0", "0 0 0 3")]
    lines += [
        ("eagle-ps", "chain", 3, 3, "coupled", 0.0, "9 0 0 0"),
        ("eagle", "chain", 3, 3, "coupled", 0.7, "9 0 0 0"),
    ]
    runs = pd.DataFrame(lines, columns=["method", "tree", "k", "nodes", "rule", "temperature", "histogram"])
    assert sorted(cost.counts(runs, ARM, 0.7)) == [0, 0, 2, 3, 3, 3]
    assert cost.counts(runs, Arm("eagle-ps", 2, "chain", 2), 0.7) == []
    assert sorted(cost.traces(runs, [Arm("plain"), ARM], 0.7)[ARM]) == [0, 0, 2, 3, 3, 3]
    with pytest.raises(UserError, match=r"no recorded rounds of medusa, k = 2, chain at T = 0\.7: run notebook 04_sp"):
        cost.traces(runs, [ARM, Arm("medusa", 2, "chain", 2)], 0.7)


def test_speeds_by_hand():
    shown = {"tree": "", "k": 0, "nodes": 0, "host_share": 0.0, "draft_ms": 1.0, "walk_ms": 1.0, "commit_ms": 1.0}
    lines = [("plain", 1, 5.0, 1.0, 2.0), ("eagle", 1, 8.0, 3.0, 4.0), ("plain", 4, 10.0, 1.0, 7.0)]
    names = ["method", "batch", "round_ms", "tokens_per_step", "verify_ms"]
    frame = pd.DataFrame(lines, columns=names).assign(**shown)
    made = cost.speeds(frame, floor_ms=4.0)
    assert made.tokens_per_second.tolist() == [200.0, 375.0, 400.0]
    assert made.speedup.tolist() == [1.0, 3 * 5 / 8, 1.0]
    assert made.sum_gap.tolist() == pytest.approx([0.0, 8 / 7 - 1, 0.0])
    assert made.floor_share[0] == 0.8 and np.isnan(made.floor_share[1])
    assert made.needed[1] == pytest.approx(cost.PAPER * 8 / 5) and np.isnan(made.needed[0])
    rows = cost.summary(made, "07_cost", "toy", 0.7).set_index(["task", "method", "metric"]).value
    assert rows["toy x 1", "eagle", "speedup_vs_plain"] == 3 * 5 / 8 and rows["toy x 4", "plain", "round_ms"] == 10.0


def test_a_replayed_round_accepts_what_was_recorded():
    target = cost.shape("toy", torch.device("cpu"), torch.float32)
    specs = {"eagle-ps": DrafterSpec(kind="eagle-ps", k=4, layers=2), "eagle": DrafterSpec(kind="eagle", k=4)}
    own = cost.matching(specs, target)
    tree = Arm("eagle-ps", 4, "best_first", 6)
    recorded = {ARM: [0, 3, 1], tree: [2]}
    arms = [Arm("plain"), Arm("hf_static"), ARM, tree]
    budget = {"batches": [1, 2], "context": 9, "tokens": 13, "repeats": 1}
    frame = cost.rounds(target, own, arms, recorded=recorded, **budget)
    assert len(frame) == 4 + 3  # transformers' own at batch 1 alone
    steps = frame.set_index(["method", "tree", "batch"]).tokens_per_step
    assert steps["plain", "", 1] == 1 and steps["eagle-ps", "best_first", 2] == 3
    assert steps["eagle-ps", "chain", 1] == pytest.approx(1 + 4 / 3)  # as recorded, whichever rounds were timed
    times = frame[frame.method != "hf_static"][["draft_ms", "verify_ms", "walk_ms", "commit_ms", "round_ms"]]
    assert (times > 0).all(axis=None)
