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
