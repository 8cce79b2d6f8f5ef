"""Random toys that tests share: a target with a few thousand weights, its tokenizer and drafters."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from psnb import drafters
from psnb.drafters import Drafter
from psnb.profile import DrafterSpec, FitSpec
from psnb.target import Target

VOCAB = 61
K = 4
KINDS = [*drafters.KINDS, "medusa-ps linked", "eagle-ps linked"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0 .. w59 and an end token."""
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    tok = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def config(cls: type = LlamaConfig, **changes: object) -> LlamaConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": VOCAB - 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return cls(**{**shape, **changes})


def target(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Target:
    """A random target whose distributions are far from flat, so that ties and easy agreement are unlikely."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**changes), attn_implementation="sdpa")
    for weight in model.parameters():
        weight.data.mul_(3.0) if weight.ndim > 1 else None
    return Target(model.to(dtype), tokenizer())


def drafter(kind: str, of: Target, seed: int = 1, **changes: object) -> Drafter:
    """A random drafter of one of `KINDS`."""
    torch.manual_seed(seed)
    kind, *linked = kind.split()
    changes = {"link": 8, **changes} if linked else changes
    spec = DrafterSpec(kind=kind, **{"k": K, "train": FitSpec(steps=3, rows=2, warmup=1), **changes})
    made = drafters.build(spec, of)
    for weight in made.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.2)
    return made.to(of.dtype).eval().requires_grad_(False)


def rows(count: int = 6, n: int = 24, seed: int = 0) -> Dataset:
    """Packed rows of two or three documents each, some padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB - 1, (count, n), generator=generator)
    document = torch.stack([torch.bucketize(torch.arange(n), torch.tensor([8 + r % 3, 17])) for r in range(count)])
    document[:, -2:] = -1
    return Dataset.from_dict({"input_ids": ids.tolist(), "document": document.tolist()})
