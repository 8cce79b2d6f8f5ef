"""Invariants 1 and 3: training equals decoding for every drafter, anchor and slot; documents do not see each other."""

import json

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from psnb import drafters, groups, train
from psnb.cache import KVCache
from psnb.errors import UserError
from psnb.target import as_batch

KINDS = list(drafters.KINDS)


def one_document(n: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, toys.VOCAB, (1, n), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "document": torch.zeros_like(ids)}


def decoded_logits(drafter, features, ids, anchor, k):
    """Logits of all k slots as decoding makes them, with row `anchor` as the newest real row."""
    cache, seen = KVCache(max(1, drafter.spec.layers), 64), []

    def choose(logits, slot):
        seen.append(logits)
        return logits.argmax(-1)

    if anchor:
        drafter.prefill(features[:, :anchor], ids[:, 1 : anchor + 1], cache)
    tokens = drafter.draft(features[:, anchor : anchor + 1], ids[:, anchor + 1 : anchor + 2], k, choose, cache)
    assert cache.length == (0 if drafter.spec.kind == "medusa" else anchor + 1)  # the real rows and nothing else
    return torch.cat(seen), tokens


@pytest.mark.parametrize("mask_mode", ["distinct", "shared"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_forward_equals_decoding_forward(kind, layers, mask_mode):
    target = toys.target()
    drafter = toys.drafter(kind, target, layers=layers, mask_mode=mask_mode)
    batch = one_document()
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    features = train.teacher(target, batch)
    depth, anchor = groups.layout(n - 1, drafter.masks)
    slots = train.slots(drafter, batch, features, depth, anchor, [n - 1] * (drafter.masks + 1))
    assert len(slots) == (1 if kind == "eagle" else toys.K)
    for t in range(n - 1):
        for k in (1, toys.K):
            decoded, _ = decoded_logits(drafter, features, ids, t, k)
            for slot, (hidden, _, _) in enumerate(slots[:k]):
                torch.testing.assert_close(drafter.logits(hidden[:, t], slot)[0], decoded[slot], rtol=1e-5, atol=1e-5)


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
    for slot, (_, position, valid) in enumerate(slots):
        for t in range(n - 1):
            token = t + 2 + slot
            inside = token < 6 if t < 6 else token < n
            assert valid[0, t] == inside
            if inside:
                assert position[t] == token - 1


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    target = toys.target()
    drafter = toys.drafter(kind, target, feature_weight=1.0)
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
        _, parts = train.group_loss(drafter, batch, train.teacher(target, batch), depth, anchor, counts)
        return torch.stack(parts)

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
        torch.testing.assert_close(parts[slot][0], torch.stack(terms).sum(), rtol=1e-4, atol=1e-4)
    weights = [0.5**i for i in range(toys.K)]
    expected = sum(w * term for w, term in zip(weights, by_slot, strict=True)) / sum(weights)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_round_trips(kind, tmp_path):
    target = toys.target()
    spec = toys.drafter(kind, target).spec
    lines = []
    arguments = {"seed": 0, "device": torch.device("cpu")}
    train.train_drafter(
        spec, target, toys.rows(), toys.rows(2, seed=5), tmp_path, log=lines.append, steps=60, **arguments
    )
    loss = [row["value"] for row in lines if row["metric"] == "loss"]
    assert loss[-1] < loss[0]
    loaded = drafters.load(tmp_path, target)
    assert loaded.spec == spec
    again = tmp_path / "again"
    again.mkdir()
    train.train_drafter(spec, target, toys.rows(), toys.rows(2, seed=5), again, steps=60, **arguments)
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
