"""Joined projections give what each alone gives, in every kind of layer, and leave the model as it was."""

import pytest
import torch
import toys
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from psnb import joined


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen2Config, MistralConfig])
def test_the_same_features(cls):
    """Qwen2 has biases in its attention and none in its other block."""
    target = toys.target(torch.float64, cls=cls)
    for name, weight in target.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    ids = torch.arange(12)[None]
    expected = target.model(ids).logits
    parts = joined.parts(target.model)
    assert len(parts) == 2 * (3 + 2 + 1)
    torch.testing.assert_close(target.model(ids).logits, expected, rtol=0, atol=0)  # moved, and the same
    with joined.swapped(parts):
        assert type(target.model.model.layers[1].mlp.up_proj) is joined.Part
        torch.testing.assert_close(target.model(ids).logits, expected)
        torch.testing.assert_close(target.model(ids[:, :1]).logits, expected[:, :1])  # one row has a way of its own
    assert type(target.model.model.layers[1].mlp.up_proj) is torch.nn.Linear


def test_what_is_joined_is_not_moved_again():
    target = toys.target()
    first, again = (joined.parts(target.model)[0][2].whole.weight for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    target.model.model.layers[0].self_attn.q_proj.weight.data.fill_(7.0)
    assert (first[: target.hidden_size] == 7.0).all()


def test_other_kinds_of_projections_stay():
    class Quantised(torch.nn.Linear):
        pass

    target = toys.target()
    attention = target.model.model.layers[0].self_attn
    attention.k_proj = Quantised(*attention.k_proj.weight.shape[::-1], bias=False)
    assert {name for block, name, _ in joined.parts(target.model) if block is attention} == set()


def test_weights_by_columns_give_the_same():
    """A weight that is an embedding too stays as it is, and so does what a GPU or another format would read."""
    target = toys.target(torch.float32)
    tied = target.model.config.tie_word_embeddings
    ids = torch.arange(12)[None]
    expected, before = target.model(ids).logits, target.model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    joined.by_columns(target.model)
    up, embedding = target.model.model.layers[1].mlp.up_proj.weight, target.model.get_input_embeddings().weight
    assert up.stride() == (1, up.shape[0]) and embedding.is_contiguous()
    assert target.model.get_output_embeddings().weight.is_contiguous() == tied
    assert all(torch.equal(weight, before[name]) for name, weight in target.model.state_dict().items())
    torch.testing.assert_close(target.model(ids).logits, expected)
    other = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
    joined.by_columns(other)
    assert other.weight.is_contiguous()


def test_the_faster_format_is_measured(monkeypatch):
    """A clock that the products of one format turn decides."""
    now = [0.0]
    monkeypatch.setattr(joined.time, "perf_counter", lambda: now[0])

    class Timed(torch.nn.Linear):
        def forward(self, x):
            now[0] += seconds[x.dtype]
            return x

    monkeypatch.setattr(joined.nn, "Linear", Timed)
    for plain, half in ((1.0, 0.5), (0.5, 1.0)):
        seconds = {torch.float32: plain, torch.bfloat16: half}
        joined.bfloat16_pays.cache_clear()
        assert joined.bfloat16_pays(8, 16, 2) is (half < plain)
    joined.bfloat16_pays.cache_clear()
