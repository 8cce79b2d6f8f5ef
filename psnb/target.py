"""The target: load any causal LM, or train a small Llama; its features and logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from psnb import joined, manifest
from psnb.errors import UserError
from psnb.fit import Batch, Metrics, Row, compiled, compiled_layers, fit, main_process
from psnb.groups import causal, positions, register
from psnb.profile import TargetSpec

if TYPE_CHECKING:
    from datasets import Dataset


Mask = Tensor | BlockMask | None


@contextlib.contextmanager
def attention(model: nn.Module, mask: Mask, rows: int | None = None) -> Iterator[None]:
    """Inside, a block mask finds flex attention in `model`, and the mask `groups.for_few` of so many rows `groups.few`.

    Any other mask finds what the model has. psnb's own attentions take their masks themselves.
    """
    config, own = model.config, model.config._attn_implementation
    ours = isinstance(mask, BlockMask) or (rows is not None and mask is not None and mask.shape[-2] != rows)
    if ours and not own.startswith("psnb_"):
        config._attn_implementation = register()  # transformers' own refuses what autocast leaves in two dtypes
    try:
        yield
    finally:
        if config._attn_implementation != own:
            config._attn_implementation = own


def heads(config: Any) -> tuple[int, int, int]:
    """Query heads and key heads of a model's configuration, and the width of a head. Some leave the last two out."""
    count = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or count
    return count, keys, getattr(config, "head_dim", None) or config.hidden_size // count


def ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a model's configuration: one set, or one for each kind of layer (as in Gemma 3)."""
    found = getattr(config, "rope_parameters", None) or {}
    return [of for of in found.values() if isinstance(of, dict)] or [found]


class Target:
    """The frozen causal LM p. Its *feature* f_t is the last hidden state after the final norm."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = model.config
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.eos_token_id: int | None = tokenizer.eos_token_id
        more = getattr(model.generation_config, "eos_token_id", None)
        ends = [self.eos_token_id, *(more if isinstance(more, list) else [more])]
        # What ends a generation: the tokenizer's end token, and the checkpoint's own, such as a chat's end of turn
        self.stop_tokens: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        config = model.config
        limits = [config.max_position_embeddings]
        limits += filter(None, [getattr(config, "sliding_window", None)])  # within it, sliding attention is plain
        for rope in ropes(config):
            if rope.get("rope_type") == "longrope":  # beyond, all keys turn by other angles than those that were cached
                limits += filter(None, [rope.get("original_max_position_embeddings")])
        self.context: int = min(limits)
        self.layers: int = model.config.num_hidden_layers
        queries, keys, _ = heads(model.config)
        self.shared: int = queries // keys  # query heads of a key head

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def features(
        self, ids: Tensor, position_ids: Tensor, mask: Mask, cache: Any = None, taps: Sequence[int] = ()
    ) -> Tensor:
        """ids, position_ids [B, n], mask bool [B, 1, n, m] (m keys, the cached ones first) -> features [B, n, H].

        Of few rows the mask may be `groups.for_few`'s, made once for all layers.
        With `taps`, the outputs of these layers (counted from 1) stand before f_t: [B, n, (1 + len(taps)) * H].
        """
        with attention(self.model, mask, ids.shape[1]):
            made = self.model.base_model(
                input_ids=ids,
                position_ids=position_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=bool(taps),
            )
        if not taps:
            return made.last_hidden_state
        return torch.cat([*(made.hidden_states[tap] for tap in taps), made.last_hidden_state], -1)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., H], with or without taps before f_t -> logits [..., V] through the frozen `lm_head`."""
        return self.model.get_output_embeddings()(features[..., -self.hidden_size :])

    def embed(self, ids: Tensor) -> Tensor:
        """ids [...] -> embeddings [..., H]."""
        return self.model.get_input_embeddings()(ids)


