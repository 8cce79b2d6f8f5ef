"""What the target writes in batches is what it writes alone, with the same noise."""

import numpy as np
import pytest
import torch
import toys
from transformers import MistralConfig

from psnb import data, respond
from psnb.errors import UserError
from psnb.verify import gumbel


def alone(target, prompt, row, new, length, temperature, seed):
    """One prompt, the whole text again for every token, no cache."""
    ids = list(prompt)
    for _ in range(new):
        logits = target.model(torch.tensor([ids])).logits[0, -1]
        if temperature:
            logits = logits / temperature + gumbel(seed, torch.tensor([row * length + len(ids)]), target.vocab_size)[0]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_writes_what_each_prompt_would_alone(temperature):
    target = toys.target(torch.float64)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (n,), generator=generator).tolist() for n in (5, 5, 9, 3)]
    rows, how = [7, 8, 0, 3], {"length": 40, "temperature": temperature, "seed": 11}
    written = respond.write(target, prompts, rows, 12, **how)
    expected = [alone(target, p, r, 12, *how.values()) for p, r in zip(prompts, rows, strict=True)]
    assert written == expected
    again = respond.write(target, prompts[2:], rows[2:], 12, **how)
    assert again == expected[2:]  # other neighbours, other padding
    assert len({tuple(text) for text in expected}) == 4


def test_cuts_find_prefixes_and_last_answers():
    document = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, -1])
    mask = np.array([1, 1, 1, 1, 0, 0, 1, 0, 1, 0])
    assert respond.cuts(document, mask, 2) == [(0, 2), (4, 8)]
    assert respond.cuts(document, None, 4) == [(4, 8)]  # the first window has nothing to write after 4
    assert respond.cuts(document, np.zeros(10, int), 2) == []  # a chat without an answer


def test_rows_are_answered_in_place_and_end_where_the_target_ends():
    target = toys.target(torch.float64)
    target.stop_tokens = (7, 999)
    rows = toys.rows(5, 40)
    made = respond.respond(target, rows, 4, 1.0, seed=5, size=3)
    assert set(made.column_names) == {"input_ids", "document", "loss_mask"}
    prompts = [
        np.array(row["input_ids"])[begin:end].tolist()
        for row in rows
        for begin, end in respond.cuts(np.array(row["document"]), None, 4)
    ]
    found = {}
    for row in made.with_format("numpy"):
        for number in range(row["document"].max() + 1):
            inside = row["document"] == number
            text, mask = row["input_ids"][inside].tolist(), row["loss_mask"][inside].tolist()
            assert mask == [0] * 4 + [1] * (len(text) - 4)
            assert 7 not in text[4:-1] and (text[-1] == 7 or len(text) == 40)
            found[tuple(text[:4])] = text[4:]
    ended = 0
    for i, prompt in enumerate(prompts):
        expected = alone(target, prompt, i, 36, 40, 1.0, 5)
        if 7 in expected:
            expected = expected[: expected.index(7) + 1]
            ended += 1
        if len(expected) + 4 >= data.SHORTEST_WINDOW:
            assert found[tuple(prompt)] == expected
        else:
            assert tuple(prompt) not in found
    assert 0 < ended < len(prompts) and len(found) > 4


def test_the_first_of_several_end_tokens_ends():
    target = toys.target(torch.float64)
    how = {"new": 36, "length": 40, "temperature": 1.0, "seed": 5}
    target.stop_tokens = ()
    whole = respond.write(target, [[1, 2, 3, 4]], [0], **how)[0]
    target.stop_tokens = (whole[9], whole[6])
    end = min(whole.index(token) for token in target.stop_tokens)
    assert respond.write(target, [[1, 2, 3, 4]], [0], **how)[0] == whole[: end + 1] and len(whole) == 36


def test_rows_as_long_as_a_sliding_window_are_answered():
    """Prompts of 2 and 8 tokens at once: the padded ones reach beyond the window, where nothing of use lies."""
    texts, ids = {}, torch.arange(48).reshape(2, 24)
    mask = torch.zeros(2, 24, dtype=torch.long)
    mask[0, 2:], mask[1, 8:] = 1, 1
    rows = {"input_ids": ids, "document": torch.zeros_like(ids), "loss_mask": mask}
    for window in (None, 24):
        target = toys.target(torch.float64, cls=MistralConfig, sliding_window=window)
        texts[window] = respond.respond(target, rows, 4, 1.0, seed=1)["input_ids"]
        assert target.config.sliding_window == window
    assert texts[None] == texts[24]


def test_rows_that_cannot_be_answered_are_refused():
    target = toys.target()
    with pytest.raises(UserError, match="no row has a prompt"):
        respond.respond(target, toys.rows(2, 24), 20, 1.0, seed=0)
    with pytest.raises(UserError, match="rows of 300 tokens, but the target's context has 256"):
        respond.respond(target, toys.rows(2, 300), 4, 1.0, seed=0)


def test_a_long_prompt_cuts_no_other_answer(monkeypatch):
    """Prompts of 4 and 16 tokens in rows of 24: alone or together, each answer may go on to its own row's end."""
    target = toys.target()
    ids = torch.randint(0, toys.VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(2, 24, dtype=torch.long)
    mask[0, 4:], mask[1, 16:] = 1, 1
    rows = {"input_ids": ids, "document": torch.zeros_like(ids), "loss_mask": mask}
    monkeypatch.setattr(respond, "SHORTEST_WINDOW", 1)
    together, alone = (respond.respond(target, rows, 4, 0.7, 1, size=size) for size in (8, 1))
    assert together["input_ids"] == alone["input_ids"] and together["loss_mask"] == alone["loss_mask"]
    assert max(sum(mask) for mask in together["loss_mask"]) > 24 - 16
