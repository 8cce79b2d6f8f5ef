"""The training loop that the target and the drafters share: one process or several, stopped and resumed exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from psnb import manifest
from psnb.errors import UserError
from psnb.profile import FREE, FitSpec

Batch = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count): they add up over steps, parts and processes
Row = dict[str, Any]  # one line of training.csv: step, tokens, metric, value
Loss = Callable[[Batch, int, Any], tuple[Tensor, Metrics]]  # (part of the batch, step, counts of the whole batch)


def batches(rows: Batch, size: int, steps: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Batches `start` .. `steps` - 1, `size` rows each, each epoch in a fresh order; `rows` maps a name to [R, n].

    An epoch's remainder is joined with the next epoch's start, so every row is seen equally often. The order depends on
    `seed` alone: a resumed run draws it again and skips what it has seen.
    """
    count = len(next(iter(rows.values())))
    if count == 0:
        raise UserError("the training rows are empty: give the profile more text (data.packages, data.source)")
    draws = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    device = next(iter(rows.values())).device
    for step in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=draws)])
        index, order = order[:size].to(device, non_blocking=True), order[size:]
        if step >= start:
            yield {name: tensor[index] for name, tensor in rows.items()}


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same in every process: a function of (seed, step), so nothing to save."""
    return torch.Generator().manual_seed(int(manifest.digest([seed, step])[:15], 16))


def rate(step: int, spec: FitSpec) -> float:
    """Learning rate at `step` as a share of its peak: linear warm-up, then half a cosine down to `final_share`."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.final_share + (1 - spec.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizers(module: nn.Module, spec: FitSpec, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or with `optimizer` = "muon" for all but the matrices of decoder layers, which get Muon.

    Muon's steps are scaled to the size of AdamW's, so one rate serves both (arXiv 2502.16982, section 2.2). Matrices
    decay, vectors do not.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if spec.optimizer == "muon" and "layers." in name and p.ndim == 2]
    held = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in held]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    ]
    if inner:
        scaled = {"weight_decay": spec.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(inner, lr=spec.learning_rate, **scaled))
    return made


def compiled(function: Callable[..., Any], spec: FitSpec, device: torch.device) -> Callable[..., Any]:
    """`function` under torch.compile where the budget asks for it and there is a GPU; else as it is."""
    return torch.compile(function, dynamic=False) if spec.compile and device.type == "cuda" else function


@contextlib.contextmanager
def compiled_layers(bodies: Iterable[nn.Module], spec: FitSpec, device: torch.device) -> Iterator[None]:
    """Inside, the decoder layers of these modules are compiled, as `compiled` says: once for all layers of a body.

    A model compiled as a whole is traced layer by layer, and takes longer to compile the more it has. Of the
    activations that the compiler would keep for the backward pass it keeps `activation_budget`: those dearest to make.
    """
    wanted = spec.compile and device.type == "cuda"
    layers = [layer for body in bodies for layer in getattr(body, "layers", ()) if wanted]
    budget = spec.activation_budget
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        # a process's trainings share the layer's code
        with torch._dynamo.config.patch(recompile_limit=64), functorch.patch(activation_memory_budget=budget):
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def main_process() -> bool:
    """Whether this process is the one that logs and writes."""
    return PartialState().is_main_process


