"""The training loop: cut batches, several processes, killed runs, and what it refuses."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import toys
from conftest import ROOT
from safetensors.torch import load_file

from psnb import drafters, fit, train
from psnb.errors import UserError
from psnb.profile import DrafterSpec, FitSpec
from psnb.target import as_batch

CPU = torch.device("cpu")


def run(folder, log=lambda row: None, **budget):
    """Trains a toy drafter in `folder`: float64, a loss mask that chooses unevenly, groups drawn anew in each step."""
    target, rows = toys.target(torch.float64), as_batch(toys.rows(12))
    rows["loss_mask"] = torch.rand(12, 24, generator=torch.Generator().manual_seed(4)).lt(0.6).long()
    how = {"steps": 7, "rows": 4, "warmup": 2, "learning_rate": 1e-2, "log_every": 2, "save_every": 3, **budget}
    spec = DrafterSpec("eagle-ps", k=toys.K, keep=0.6, train=FitSpec(**how))
    folder.mkdir(exist_ok=True)
    torch.set_default_dtype(torch.float64)  # of the new drafter's weights
    try:
        train.train_drafter(spec, target, rows, rows, folder, seed=3, device=CPU, log=log, state=folder / "state")
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def stopping(step, stop=lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
    """Calls `stop` in a step, between its gradients and its update; yields the list of steps that were reached."""
    plain, seen = fit.reduce_gradients, []

    def reduce(*arguments):
        seen.append(1)
        if len(seen) == step:
            stop()
        plain(*arguments)

    fit.reduce_gradients = reduce
    try:
        yield seen
    finally:
        fit.reduce_gradients = plain


def weights(folder):
    return load_file(folder / "drafter.safetensors")


def table(folder):
    """training.csv but the seconds."""
    return [line.split(",") for line in (folder / "training.csv").read_text().splitlines() if ",seconds," not in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run in one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def same(folder, whole):
    for file in ("drafter.safetensors", "spec.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert table(folder) == table(whole)
    exact, other = (torch.load(f / "state" / "state.pt")["module"] for f in (folder, whole))
    assert all(torch.equal(exact[name], other[name]) for name in other)  # before they are rounded to bfloat16


def test_a_process_killed_by_the_system_goes_on_exactly(whole, tmp_path):
    if not (child := os.fork()):
        with stopping(5, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            run(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "training.csv").exists() and (tmp_path / "state" / "rows.jsonl").exists()
    with stopping(0) as steps:
        run(tmp_path)
    assert len(steps) == 4  # saved after step 3
    same(tmp_path, whole)


def test_two_processes_and_parts_of_a_batch_are_one_batch(whole, tmp_path):
    """Every part holds another number of judged tokens: a mean of means would differ."""
    script = (  # without threads of gloo's at the interpreter's end, as runner.work
        "import pathlib, sys, torch.distributed.nn.functional, test_fit\n"
        "test_fit.run(pathlib.Path(sys.argv[1]), accumulate=2)\ntorch.distributed.destroy_process_group()"
    )
    (tmp_path / "run.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, tmp_path / "run.py", tmp_path], env={**os.environ, **paths}, check=True)
    exact, other = (torch.load(f / "state" / "state.pt")["module"] for f in (whole, tmp_path))
    for name, tensor in exact.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)
    assert [row[:3] for row in table(tmp_path)] == [row[:3] for row in table(whole)]
    for row, one in zip(table(tmp_path)[1:], table(whole)[1:], strict=True):
        assert float(row[3]) == pytest.approx(float(one[3]), rel=1e-4)


def test_a_run_stopped_anywhere_ends_with_the_same_bytes(whole, tmp_path):
    for stop in (1, 2, 4, 7):
        with pytest.raises(KeyboardInterrupt), stopping(stop):
            run(tmp_path / str(stop))
        with stopping(0) as steps:
            run(tmp_path / str(stop))
        assert len(steps) == 7 - (stop - 1) // 3 * 3  # no step is done again that was saved
        same(tmp_path / str(stop), whole)
    with stopping(0) as steps:
        run(tmp_path / "7")
    assert not steps  # finished, and killed before its weights were written: nothing is trained again
    same(tmp_path / "7", whole)


def test_muon_turns_the_layers_matrices_by_their_polar_factor():
    """Against the singular value decomposition: one step moves W by 0.2 sqrt(max(m, n)) of about U V^T."""
    spec = FitSpec(steps=1, optimizer="muon", learning_rate=0.03, weight_decay=0.1)
    drafter = drafters.build(DrafterSpec("eagle-ps", k=toys.K), toys.target(torch.float64)).double()
    before = {name: weight.detach().clone() for name, weight in drafter.named_parameters()}
    for weight in drafter.parameters():
        weight.grad = torch.randn_like(weight)
    for stepper in (steppers := fit.optimizers(drafter, spec, CPU)):
        stepper.step()
    assert len(steppers) == 2
    for name, weight in drafter.named_parameters():
        moved = (before[name] * (1 - 0.03 * (0.1 if weight.ndim > 1 else 0.0)) - weight.detach()) / 0.03
        if weight.ndim == 2 and ".layers." in name:
            u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
            turned = u.T @ moved @ v.T / (0.2 * max(weight.shape) ** 0.5)
            sizes = turned.diagonal()
            assert sizes.min() > 0.5 and sizes.max() < 1.3, name
            torch.testing.assert_close(turned, sizes.diag(), rtol=0, atol=0.05)  # it is orthogonalised in bfloat16
        else:  # AdamW's first step is the gradient's sign
            torch.testing.assert_close(moved, weight.grad.sign(), rtol=0, atol=1e-4)


def test_muon_goes_on_exactly(tmp_path):
    run(tmp_path / "whole", optimizer="muon")
    with pytest.raises(KeyboardInterrupt), stopping(5):
        run(tmp_path / "stopped", optimizer="muon")
    run(tmp_path / "stopped", optimizer="muon")
    same(tmp_path / "stopped", tmp_path / "whole")


def test_rows_of_a_half_written_line_are_cut(tmp_path):
    with pytest.raises(KeyboardInterrupt), stopping(5):
        run(tmp_path)
    rows = tmp_path / "state" / "rows.jsonl"
    assert {json.loads(line)["step"] for line in rows.read_text().splitlines()} == {2, 4}
    rows.write_text(rows.read_text() + '{"step": 5, "tok')
    run(tmp_path)
    assert {json.loads(line)["step"] for line in rows.read_text().splitlines()} == {2, 4, 6, 7}


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"rows": 2}])
def test_anothers_state_is_refused(tmp_path, change):
    run(tmp_path)
    run(tmp_path, accumulate=2, log_every=1, save_every=1)  # these change nothing
    with pytest.raises(UserError, match=r"state\.pt: of another training \(other budget\); delete .* to start"):
        run(tmp_path, **change)


def test_a_damaged_state_is_refused(tmp_path):
    run(tmp_path)
    file = tmp_path / "state" / "state.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"state\.pt: damaged .*delete"):
        run(tmp_path)


def test_an_uneven_batch_is_refused_before_any_step(tmp_path):
    with pytest.raises(
        UserError, match=r"rows = 4 cannot be cut evenly in 1 process.* accumulate = 3: .* multiple of 3"
    ):
        run(tmp_path, accumulate=3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[..] can't allocate memory")]
)
def test_out_of_memory_says_which_knob_to_turn(tmp_path, monkeypatch, error):
    with pytest.raises(KeyboardInterrupt), stopping(5):
        run(tmp_path)
    kept = (tmp_path / "state" / "state.pt").read_bytes()

    def full(*arguments):
        raise error

    monkeypatch.setattr(train, "teacher", full)
    with pytest.raises(
        UserError, match=r"step 4: set train.accumulate to 2 .*rows, data.length.*keep or layers.*after step 3 is kept"
    ):
        run(tmp_path)
    assert (tmp_path / "state" / "state.pt").read_bytes() == kept


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "teacher", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(tmp_path)


def test_batches_can_start_anywhere():
    rows = {"x": torch.arange(7)[:, None]}
    every = [b["x"].tolist() for b in fit.batches(rows, 3, 9, seed=1)]
    for start in range(10):
        assert [b["x"].tolist() for b in fit.batches(rows, 3, 9, seed=1, start=start)] == every[start:]


def test_steps_draw_their_own_numbers():
    draws = [torch.rand(4, generator=fit.generator(seed, step)).tolist() for seed in (0, 1) for step in range(50)]
    assert len({tuple(draw) for draw in draws}) == 100
    assert torch.rand(4, generator=fit.generator(1, 7)).tolist() == draws[57]


@pytest.mark.parametrize("kind", list(drafters.KINDS))
def test_parts_of_a_batch_add_up_to_its_loss(kind):
    target = toys.target(torch.float64)
    drafter = toys.drafter(kind, target, feature_weight=0.5, streak_weight=0.5)
    batch = as_batch(toys.rows(6))
    batch["loss_mask"] = torch.rand(6, 24, generator=torch.Generator().manual_seed(4)).lt(0.5).long()
    batch["loss_mask"][0] = 0  # a part on its own selects nothing
    depth, anchor = train.groups.drop(23, drafter.masks, 0.7, 0.2, torch.Generator().manual_seed(0))
    counts = torch.bincount(depth).tolist()
    totals = train.tallies(drafter, batch, depth, anchor, counts)

    def loss(part):
        return train.group_loss(drafter, part, train.teacher(target, part), depth, anchor, counts, totals)[0]

    parts = [{name: tensor[i : i + n] for name, tensor in batch.items()} for i, n in ((0, 1), (1, 3), (4, 2))]
    torch.testing.assert_close(sum(map(loss, parts)), loss(batch), rtol=1e-6, atol=0)  # judged in float32


def test_a_budget_of_activations_keeps_less_and_gives_the_same_gradient(monkeypatch):
    """Of compiled layers; the compiler's own partition of their graph, without its code generation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    target = toys.target()
    body = toys.drafter("eagle-ps", target, layers=2).body
    x, place = torch.randn(2, 24, target.hidden_size, requires_grad=True), torch.arange(24).expand(2, -1)
    mask, found = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril(), {}
    for budget in (1.0, 0.2):
        torch._dynamo.reset()
        kept = []
        with fit.compiled_layers([body], FitSpec(1, compile=True, activation_budget=budget), torch.device("cuda")):
            with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
                made = body(x, place, mask).square().sum()
            found[budget] = sum(x.nbytes for x in kept), torch.autograd.grad(made, x)[0]
    assert found[0.2][0] < 0.7 * found[1.0][0]
    assert torch.allclose(found[0.2][1], found[1.0][1], rtol=1e-5)
