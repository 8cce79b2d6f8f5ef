"""Invariants 1 and 3: training equals decoding for every drafter, anchor and slot; documents do not see each other."""

import json

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from psnb import drafters, groups, train
from psnb.cache import KVCache
from psnb.errors import UserError
from psnb.profile import FitSpec
from psnb.target import as_batch
from psnb.tree import Candidates, Plan

KINDS = list(drafters.KINDS)


def one_document(n: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, toys.VOCAB, (1, n), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "document": torch.zeros_like(ids)}


def decoded_logits(drafter, features, ids, anchor, k):
    """Logits of all k slots as decoding makes them, with row `anchor` as the newest real row."""
    cache, seen = KVCache(max(1, drafter.spec.layers), 64), []

    def choose(logits, slots, pairs=None):
        seen.append(logits)
        best = logits.argmax(-1, keepdim=True)
        return Candidates(best, best, None, pairs and pairs(best))

    if anchor:
        drafter.prefill(features[:, :anchor], ids[:, 1 : anchor + 1], cache)
    plan = Plan("chain", k, k, drafter.target.vocab_size)
    drafter.ready()
    tokens = drafter.draft(
        features[:, anchor : anchor + 1], ids[:, anchor + 1 : anchor + 2], plan, choose, cache
    ).tokens
    assert cache.length == (0 if drafter.spec.kind == "medusa" else anchor + 1)  # the real rows and nothing else
    return torch.cat(seen), tokens