def reduce_gradients(accelerator: Accelerator, weights: list[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in one flat all-reduce.

    By hand rather than by DDP: a loss calls several methods of a drafter, not one wrapped forward; DDP averages where
    sums are wanted; and accumulation then needs no special case.
    """
    given = [p for p in weights if p.grad is not None]
    if accelerator.num_processes > 1 and given:
        flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in given]), "sum")
        for p, gradient in zip(given, flat.split([p.numel() for p in given]), strict=True):
            p.grad = gradient.view_as(p)


def _memory(error: RuntimeError) -> bool:
    """Whether a GPU's or the machine's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Saved:
    """What a killed run leaves in a folder: `state.pt`, replaced as a whole, and `rows.jsonl`, which only grows.

    `identity` names the training: another one's state is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.file, self.rows, self.identity = Path(folder) / "state.pt", Path(folder) / "rows.jsonl", identity

    def load(self, device: torch.device) -> tuple[dict[str, Any], list[Row]]:
        """(state, rows logged up to its step); both empty where nothing was saved.

        Raises `UserError` for a damaged state and for another training's.
        """
        state: dict[str, Any] = {}
        cure = f"delete {self.file.parent} to start this training again"
        if self.file.is_file():
            try:
                state = torch.load(self.file, map_location=device, weights_only=True)
            except Exception as error:  # torch, pickle and zip each raise their own kinds
                raise UserError(f"{self.file}: damaged ({str(error).splitlines()[0]}); {cure}") from error
            if state["identity"] != self.identity:
                wrong = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
                raise UserError(f"{self.file}: of another training (other {', '.join(wrong)}); {cure}")
        rows: list[Row] = []
        if self.rows.is_file():
            lines = self.rows.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut
            rows = [row for row in map(json.loads, lines) if row["step"] <= state.get("step", 0)]
        return state, rows

    def start(self, rows: list[Row]) -> None:
        """Leaves these rows alone: those of steps that will be done again go."""
        manifest.write_text(self.rows, _lines(rows))

    def add(self, rows: list[Row]) -> None:
        with open(self.rows, "a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def save(self, state: dict[str, Any]) -> None:
        with manifest.replacing(self.file) as temporary:
            torch.save({"identity": self.identity, **state}, temporary)


def fit(
    module: nn.Module,
    loss: Loss,
    rows: Batch,
    spec: FitSpec,
    *,
    count: Callable[[Batch, int], Any],
    seed: int,
    device: torch.device,
    log: Callable[[Row], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    state: Path | None = None,
) -> list[Row]:
    """Train `module` in place: AdamW, bf16 autocast on a GPU, float32 on a CPU. Returns all rows, in step order.

    rows: name -> [R, n], the same in every process. A step's batch of `spec.rows` rows is cut in processes x
    `spec.accumulate` equal parts. `count(batch, step)` sees the whole batch and says what its sums are divided by;
    `loss(part, step, counts)` returns the part's sums over those counts, so that the parts' values add up to the loss,
    and their gradients to the gradient, however the batch is cut. Both may depend on nothing but their arguments (see
    `generator`). Example: parts of 3 and 1 tokens with losses 1 1 1 and 5 give 3/4 and 5/4, together the mean 2; the
    mean of the parts' means would be 3.

    `log` receives one row a metric every `log_every` steps (means over those steps), and `evaluate()`'s values every
    `evaluate_every` steps and after the last; in the main process only. Matrices decay, vectors do not.

    With `state`, a folder, everything needed to go on is saved there every `save_every` steps and after the last; a
    run that finds it goes on from it and ends with the same weights, bit for bit on a CPU.
    Raises `UserError` when the loss is not finite, the memory runs out, the batch cannot be cut evenly, or `state`
    belongs to another training.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if device.type == "cuda" else "no")
    main, parts = accelerator.is_main_process, accelerator.num_processes * spec.accumulate
    if spec.accumulate < 1 or spec.rows % parts:
        raise UserError(
            f"train.rows = {spec.rows} cannot be cut evenly in {accelerator.num_processes} process(es) x accumulate "
            f"= {spec.accumulate}: make rows a multiple of {max(parts, 1)}"
        )
    module.to(device).train()
    weights = [p for p in module.parameters() if p.requires_grad]
    steppers = optimizers(module, spec, device)

    saved: Saved | None = None
    lines: list[Row] = []
    sums: dict[str, Tensor] = {}  # names of metrics -> their pairs [M, 2] so far: one tensor, few small operations
    begin, tokens, seconds = 0, 0, 0.0  # begin: the last step that is saved
    if state is not None:
        budget = {k: v for k, v in dataclasses.asdict(spec).items() if k not in FREE}
        data = {name: [*tensor.shape, int(tensor.sum())] for name, tensor in rows.items()}
        saved = Saved(state, {"budget": budget, "seed": seed, "rows": data})
        found, lines = saved.load(device)
        if main:  # it alone writes
            saved.start(lines)
        if found:
            module.load_state_dict(found["module"])
            for stepper, held in zip(steppers, found["optimizers"], strict=True):
                stepper.load_state_dict(held)
            begin, tokens, seconds = found["step"], found["tokens"], found["seconds"]
            sums = found["sums"] if main else {name: torch.zeros_like(pair) for name, pair in found["sums"].items()}
            if main:
                manifest.say(f"training resumes after step {begin} of {spec.steps}")
    started = time.perf_counter() - seconds
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # peak_gb is this training's, not that of one before it

    def report(step: int, values: dict[str, float]) -> None:
        new = [{"step": step, "tokens": tokens, "metric": name, "value": value} for name, value in values.items()]
        lines.extend(new)
        if saved is not None:
            saved.add(new)
        for row in new:
            log(row)

    def collect(step: int) -> dict[str, tuple[float, float]]:
        """Adds up the sums of all processes in the main one. Raises `UserError` where the loss is not finite."""
        found: dict[str, tuple[float, float]] = {}
        for names, pairs in sums.items():
            total = accelerator.reduce(pairs, "sum")
            sums[names] = total if main else torch.zeros_like(total)
            for name, (value, of) in zip(names.split(), total.tolist(), strict=True):
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + value, before[1] + of
        if not math.isfinite(value := found["loss"][0]):
            raise UserError(f"training diverged at step {step} (loss {value}): lower learning_rate")
        return found

    def parts_of(batch: Batch) -> Iterator[Batch]:
        first = accelerator.process_index * spec.accumulate
        for part in range(first, first + spec.accumulate):
            yield {name: tensor.chunk(parts)[part] for name, tensor in batch.items()}

    for step, batch in enumerate(batches(rows, spec.rows, spec.steps, seed, begin), start=begin + 1):
        for group in (group for stepper in steppers for group in stepper.param_groups):
            group["lr"] = spec.learning_rate * rate(step - 1, spec)
        try:
            counts = count(batch, step)
            for part in parts_of(batch):
                with accelerator.autocast():
                    value, metrics = loss(part, step, counts)
                accelerator.backward(value)
                whole = {"loss": (value, torch.full_like(value, 1 / parts)), **metrics}  # a step's parts are one loss
                names = " ".join(whole)
                pairs = torch.stack([number.detach().float() for pair in whole.values() for number in pair]).view(-1, 2)
                sums[names] = sums[names] + pairs if names in sums else pairs
            reduce_gradients(accelerator, weights)
            accelerator.clip_grad_norm_(weights, spec.clip)
            for stepper in steppers:
                stepper.step()
        except RuntimeError as error:
            if not _memory(error):
                raise
            kept = f"; what was saved after step {begin} is kept in {state}" if saved is not None and begin else ""
            raise UserError(
                f"out of memory at training step {step}: set train.accumulate to {2 * spec.accumulate} (slower, the "
                "same result), with train.compile lower train.activation_budget (likewise), or lower train.rows, "
                "data.length, or a drafter's keep or layers" + kept
            ) from error
        module.zero_grad(set_to_none=True)
        tokens += next(iter(batch.values())).numel()
        last = step == spec.steps
        if step % spec.log_every == 0 or last:
            found = collect(step)
            if main:
                values = {name: total / max(of, 1e-9) for name, (total, of) in found.items()}
                if device.type == "cuda":
                    values["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
                report(step, {**values, "seconds": time.perf_counter() - started})
            sums = {}
        if main and evaluate and (last or (spec.evaluate_every and step % spec.evaluate_every == 0)):
            module.eval()
            with torch.no_grad(), accelerator.autocast():
                report(step, evaluate())
            module.train()
        if saved is not None and (last or step % spec.save_every == 0):
            if sums:
                collect(step)
            if main:
                held = [stepper.state_dict() for stepper in steppers]
                state_now = {"module": module.state_dict(), "optimizers": held, "sums": sums}
                saved.save({**state_now, "step": step, "tokens": tokens, "seconds": time.perf_counter() - started})
            begin = step
    accelerator.wait_for_everyone()
    module.eval()
    return lines
