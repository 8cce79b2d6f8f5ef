"""The target: trained, saved, loaded; what is damaged or cannot work is refused."""

import pytest
import torch
import torch.nn.functional as F
import toys
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, Lfm2Config, Qwen2Config

from psnb import fit, groups, target
from psnb.errors import UserError
from psnb.profile import FitSpec, TargetSpec


@pytest.fixture
def saved(tmp_path):
    made = toys.target()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", [None, Qwen2Config])
def test_load_gives_the_saved_model(config, tmp_path):
    made = toys.target(**({"cls": config} if config else {}))
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    loaded = target.load(tmp_path)
    features = loaded.features(ids, torch.arange(4)[None], None)
    torch.testing.assert_close(loaded.logits(features), made.model(ids).logits)
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("garbage", "does not load"),
        ("absent", "does not load"),
        ("nan", "holds NaN"),
        ("missing", "missing keys"),
        ("surplus", "unexpected keys"),
    ],
)
def test_a_damaged_target_is_refused(fault, message, saved):
    file = saved / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "nan":
        weights[name][3, 3] = float("nan")
    elif fault == "missing":
        weights.pop(name)
    elif fault == "surplus":
        weights["model.layers.7.mlp.up_proj.weight"] = weights[name].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "garbage":
        file.write_bytes(file.read_bytes()[:200])
    elif fault == "absent":
        file.unlink()
    with pytest.raises(UserError, match=message):
        target.load(saved)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    made = toys.target(vocab_size=toys.VOCAB - 5, eos_token_id=3)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer has 61 tokens, the model 56"):
        target.load(tmp_path)


def test_logits_that_are_not_a_plain_projection_are_refused(tmp_path):
    made = toys.target(cls=GraniteConfig, logits_scaling=7.0)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not lm_head of its last hidden state"):
        target.load(tmp_path)


def test_layers_with_a_state_are_refused(tmp_path):
    """A convolution tells packed documents of each other."""
    made = toys.target(cls=Lfm2Config, layer_types=["conv", "full_attention"])
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="plain attention in every layer, this target has conv: use another"):
        target.load(tmp_path)


@pytest.mark.parametrize("ends", [[7, toys.VOCAB - 1], 7])
def test_a_text_ends_where_the_checkpoint_says(ends, tmp_path):
    made = toys.target()
    assert made.stop_tokens == (toys.VOCAB - 1,)
    made.model.generation_config.eos_token_id = ends
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    assert target.load(tmp_path).stop_tokens == (toys.VOCAB - 1, 7)


def test_token_loss_counts_each_document_alone():
    made = toys.target()
    batch = target.as_batch(toys.rows(2, 24))
    total, count = target.token_loss(made.model, batch)
    expected, tokens = 0.0, 0
    for ids, document in zip(batch["input_ids"], batch["document"], strict=True):
        for number in document.unique():
            if number >= 0:
                text = ids[document == number]
                logits = made.model(text[None]).logits[0]
                expected += F.cross_entropy(logits[:-1], text[1:], reduction="sum").item()
                tokens += len(text) - 1
    assert count == tokens
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert target.heldout_nats(made.model, batch, size=1) == pytest.approx(expected / tokens, rel=1e-5)
    masked = {**batch, "loss_mask": torch.zeros_like(batch["document"])}
    masked["loss_mask"][0, 3] = 1
    one, count = target.token_loss(made.model, masked)
    logits = made.model(batch["input_ids"][:1, :3]).logits[0, -1]
    assert count == 1 and one.item() == pytest.approx(
        F.cross_entropy(logits, batch["input_ids"][0, 3]).item(), rel=1e-4
    )


@pytest.mark.parametrize("half", [False, True])
def test_a_block_mask_gives_the_features_of_the_dense_one(half):
    made = toys.target(hidden_size=64)  # heads of 16: flex attention takes no smaller one
    ids, document = torch.randint(0, 50, (2, 160)), torch.arange(160)[None].repeat(2, 1) // 70
    place, index = groups.positions(document), torch.arange(160)
    block = groups.block_mask(torch.zeros_like(index), index, document)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = made.features(ids, place, block)
        expected = made.features(ids, place, groups.causal_mask(document))
    torch.testing.assert_close(found, expected, rtol=0.1 if half else 1e-4, atol=0.1 if half else 1e-4)
    other = made.features(ids, place, groups.causal_mask(torch.zeros_like(document)))
    assert (other - expected).abs().max() > 1


def test_a_target_learns_every_turn_and_is_judged_by_the_selected_ones(tmp_path):
    spec = TargetSpec(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=48, context=64,
        train=FitSpec(steps=2, rows=4, warmup=1, log_every=2),
    )  # fmt: skip
    rows = target.as_batch(toys.rows(8))
    chats = rows | {"loss_mask": (torch.arange(24) > 12).long().repeat(8, 1)}
    lines = {}
    for name, train, held in (("plain", rows, rows), ("chats", chats, chats)):
        (tmp_path / name).mkdir()
        target.train(
            spec, toys.tokenizer(), train, held, tmp_path / name, seed=1, device=torch.device("cpu"),
            log=lines.setdefault(name, []).append,
        )  # fmt: skip
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in lines]
    assert weights[0] == weights[1]
    plain, masked = ([r["value"] for r in rows if r["metric"] == "heldout_nats"] for rows in lines.values())
    assert plain != masked


def test_training_lowers_held_out_loss_and_is_reproducible(tmp_path):
    spec = TargetSpec(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=48, context=64,
        train=FitSpec(steps=30, rows=4, warmup=3, learning_rate=1e-2, log_every=10, evaluate_every=15),
    )  # fmt: skip
    rows = toys.rows(8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = []
        target.train(
            spec, toys.tokenizer(), rows, rows, tmp_path / name, seed=1, device=torch.device("cpu"), log=lines.append
        )
    held = [row["value"] for row in lines if row["metric"] == "heldout_nats"]
    assert len(held) == 2 and held[1] < held[0] < 4.2
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert target.load(tmp_path / "a").dtype == torch.float32


def test_batches_see_every_row_equally_often():
    rows = {"input_ids": torch.arange(7)[:, None]}
    seen = torch.cat([batch["input_ids"][:, 0] for batch in fit.batches(rows, 3, 14, seed=0)])
    assert torch.bincount(seen).tolist() == [6] * 7
    with pytest.raises(UserError, match="rows are empty"):
        next(fit.batches({"input_ids": torch.empty(0, 4)}, 3, 1, seed=0))


def test_the_rate_warms_up_and_decays():
    spec = FitSpec(steps=110, warmup=10, final_share=0.1)
    assert fit.rate(0, spec) == pytest.approx(0.1) and fit.rate(9, spec) == 1.0
    assert fit.rate(60, spec) == pytest.approx(0.1 + 0.9 / 2) and fit.rate(110, spec) == pytest.approx(0.1)


def test_divergence_is_one_clear_error():
    module = torch.nn.Linear(1, 1)
    spec = FitSpec(steps=2, rows=1, log_every=1)
    with pytest.raises(UserError, match="diverged at step 1.*lower learning_rate"):
        fit.fit(
            module, lambda *_: (module.weight.sum() * float("nan"), {}), {"input_ids": torch.zeros(2, 3)}, spec,
            count=lambda *_: None, seed=0, device=torch.device("cpu"), log=lambda row: None,
        )  # fmt: skip