OPTIONS = [{}, {"layers": 2}, {"mask_mode": "shared", "layers": 2}, {"attention": "dense"}, {"taps": [1]}, {"link": 8}]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_forward_equals_decoding_forward(kind, changes):
    if {"taps", "link"} & changes.keys() and not kind.endswith("-ps"):
        pytest.skip("refused")
    target = toys.target()
    drafter = toys.drafter(kind, target, **changes)
    batch = one_document()
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    features = train.teacher(target, batch, drafter.spec.taps)
    depth, anchor = groups.layout(n - 1, drafter.masks)
    slots = train.slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1), alone=1)
    assert len(slots.sizes) == (1 if kind == "eagle" else toys.K)
    for t in range(n - 1):
        for k in (1, toys.K):
            decoded, _ = decoded_logits(drafter, features, ids, t, k)
            for slot, hidden in enumerate(slots.parts()[:k]):
                torch.testing.assert_close(drafter.logits(hidden[:, t], slot)[0], decoded[slot], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle-ps", "medusa-ps"])
def test_training_links_equal_decoding_links(kind):
    """Candidates among which the text's tokens are: after these a slot's logits are those of training on the text."""
    target = toys.target()
    drafter = toys.drafter(kind, target, link=8)
    batch = one_document()
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    features = train.teacher(target, batch)
    depth, anchor = groups.layout(n - 1, drafter.masks)
    counts = [n - 1] * (drafter.masks + 1)
    made, deaf, most = (train.slots(drafter, batch, features, depth, anchor, counts, a) for a in (0, 1, 4))
    drafter.ready()
    share = (most.hidden == deaf.hidden).all(-1).float().mean()
    assert 0.2 < share < 0.3 and ((most.hidden == deaf.hidden) | (most.hidden == made.hidden)).all()
    for t in range(n - 1 - toys.K):
        cache = KVCache(max(1, drafter.spec.layers), 64)
        if t:
            drafter.prefill(features[:, :t], ids[:, 1 : t + 1], cache)
        hidden = drafter.ahead(features[:, t : t + 1], ids[:, t + 1 : t + 2], toys.K, cache)
        others = torch.randint(0, toys.VOCAB, (toys.K, 4), generator=torch.Generator().manual_seed(t))
        tokens = torch.cat([others, ids[0, t + 2 : t + 2 + toys.K, None]], 1)  # the text's is the last candidate
        found = drafter.pairs(drafter.logits(hidden, 0), hidden, tokens, ids[0, t + 1])
        assert torch.equal(found[0, 0], found[0, -1]) and not torch.equal(found[1, 0], found[1, -1])
        for slot, rows in enumerate(made.parts()):
            expected = drafter.logits(rows[0, t], slot)[tokens[slot]]
            torch.testing.assert_close(found[slot, -1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle-ps", "medusa-ps"])
def test_what_drafts_take_from_weights_is_made_anew_after_training_and_not_saved(kind):
    drafter = toys.drafter(kind, toys.target(), link=8)
    drafter.ready()
    made, names = (drafter.pairs.written, drafter.planted), drafter.state_dict().keys()
    twice = tuple(2 * part for part in made)
    drafter.ready()
    assert drafter.pairs.written is made[0] and drafter.planted is made[1]
    assert not [n for n in names if "written" in n or "heard" in n or "planted" in n]
    drafter.train()
    masks = drafter.mask_pair if kind == "eagle-ps" else drafter.mask_row
    for weight in (drafter.link.write.weight, masks):
        weight.data.mul_(2)
    drafter.eval().ready()
    torch.testing.assert_close((drafter.pairs.written, drafter.planted), twice)


def test_later_eagle_slots_equal_a_forward_without_a_cache():
    target = toys.target()
    eagle = toys.drafter("eagle", target)
    batch = one_document()
    features, ids, t = train.teacher(target, batch), batch["input_ids"], 5
    decoded, tokens = decoded_logits(eagle, features, ids, t, toys.K)
    inputs_f, inputs_x = features[:, : t + 1], ids[:, 1 : t + 2]
    for slot in range(toys.K):  # the whole prefix again for every slot
        r = inputs_f.shape[1]
        mask = torch.ones(1, 1, r, r, dtype=torch.bool).tril()
        hidden = eagle.body(eagle.fuse(inputs_f, inputs_x), torch.arange(r)[None], mask)[:, -1:]
        torch.testing.assert_close(target.logits(hidden[0, 0]), decoded[slot], rtol=1e-5, atol=1e-5)
        inputs_f, inputs_x = torch.cat([inputs_f, hidden], 1), torch.cat([inputs_x, tokens[None, slot : slot + 1]], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_slot_is_judged_by_the_token_it_drafts(kind):
    """Slot i of anchor t belongs to x_{t+2+i}: the target's logits at t + 1 + i, inside the document."""
    target, n = toys.target(), 10
    drafter = toys.drafter(kind, target)
    batch = one_document(n)
    batch["document"][:, 6:] = 1
    depth, anchor = groups.layout(n - 1, drafter.masks)
    slots = train.slots(drafter, batch, train.teacher(target, batch), depth, anchor, [n - 1] * (drafter.masks + 1))
    valids, positions = slots.valid.split(slots.sizes, 1), slots.place.split(slots.sizes)
    for slot, (position, valid) in enumerate(zip(positions, valids, strict=True)):
        for t in range(n - 1):
            token = t + 2 + slot
            inside = token < 6 if t < 6 else token < n
            assert valid[0, t] == inside
            if inside:
                assert position[t] == token - 1


@pytest.mark.parametrize("attention", ["structured", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind, attention):
    target = toys.target()
    taps = [1] if kind.endswith("-ps") else []
    drafter = toys.drafter(kind, target, feature_weight=1.0, streak_weight=1.0, attention=attention, taps=taps)
    generator = torch.Generator().manual_seed(9)
    texts = [torch.randint(0, toys.VOCAB, (length,), generator=generator) for length in (7, 9, 8)]

    def sums(order: list[int]) -> torch.Tensor:
        batch = {
            "input_ids": torch.cat([texts[i] for i in order])[None],
            "document": torch.cat([torch.full_like(texts[i], place) for place, i in enumerate(order)])[None],
        }
        n = batch["input_ids"].shape[1]
        depth, anchor = groups.layout(n - 1, drafter.masks)
        counts = [n - 1] * (drafter.masks + 1)
        made = train.group_sums(drafter, batch, train.teacher(target, batch, taps), depth, anchor, counts)
        return torch.stack([made[name] for name in ("nats", "gap", "streak", "match", "rows")])

    together = sums([0, 1, 2])
    torch.testing.assert_close(together, sums([2, 0, 1]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together, sum(sums([i]) for i in range(3)), rtol=1e-5, atol=1e-4)


def test_loss_is_the_cross_entropy_written_out():
    target = toys.target()
    drafter = toys.drafter("eagle-ps", target, slot_decay=0.5)
    batch = one_document(8)
    features = train.teacher(target, batch)
    depth, anchor = groups.layout(7, drafter.masks)
    loss, parts = train.group_loss(drafter, batch, features, depth, anchor, [7] * (drafter.masks + 1))
    p = target.model(batch["input_ids"]).logits[0].softmax(-1)
    by_slot = []
    for slot in range(toys.K):
        terms = []
        for t in range(7):
            if t + 2 + slot < 8:
                q, _ = decoded_logits(drafter, features, batch["input_ids"], t, toys.K)
                terms.append(-(p[t + 1 + slot] * q[slot].log_softmax(-1)).sum())
        by_slot.append(torch.stack(terms).mean())
        torch.testing.assert_close(parts["nats"][slot], torch.stack(terms).sum(), rtol=1e-4, atol=1e-4)
    weights = [0.5**i for i in range(toys.K)]
    expected = sum(w * term for w, term in zip(weights, by_slot, strict=True)) / sum(weights)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def written_out(drafter, batch, features, depth, anchor):
    """The loss of `group_loss` row by row, from the hidden rows on: plain autograd, whole tables of logits."""
    spec, ids, document = drafter.spec, batch["input_ids"], batch["document"]
    p = drafter.target.logits(features).softmax(-1)
    counts = torch.bincount(depth).tolist()
    made = train.slots(drafter, batch, features, depth, anchor, counts)
    every = range(len(made.sizes))
    kept = [anchor[depth == (0 if drafter.masks == 0 else s - drafter.first_slot)].tolist() for s in every]
    weights = [spec.slot_decay**s for s in every]
    loss, log_q, rows, n = 0.0, {}, range(len(ids)), ids.shape[1]
    for s, hidden in enumerate(made.parts()):
        nats, gaps = [], []
        for b in rows:
            for i, t in enumerate(kept[s]):
                x = t + 2 + s
                if x < n and document[b, x] == document[b, t] and batch["loss_mask"][b, x]:
                    q = drafter.logits(hidden[b, i], s).log_softmax(-1)
                    log_q[b, t, s] = q[ids[b, x]]
                    nats.append(-q[ids[b, x]] if spec.labels == "hard" else -(p[b, x - 1] * q).sum())
                    f = features[b, x - 1, -hidden.shape[-1] :]
                    gaps.append(torch.nn.functional.smooth_l1_loss(hidden[b, i], f))
        mean = spec.ce_weight * torch.stack(nats).mean() + spec.feature_weight * torch.stack(gaps).mean()
        loss = loss + weights[s] / sum(weights) * mean
        whole = [(b, t) for b in rows for t in kept[s] if all((b, t, j) in log_q for j in range(s + 1))]
        prefix = [torch.stack([log_q[b, t, j] for j in range(s + 1)]).sum().exp() for b, t in whole]
        loss = loss - spec.streak_weight * torch.stack(prefix).mean()
    return loss


LOSSES = [
    {},
    {"labels": "hard"},
    {"streak_weight": 0.7},
    {"labels": "hard", "streak_weight": 0.7, "ce_weight": 0.5, "feature_weight": 2.0},
    {"keep": 0.7, "streak_weight": 0.7, "attention": "dense"},
]


@pytest.mark.parametrize("logits", [toys.VOCAB * 5, toys.VOCAB * 70, train.LOGITS])
@pytest.mark.parametrize("changes", LOSSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_the_loss_written_out(kind, changes, logits, monkeypatch):
    monkeypatch.setattr(train, "LOGITS", logits)  # pieces of 5 rows, of a sequence, of everything
    target = toys.target()
    drafter = toys.drafter(kind, target, k=3, **changes).requires_grad_(True)
    batch = as_batch(toys.rows(2, 18))
    batch["loss_mask"] = torch.ones_like(batch["document"])
    batch["loss_mask"][0, :6] = 0
    batch["loss_mask"][1, 11] = 0
    features = train.teacher(target, batch)
    depth, anchor = groups.drop(17, drafter.masks, drafter.spec.keep, 0.3, torch.Generator().manual_seed(0))
    slopes = []
    ours, _ = train.group_loss(drafter, batch, features, depth, anchor, torch.bincount(depth).tolist())
    for loss in (ours, written_out(drafter, batch, features, depth, anchor)):
        drafter.zero_grad()
        loss.backward()
        slopes.append([loss.detach(), *(w.grad.clone() for w in drafter.parameters() if w.grad is not None)])
    assert len(slopes[0]) == len(slopes[1]) > 4
    for mine, reference in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_acceptance_equals_counting_by_hand():
    target = toys.target()
    drafter = toys.drafter("eagle-ps", target)
    batch = one_document(14)
    features = train.teacher(target, batch)
    best = target.model(batch["input_ids"]).logits[0].argmax(-1)
    tried, hit = [0] * toys.K, [0] * toys.K
    for t in range(13):
        q, _ = decoded_logits(drafter, features, batch["input_ids"], t, toys.K)
        for slot in range(toys.K):
            if t + 2 + slot >= 14:
                break
            tried[slot] += 1
            if q[slot].argmax() != best[t + 1 + slot]:
                break
            hit[slot] += 1
    values = train.acceptance(drafter, batch)
    for slot in range(toys.K):
        assert values[f"accept_cond_{slot}"] == pytest.approx(hit[slot] / max(1, tried[slot]))


def test_acceptance_counts_chains_that_the_loss_mask_selects(monkeypatch):
    """A drafter that is always right is so from slot 0 to the last, also where answers are short."""
    monkeypatch.setattr(train, "score", lambda of, batch, features, made: (None, None, torch.ones_like(made.valid)))
    target = toys.target()
    batch = one_document(24)
    batch["loss_mask"] = (torch.arange(24) % 8 >= 3).long()[None]  # answers of five tokens
    values = train.acceptance(toys.drafter("eagle-ps", target), batch)
    assert values == {f"accept_{of}_{slot}": 1.0 for slot in range(toys.K) for of in ("cond", "uncond")}


@pytest.mark.parametrize(("cls", "scale"), [(LlamaConfig, 2.0), (GemmaConfig, 3.0), (GPT2Config, 2.0)])
def test_rows_start_with_the_scale_of_features(cls, scale):
    """Gemma's norm multiplies by 1 + weight; GPT-2 has no word for the width of its feed-forward part."""
    target = toys.target(cls=cls, head_dim=8)
    if cls is GPT2Config:
        del target.config.intermediate_size  # toys has one
    norm = [part for part in target.model.base_model.children() if getattr(part, "weight", torch.eye(1)).ndim == 1][-1]
    norm.weight.data.fill_(2.0)
    drafter = toys.drafter("eagle-ps", target)
    fresh = drafters.build(drafter.spec, target)
    torch.testing.assert_close(fresh.body.norm.weight.data, torch.full((32,), scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_training_lowers_the_loss_and_round_trips(kind, tmp_path):
    target = toys.target()
    spec = toys.drafter(kind, target, train=FitSpec(steps=60, rows=2, warmup=1)).spec
    lines = []
    arguments = {"seed": 0, "device": torch.device("cpu")}
    train.train_drafter(spec, target, toys.rows(), toys.rows(2, seed=5), tmp_path, log=lines.append, **arguments)
    loss = [row["value"] for row in lines if row["metric"] == "loss"]
    assert loss[-1] < loss[0]
    loaded = drafters.load(tmp_path, target)
    assert loaded.spec == spec
    again = tmp_path / "again"
    again.mkdir()
    train.train_drafter(spec, target, toys.rows(), toys.rows(2, seed=5), again, **arguments)
    assert (again / "drafter.safetensors").read_bytes() == (tmp_path / "drafter.safetensors").read_bytes()


def test_warm_start_adds_layers_as_the_identity(tmp_path):
    target = toys.target()
    eagle = toys.drafter("eagle", target)
    drafters.save(eagle, tmp_path)
    deeper = toys.drafter("eagle-ps", target, layers=2)
    train.warm_start(deeper, tmp_path)
    source = drafters.load(tmp_path, target)
    features, ids = torch.randn(1, 5, 32), torch.randint(0, toys.VOCAB, (1, 5))
    place, mask = torch.arange(5)[None], torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        deeper.body(deeper.fuse(features, ids), place, mask), source.body(source.fuse(features, ids), place, mask)
    )


@pytest.mark.parametrize("kind", ["eagle-ps", "medusa-ps"])
def test_warm_start_with_taps_starts_as_without(kind, tmp_path):
    target = toys.target()
    drafters.save(toys.drafter("eagle-ps" if kind == "eagle-ps" else "eagle", target), tmp_path)
    batch = one_document()
    depth, anchor = groups.layout(11, toys.K - 1)
    logits = []
    for taps in ([], [1]):
        torch.manual_seed(3)
        drafter = drafters.build(toys.drafter(kind, target, taps=taps).spec, target).requires_grad_(False)
        train.warm_start(drafter, tmp_path)
        if kind == "medusa-ps":
            drafter.mask_row.fill_(0.3)
        features = train.teacher(target, batch, taps)
        made = train.slots(drafter, batch, features, depth, anchor, [11] * toys.K)
        logits.append([drafter.logits(hidden, slot) for slot, hidden in enumerate(made.parts())])
    torch.testing.assert_close(*logits)


def test_taps_are_the_layers_outputs_before_the_feature():
    target = toys.target(num_hidden_layers=3)
    batch = one_document()
    states = target.model(batch["input_ids"], output_hidden_states=True).hidden_states
    features = train.teacher(target, batch, [2, 1])
    torch.testing.assert_close(features, torch.cat([states[2], states[1], states[3]], -1))
    torch.testing.assert_close(target.logits(features), target.model(batch["input_ids"]).logits)
    for kind, changes, message in [
        ("eagle", {"taps": [1]}, "are for medusa-ps"),
        ("eagle", {"link": 8}, "are for medusa-ps"),
        ("eagle-ps", {"taps": [3]}, "1 to 2"),
        ("eagle-ps", {"taps": [0]}, "1 to"),
    ]:
        with pytest.raises(UserError, match=message):
            toys.drafter(kind, target, **changes)


def test_slots_join_over_the_curriculum():
    target = toys.target()
    for kind, masks in [("eagle-ps", [0, 1, 2, 3, 3, 3, 3, 3]), ("medusa-ps", [1, 2, 3, 4, 4, 4, 4, 4])]:
        drafter = toys.drafter(kind, target, curriculum=0.5)
        assert [train.masks_at(drafter, step, 8) for step in range(8)] == masks
        assert train.masks_at(toys.drafter(kind, target), 0, 8) == drafter.masks


def test_every_option_trains(tmp_path):
    target, lines = toys.target(), []
    options = {"curriculum": 0.6, "anchors": 0.5, "keep": 0.8, "taps": [1], "labels": "hard", "streak_weight": 0.1}
    spec = toys.drafter("eagle-ps", target, train=FitSpec(steps=40, rows=2, warmup=1), **options).spec
    how = {"seed": 0, "device": torch.device("cpu"), "log": lines.append}
    train.train_drafter(spec, target, toys.rows(), toys.rows(2), tmp_path, **how)
    assert drafters.load(tmp_path, target).spec == spec
    seen = {row["metric"] for row in lines if row["step"] == 20}
    assert {"loss_0", "loss_2"} < seen and "loss_3" in {row["metric"] for row in lines if row["step"] == 40}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": torch.zeros(2, 24, dtype=torch.long)}, "mask selects nothing"),
        ({"document": torch.arange(24).expand(2, 24) // 2}, "more than 2 tokens"),
        ({"input_ids": torch.zeros(0, 24), "document": torch.zeros(0, 24)}, "rows are empty"),
        ({"input_ids": torch.full((2, 24), toys.VOCAB)}, "token 61, the target has 61"),
    ],
)
def test_rows_that_teach_nothing_are_refused_before_the_first_step(change, message, tmp_path):
    target, lines = toys.target(), []
    spec = toys.drafter("eagle-ps", target).spec
    rows = {**as_batch(toys.rows(2)), **change}
    with pytest.raises(UserError, match=message):
        train.train_drafter(
            spec, target, rows, toys.rows(2), tmp_path, seed=0, device=torch.device("cpu"), log=lines.append
        )
    assert not lines and not list(tmp_path.iterdir())


def test_a_drafter_saved_before_an_option_existed_loads(tmp_path):
    target = toys.target()
    drafters.save(toys.drafter("eagle-ps", target), tmp_path)
    stored = json.loads((tmp_path / "spec.json").read_text())
    for name in ("anchors", "attention", "curriculum", "labels", "streak_weight", "taps"):
        stored["spec"].pop(name)
    (tmp_path / "spec.json").write_text(json.dumps(stored))
    assert drafters.load(tmp_path, target).spec.attention == "structured"


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "nan", "garbage"])
def test_a_damaged_drafter_is_refused(fault, tmp_path):
    target = toys.target()
    drafters.save(toys.drafter("eagle-ps", target), tmp_path)
    file = tmp_path / "drafter.safetensors"
    weights = load_file(file)
    if fault == "missing":
        weights.pop("fc.weight")
    elif fault == "surplus":
        weights["lm_head.weight"] = torch.zeros(2)
    elif fault == "shape":
        weights["fc.weight"] = weights["fc.weight"][:3].contiguous()
    elif fault == "nan":
        weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, file)
    if fault == "garbage":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="drafter .*(tensors|NaN|does not load).*train it again"):
        drafters.load(tmp_path, target)


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path):
    drafters.save(toys.drafter("eagle", toys.target()), tmp_path)
    with pytest.raises(UserError, match="vocab_size 61, this one has 70"):
        drafters.load(tmp_path, toys.target(vocab_size=70))


def test_saved_drafters_hold_none_of_the_target(tmp_path):
    target = toys.target()
    for kind in ("eagle", "eagle-ps", "medusa-ps"):
        drafters.save(toys.drafter(kind, target), tmp_path)
        shapes = [tuple(tensor.shape) for tensor in load_file(tmp_path / "drafter.safetensors").values()]
        assert (toys.VOCAB, 32) not in shapes
    assert json.loads((tmp_path / "spec.json").read_text())["vocab_size"] == toys.VOCAB


def test_as_batch_reads_packed_rows():
    batch = as_batch(toys.rows(2, 24))
    assert batch["input_ids"].shape == (2, 24) and batch["document"].dtype == torch.long
    assert as_batch(batch)["document"].tolist() == batch["document"].tolist()
