"""The training loop that the target and the drafters share (through accelerate)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from psnb.errors import UserError
from psnb.profile import FitSpec

Batch = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count): they add up over steps and processes
Row = dict[str, object]  # one line of training.csv: step, tokens, metric, value


def batches(rows: Batch, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of `size` rows, each epoch in a fresh order; `rows` maps a name to a tensor [R, n].

    An epoch's remainder is joined with the next epoch's start, so every row is seen equally often.
    """
    count = len(next(iter(rows.values())))
    if count == 0:
        raise UserError("the training rows are empty: give the profile more text (data.packages, data.source)")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    device = next(iter(rows.values())).device
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        index, order = order[:size].to(device), order[size:]
        yield {name: tensor[index] for name, tensor in rows.items()}


def rate(step: int, spec: FitSpec) -> float:
    """Learning rate at `step` as a share of its peak: linear warm-up, then half a cosine down to `final_share`."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.final_share + (1 - spec.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def compiled(function: Callable[..., Any], spec: FitSpec, device: torch.device) -> Callable[..., Any]:
    """`function` under torch.compile where the budget asks for it and there is a GPU; else as it is."""
    return torch.compile(function, dynamic=False) if spec.compile and device.type == "cuda" else function


def fit(
    module: nn.Module,
    loss: Callable[[Batch], tuple[Tensor, Metrics]],
    rows: Batch,
    spec: FitSpec,
    *,
    seed: int,
    device: torch.device,
    log: Callable[[Row], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train `module` in place: AdamW on `loss(batch)`, bf16 autocast on a GPU, float32 on a CPU.

    rows: name -> [R, n]. `log` receives one row a metric every `log_every` steps (means over those steps), and
    `evaluate()`'s values every `evaluate_every` steps and after the last. Matrices decay, vectors do not.
    Raises `UserError` when the loss is not finite.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if device.type == "cuda" else "no")
    module.to(device).train()
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, spec))
    optimizer, schedule = accelerator.prepare(optimizer, schedule)

    sums: dict[str, Tensor] = {}
    tokens, started = 0, time.perf_counter()

    def report(step: int, values: dict[str, float]) -> None:
        for metric, value in values.items():
            log({"step": step, "tokens": tokens, "metric": metric, "value": value})

    for step, batch in enumerate(batches(rows, spec.rows, spec.steps, seed), start=1):
        with accelerator.autocast():
            value, metrics = loss(batch)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(weights, spec.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += next(iter(batch.values())).numel()
        for name, (total, count) in {"loss": (value.detach(), torch.ones_like(value)), **metrics}.items():
            pair = torch.stack([total.detach().float(), count.detach().float()])
            sums[name] = sums[name] + pair if name in sums else pair
        if step % spec.log_every == 0 or step == spec.steps:
            values = {name: (pair[0] / pair[1].clamp(min=1)).item() for name, pair in sums.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(f"training diverged at step {step} (loss {values['loss']}): lower learning_rate")
            sums = {}
            values["seconds"] = time.perf_counter() - started
            report(step, values)
        if evaluate and (step == spec.steps or (spec.evaluate_every and step % spec.evaluate_every == 0)):
            module.eval()
            with torch.no_grad(), accelerator.autocast():
                report(step, evaluate())
            module.train()
    module.eval()