def check_attention(model: nn.Module) -> None:
    """Raises `UserError` for a model whose layers keep more than the keys and values of each token.

    A state that runs along the row would tell packed documents of each other, and could not be cut after a round.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(model, "_is_stateful", False) or kinds:
        what = ", ".join(sorted(kinds)) or model.config.model_type
        raise UserError(f"drafting needs plain attention in every layer, this target has {what}: use another")


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Target:
    """A target from a folder or a hub name.

    Raises `UserError` for a checkpoint that cannot be read, that lacks or exceeds tensors, that holds NaN, whose
    tokenizer does not fit, that has other layers than attention, or whose logits are not `lm_head` of its last hidden
    state.
    """
    there = Path(path).is_dir()
    cure = "restore the folder, or train it again" if there else "give a folder, or a hub name that can be fetched"
    try:
        config = AutoConfig.from_pretrained(str(path))
        if getattr(config, "final_logit_softcapping", None):  # Gemma 2
            raise UserError(
                f"target {path} caps its logits (final_logit_softcapping), which drafters do not: use another"
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds; each means "this is not a loadable checkpoint"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"target {path} does not load ({first}); {cure}") from error
    wrong = {k: sorted(map(str, info.get(k) or [])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong = {k: v for k, v in wrong.items() if v}
    if wrong:
        what = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])}" for k, v in wrong.items())
        raise UserError(f"target {path} does not fit its configuration ({what}); {cure}")
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise UserError(f"target {path}: {name} holds NaN or infinity; {cure}")
    check_attention(model)
    target = Target(model.to(device), tokenizer)
    if len(tokenizer) > target.vocab_size:
        raise UserError(
            f"target {path}: its tokenizer has {len(tokenizer)} tokens, the model {target.vocab_size}: use its own one"
        )
    _check_projection(target, str(path))
    joined.by_columns(target.model)
    return target


@torch.inference_mode()
def _check_projection(target: Target, path: str) -> None:
    ids = torch.arange(4, device=target.device)[None]  # tokens 0 to 3, at these places
    try:
        logits = target.logits(target.features(ids, ids, None))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model of another build, of many kinds
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"target {path} has no features as a decoder-only model has ({first}): use another") from error
    if not torch.allclose(logits, target.model(input_ids=ids).logits, rtol=1e-2, atol=1e-2):
        raise UserError(f"target {path}: its logits are not lm_head of its last hidden state, which drafters rely on")


def as_batch(rows: Dataset | Batch, device: torch.device | str = "cpu") -> Batch:
    """Packed rows (data.pack) as tensors: input_ids, document and, if there, loss_mask, each [R, n] int64."""
    if isinstance(rows, dict):
        return {name: tensor.to(device, torch.long) for name, tensor in rows.items()}
    names = [c for c in ("input_ids", "document", "loss_mask") if c in rows.column_names]
    table = rows.select_columns(names).with_format("torch")[:]
    return {name: torch.as_tensor(table[name]).to(device, torch.long) for name in names}


def judged(batch: Batch, ahead: int = 1) -> Tensor:
    """Which tokens x_ahead .. x_{n-1} of rows [B, n] can be learned from `ahead` places before: bool [B, n - ahead]."""
    document = batch["document"]
    keep = (document[:, ahead:] == document[:, :-ahead]) & (document[:, ahead:] >= 0)
    return keep & batch["loss_mask"][:, ahead:].bool() if "loss_mask" in batch else keep


def check_rows(rows: Batch, vocab_size: int, context: int, ahead: int = 1) -> None:
    """Refuse rows [R, n] from which nothing can be learned `ahead` places before, or of another vocabulary.

    Raises `UserError` for empty rows, rows longer than the context, documents of `ahead` tokens at most, a loss mask
    that selects nothing, and tokens that are not the target's.
    """
    ids = rows["input_ids"]
    if not ids.numel():
        raise UserError("the training rows are empty: give the profile more text (data.packages, data.source)")
    if (length := ids.shape[1]) > context:
        raise UserError(f"rows of {length} tokens, but the target's context has {context}: lower data.length")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(
            f"the training rows hold token {int(ids.max())}, the target has {vocab_size}: they were made with another "
            "tokenizer; make them with the target's own"
        )
    if not judged({"document": rows["document"]}, ahead).any():
        raise UserError(f"no document has more than {ahead} tokens: give longer texts, or raise data.length")
    if not judged(rows, ahead).any():
        raise UserError("the loss mask selects nothing: check the chat template and the roles of the data")


def token_loss(
    model: nn.Module, batch: Batch, run: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy: batch of [B, n] -> (sum of nats, number of tokens), documents kept apart.

    With a loss mask only selected tokens count. `run` stands for `_nats` (compiled, say).
    """
    ids, document = batch["input_ids"], batch["document"]
    mask = causal(document)
    with attention(model, mask):
        hidden = model.base_model(
            input_ids=ids, position_ids=positions(document), attention_mask=mask, use_cache=False
        ).last_hidden_state
    return (run or _nats)(model.get_output_embeddings(), hidden, ids, judged(batch))


def _nats(head: nn.Module, hidden: Tensor, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden[:, :-1]).float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nats * keep.flatten()).sum(), keep.sum()


@torch.no_grad()
def heldout_nats(model: nn.Module, rows: Batch, size: int = 16) -> float:
    """Mean nats a token of `rows` (each [R, n]) under `model`."""
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(rows["input_ids"]), size):
        batch = {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}
        total += torch.stack([part.double() for part in token_loss(model, batch)])
    return (total[0] / total[1]).item()


def _llama(spec: TargetSpec, vocab: int, eos: int | None, pad: int | None) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.hidden_size // spec.heads,
        intermediate_size=spec.intermediate_size,
        vocab_size=vocab,
        max_position_embeddings=spec.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    config._attn_implementation = "sdpa"
    return config


def untrained(spec: TargetSpec, vocab: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Target:
    """A Llama of that shape with random weights, float64, whose distributions are far from flat: for proofs."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama(spec, vocab, None, None)).double()
    for weight in model.parameters():
        weight.data.mul_(3.0 if weight.ndim > 1 else 1.0)
    return Target(model, tokenizer)


def train(
    spec: TargetSpec,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | Batch,
    held_out: Dataset | Batch,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    log: Callable[[Row], None] = lambda row: None,
    state: Path | None = None,
) -> None:
    """Train a Llama of the given shape from scratch; write it (bf16), its tokenizer and training.csv to `folder`.

    Of chats it learns every turn, as no other text teaches it to read; a loss mask counts in the held-out loss alone.
    A run that was killed goes on from what stands in `state`.
    """
    if spec.train is None:
        raise UserError(
            "the profile's target has neither a path nor a training budget: set target.path or target.train"
        )
    config = _llama(spec, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(device)
    held, rows = as_batch(held_out), as_batch(rows, device)
    check_rows(rows, len(tokenizer), spec.context)
    rows.pop("loss_mask", None)
    run = compiled(_nats, spec.train, device)

    def loss(batch: Batch, step: int, tokens: Tensor) -> tuple[Tensor, Metrics]:
        total, count = token_loss(model, batch, run)
        return total / tokens, {"nats": (total, count)}

    with compiled_layers([model.base_model], spec.train, device):
        lines = fit(
            model,
            loss,
            rows,
            spec.train,
            count=lambda batch, step: judged(batch).sum().clamp(min=1),
            seed=seed,
            device=device,
            log=log,
            evaluate=lambda: {"heldout_nats": heldout_nats(model, held)},
            state=state,
        )
    if not main_process():
        return
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest.write_frame(Path(folder) / "training.csv", pd.DataFrame(lines))
