"""The drafters, by the name of their kind; saved and loaded as safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from psnb import joined, manifest
from psnb.drafters.base import Drafter
from psnb.drafters.eagle import Eagle
from psnb.drafters.medusa import Medusa
from psnb.drafters.parallel import EaglePS, MedusaPS
from psnb.errors import UserError
from psnb.profile import DrafterSpec, FitSpec, nearest
from psnb.target import Target

KINDS: dict[str, type[Drafter]] = {"medusa": Medusa, "eagle": Eagle, "medusa-ps": MedusaPS, "eagle-ps": EaglePS}


def build(spec: DrafterSpec, target: Target) -> Drafter:
    """A new drafter for `target`, on its device, in float32."""
    if spec.kind not in KINDS:
        raise UserError(f"unknown drafter kind {spec.kind!r}; {nearest(spec.kind, KINDS)}")
    if (spec.taps or spec.link) and not spec.kind.endswith("-ps"):
        raise UserError(f"drafter {spec.kind}: taps and link are for medusa-ps and eagle-ps")
    if not all(0 < tap < target.layers for tap in spec.taps):
        raise UserError(f"drafter {spec.kind}: taps {spec.taps} must be layers 1 to {target.layers - 1} of the target")
    return KINDS[spec.kind](spec, target).to(target.device)


def save(drafter: Drafter, folder: Path) -> None:
    """Write drafter.safetensors (bf16) and spec.json to `folder`. The target's own weights are not among them."""
    weights = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in drafter.state_dict().items()}
    save_file(weights, Path(folder) / "drafter.safetensors")
    shape = {"hidden_size": drafter.target.hidden_size, "vocab_size": drafter.target.vocab_size}
    manifest.write_json(Path(folder) / "spec.json", {"spec": dataclasses.asdict(drafter.spec), **shape})


def load(folder: Path, target: Target) -> Drafter:
    """The drafter saved in `folder`, in the target's dtype and on its device.

    Raises `UserError` for an unreadable file, missing or surplus tensors, NaN, or a target of another vocabulary or
    width than the drafter was trained for.
    """
    folder = Path(folder)
    cure = "restore the folder, or train it again"
    try:
        stored = json.loads((folder / "spec.json").read_text())
        train = stored["spec"].pop("train")
        spec = DrafterSpec(**stored["spec"], train=FitSpec(**train) if train else None)
        weights = load_file(folder / "drafter.safetensors")
    except Exception as error:  # json, safetensors and the file system each raise their own kinds
        raise UserError(f"drafter {folder} does not load ({str(error).splitlines()[0]}); {cure}") from error
    for name in ("vocab_size", "hidden_size"):
        if stored[name] != getattr(target, name):
            raise UserError(
                f"drafter {folder} was trained for a target of {name} {stored[name]}, this one has "
                f"{getattr(target, name)}: use the drafter's own target, or train a drafter for this one"
            )
    drafter = build(spec, target)
    assign(drafter, weights, f"drafter {folder}", cure)
    joined.by_columns(drafter.to(target.dtype))
    return drafter.eval().requires_grad_(False)


def assign(drafter: Drafter, weights: dict[str, torch.Tensor], what: str, cure: str) -> None:
    """Copy `weights` into `drafter`, which must name exactly the same tensors, of the same shapes, all finite."""
    own = drafter.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
    if wrong:
        raise UserError(f"{what}: missing, surplus or misshapen tensors: {', '.join(wrong[:4])}; {cure}")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{what}: {name} holds NaN or infinity; {cure}")
    drafter.load_state_dict(weights)
