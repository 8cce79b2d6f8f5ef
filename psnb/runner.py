"""Running a profile: its notebooks through papermill, in order, then the report; trainings; what `psnb list` tells."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from psnb import manifest
from psnb.errors import UserError
from psnb.manifest import digest, read_json, say
from psnb.profile import Profile, nearest
from psnb.study import DATA, FORMAT, SPLITS, Study, code, stage_facts

CORE_FLOPS = 5e10  # a second, reached while training by a core. For cost hints only, as the next
GPU_FLOPS = 4e11  # the same by a data-centre GPU, for each of the first 1,024 of the target's width
# What the compiler says of its own choices: nothing that a notebook's reader could act on
QUIET = ",".join(f"ignore::UserWarning:torch._inductor.{name}" for name in ("lowering", "compile_fx"))


def notebooks(study: Study) -> dict[str, Path]:
    """The source notebooks by name, in order. Raises UserError where there are none."""
    found = study.notebooks
    if wrong := [name for name in study.profile.stages if name not in found]:
        raise UserError(
            f"profile {study.profile.name}: unknown notebook {wrong[0]!r} in stages; {nearest(wrong[0], found)}"
        )
    found = {name: path for name, path in found.items() if name in (study.profile.stages or found)}
    if not found:
        raise UserError(f"no notebooks in {study.root / 'notebooks'}: run psnb inside the project's folder")
    return found


def stages(study: Study) -> list[str]:
    """All names that `--only` takes, in the order of a run."""
    return [*DATA, *study.models, *notebooks(study), "report"]


# --- 1. parameters --------------------------------------------------------------------------------------------------


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated type such as `int`, `float`, `list[str]`, `dict[str, int]`."""
    found = re.fullmatch(r"(\w+)(?:\[(.*)\])?", kind.strip())
    if not found or found[1] in ("None", "Any"):  # not annotated
        return True
    name, inner = found[1], re.split(r",\s*", found[2] or "Any")
    if name == "list":
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if name == "dict":
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[-1]) for k, v in value.items())
    return type(value).__name__ == name or (name == "float" and type(value) is int)


def _value(given: Any, kind: str) -> Any:
    """A text becomes the Python value that it spells, where it spells one and a text is not what is wanted."""
    if not isinstance(given, str):
        return given
    try:
        value = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(given.lower(), given)
    return value if isinstance(value, str) or kind != "str" else given


def check_parameters(study: Study, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{notebook: {name: value}} checked against the annotated parameters cells, as are the profile's own values.

    A value may be a text that spells it (`"[1, 2]"`). Raises UserError for an unknown notebook or parameter and for a
    value of another type, naming what would be right.
    """
    paths, known = notebooks(study), {}
    for where, table in ((f"profile {study.profile.name}", study.profile.notebooks), ("-p", given)):
        checked: dict[str, dict[str, Any]] = {}
        for notebook, values in table.items():
            if notebook not in paths:
                raise UserError(f"{where}: unknown notebook {notebook!r}; {nearest(notebook, paths)}")
            if notebook not in known:
                import papermill

                known[notebook] = papermill.inspect_notebook(str(paths[notebook]))
            free = known[notebook].keys() - {"profile", "output"}  # these two are psnb's own
            for name, value in values.items():
                if name not in free:
                    raise UserError(f"{where}: unknown parameter {notebook}.{name}; {nearest(name, free)}")
                kind = known[notebook][name]["inferred_type_name"]
                value = _value(value, kind)
                if not _fits(value, kind):
                    raise UserError(f"{where}: {notebook}.{name} wants {kind}, not {value!r}")
                checked.setdefault(notebook, {})[name] = value
    return checked


# --- 2. one notebook ------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A notebook raised `name` with this text."""

    def __init__(self, name: str, text: str) -> None:
        self.disk = name in ("DiskError", "PermissionError") or "No space left on device" in text
        first = next(iter(text.strip().splitlines()), "")
        super().__init__(first if name in ("", "UserError", "DiskError") else f"{name}: {first}")


def _key(study: Study, source: Path, given: dict[str, Any]) -> str:
    """What an executed notebook depends on; the last one, the report, also on all that the others wrote."""
    *others, last = notebooks(study).values()
    written = [_executed(study, path) for path in others] if source == last else []
    return digest(
        [
            [cell["source"] for cell in read_json(source)["cells"]],
            {**study.profile.notebooks.get(source.stem, {}), **given},
            [manifest.sha256_file(path) for path in written if path.is_file()],
            study.text(),
            code("**/*.py"),
        ]
    )


def _executed(study: Study, source: Path) -> Path:
    return study.results / "notebooks" / source.name


def execute(study: Study, source: Path, given: dict[str, Any], profile: str) -> bool:
    """Runs one notebook into results/<profile>/notebooks unless it stands there for the same inputs; True if it ran.

    A failed one is kept as NAME.failed.ipynb. Raises UserError with the notebook's own message.
    """
    name, final, key = source.stem, _executed(study, source), _key(study, source, given)
    if study.current(name, key, final):
        return False
    say(f"{name}: running")
    began, failed = time.monotonic(), final.with_suffix(".failed.ipynb")
    study.used(name)  # what a killed run noted goes
    values = {"profile": profile, "output": ".", **study.profile.notebooks.get(name, {}), **given}
    with manifest.atomic_folder(study.cache / "running") as folder:
        running = folder / source.name
        try:
            _papermill(study, source, running, values)
        except Failed as error:
            manifest.write_text(failed, _tidy(study, running))
            kind = manifest.DiskError if error.disk else UserError
            raise kind(f"{name}: {error} (how far it came: {failed})") from error
        manifest.write_text(final, _tidy(study, running))
        failed.unlink(missing_ok=True)
    study.done(name, key, final, began, files=study.used(name))
    return True


def _papermill(study: Study, source: Path, running: Path, values: dict[str, Any]) -> None:
    """Executes with this very Python, whatever kernels the user has; its prints go to stdout. Raises Failed."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    kernels = [str(Path(sys.prefix) / "share" / "jupyter"), os.environ.get("JUPYTER_PATH", "")]
    environment = {
        "PSNB_NOTEBOOK": source.stem,
        # one run is one job: its later notebooks compile at once for the sizes that its earlier ones met
        "TORCH_COMPILE_JOB_ID": f"psnb-{study.manifest.read().get('started', '')}",
        "JUPYTER_PATH": os.pathsep.join(filter(None, kernels)),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), QUIET])),
    }
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        papermill.execute_notebook(
            source, running, values, kernel_name="python3", progress_bar=False, cwd=study.output,
            stdout_file=sys.stdout, start_timeout=180, extra_arguments=["--IPKernelApp.log_level=50"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        raise Failed(error.ename, error.evalue) from error
    except DeadKernelError as error:
        raise Failed("", "its kernel died; most often the memory was not enough") from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def _tidy(study: Study, executed: Path) -> str:
    """An executed notebook as text, without the paths of the machine."""
    notebook = read_json(executed)
    names = {
        f"{side}_path": f"{folder}/{executed.name}" for side, folder in (("input", "notebooks"), ("output", "results"))
    }
    notebook["metadata"].get("papermill", {}).update(names)
    folders = {sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", study.output: ".", study.root: ".", Path.home(): "~"}

    def clean(text: str | list[str]) -> str | list[str]:
        if isinstance(text, list):
            return [clean(line) for line in text]
        for folder, short in folders.items():
            text = text.replace(str(folder), short) if len(str(folder)) > 1 else text
        return text

    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        for where, name in ((output, "text"), (output, "traceback"), (output.get("data", {}), "text/plain")):
            if name in where:
                where[name] = clean(where[name])
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


# --- 3. a run -------------------------------------------------------------------------------------------------------


def run(
    profile: str | Profile = "embedded",
    only: str | None = None,
    fresh: bool = False,
    parameters: dict[str, dict[str, Any]] | None = None,
    output: str | Path = "",
) -> Path:
    """Runs a profile: all notebooks in order and the report, or `only` one stage. Returns the results' folder.

    `parameters` is {notebook: {name: value}}. `fresh` makes `only` again, or without it everything that is measured; it
    touches weights only where `only` names them. Raises UserError before any work for unknown names and wrong types,
    and for files that are not there. A run that fails before it measured or trained leaves the manifest as it was.
    """
    study = Study.open(profile, output)
    if only is not None and only not in stages(study):
        raise UserError(f"unknown stage {only!r}; {nearest(only, stages(study))}")
    works_alone = only in (*DATA, *study.models) and not parameters  # needs no notebooks' tools
    given = {} if works_alone else check_parameters(study, parameters or {})
    for notebook, values in given.items():
        if only not in (None, notebook):
            raise UserError(f"-p {notebook}.{next(iter(values))}: --only {only} does not run {notebook}")
    chosen = [path for name, path in notebooks(study).items() if only in (None, name)]
    if not study.profile.drafters and any(path.stem == "02_train_drafters" for path in chosen):
        raise UserError(f"profile {study.profile.name} has no drafter: add a table such as [drafters.eagle-ps]")
    if not chosen:
        study.check_files(only)
        if fresh:
            study.fresh |= {only, *(f"{only}-{split}" for split in SPLITS)}
        report(study) if only == "report" else study.make(only)
        study.manifest.update(**study.facts())
        return study.results
    is_file = isinstance(profile, str) and profile.endswith(".toml")  # a notebook's working directory is `output`
    name = os.path.relpath(profile, study.output) if is_file else study.profile.name
    first, key = chosen[0], _key(study, chosen[0], given.get(chosen[0].stem, {}))
    if only or fresh or not study.current(first.stem, key, _executed(study, first), quiet=True):
        study.check_files(only or "")
    before, stood = study.manifest.read(), study.facts()
    if fresh:
        _forget(study, only)
    study.manifest.start(**study.about(), command=_command(study, only, fresh, given), **stood)
    try:
        began = time.monotonic()
        executed = []
        study.manifest.update(**study.facts())  # `--only` a notebook that reads them
        for path in chosen:
            if execute(study, path, given.get(path.stem, {}), name):
                executed.append(path.stem)
            seconds = round(time.monotonic() - began, 1)
            study.manifest.update(**study.facts(), executed=executed, seconds=seconds)  # the last notebook reads them
        if only is None and (executed or not (study.results / "report.html").is_file()):
            report(study)
        elif only is None:
            study.once("report", "reused")
        there = study.manifest.read()["stages"].keys() >= notebooks(study).keys()
        study.manifest.finish("complete" if there and not (study.elsewhere() or study.stale()) else "partial")
    except BaseException as error:
        if stopped := isinstance(error, KeyboardInterrupt):
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of the notebook's client, left behind
        with contextlib.suppress(UserError, OSError):  # a full disk: the first error is the one to tell
            if _measured(facts := study.facts()) == _measured(stood):
                study.manifest.restore(before)
            else:
                study.manifest.finish("interrupted" if stopped else "failed", **facts, error=str(error))
        raise
    return study.results


def _measured(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a manifest's facts the records of notebooks, tables and weights: all but the data's."""
    return [{n: f for n, f in facts["stages"].items() if n not in facts["data"]}, facts["checkpoints"]]


def _command(study: Study, only: str | None, fresh: bool, given: dict[str, dict[str, Any]]) -> str:
    words = [
        "psnb run --profile",
        Path(study.asked).name,
        *(["--only", only] if only else []),
        *(["--fresh"] if fresh else []),
    ]
    pairs = [f"-p '{notebook}.{name}={value}'" for notebook, values in given.items() for name, value in values.items()]
    return " ".join([*words, *pairs])


def _forget(study: Study, only: str | None) -> None:
    """`--fresh`: the records of what is to be measured again go first, so that a killed run goes on with it."""
    for path in study.cache.glob("stages/*.json"):
        if only is None or path.stem == only or read_json(path).get("notebook") in (only, ""):
            path.unlink()
    if only is None:
        (study.cache / FORMAT).unlink(missing_ok=True)


def report(study: Study) -> Path:
    """Renders results/<profile>/report.html from the executed notebooks and the manifest.

    Raises UserError where a notebook has not been executed yet.
    """
    from psnb import report as rendering

    executed = [_executed(study, path) for path in notebooks(study).values()]
    if missing := [path.stem for path in executed if not path.is_file()]:
        raise UserError(f"not run yet: {', '.join(missing)}; {study.command('run PROFILE')} runs what is missing")
    say("report: rendering")
    path = study.results / "report.html"
    rendering.html(executed, study.manifest.read(), path)
    return path


# --- 4. what is done ------------------------------------------------------------------------------------------------


def train(profile: str, stage: str, processes: int = 1, fresh: bool = False, output: str = "") -> Path:
    """Trains the target or a drafter as far as it is not there, in `processes` processes (GPUs); its folder.

    What was killed goes on from what it saved. Raises UserError.
    """
    study = Study.open(profile, output, fresh=[stage] if fresh else [])
    if stage not in study.models or (stage == "target" and study.profile.target.path):
        known = [name for name in study.models if name != "target" or not study.profile.target.path]
        raise UserError(f"--stage {stage}: no model that this profile trains; {nearest(stage, known)}")
    if processes < 1:
        raise UserError(f"--processes {processes}: one a GPU, so 1 or more")
    if study.device.type == "cuda":
        import torch

        if processes > torch.cuda.device_count():
            raise UserError(f"--processes {processes}: there are {torch.cuda.device_count()} GPUs; ask for fewer")

    def launch(name: str, folder: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "psnb"]
        given = ["train", "--profile", profile, "--output", str(study.output), "--stage", name]
        given += ["--into", str(folder), "--parent", str(os.getpid())]
        threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}  # else 1, and a warning
        how: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": {**threads, **os.environ}}
        with subprocess.Popen([sys.executable, *launcher, *given], **how) as launched:
            try:
                stderr = launched.communicate()[1]
            except BaseException:  # a notebook's interrupt reaches this process alone
                launched.terminate()  # and the launcher its processes, which subprocess.run would leave behind
                raise
        if (told := folder / "error.txt").is_file():
            raise UserError(told.read_text(encoding="utf-8"))
        if launched.returncode:
            raise UserError(f"training {name} in {processes} processes failed: {_cause(stderr)}")

    study.launch = launch if processes > 1 else None
    study.make(stage)
    return study.checkpoint(stage)


def _cause(stderr: str) -> str:
    """What torchrun's and its processes' stderr says of the first process that fell: how, and its own last words."""
    said, *launchers = re.split(r"^[EW]\d{4} .*torch/distributed/elastic/\S+ ", stderr, flags=re.MULTILINE)
    how = next((part.split("\n")[0].removeprefix("failed ") for part in launchers if part.startswith("failed ")), "")
    rank = re.search(r"local_rank: (\d+)", how)
    own = [line for line in said.splitlines() if rank and line.startswith(f"[rank{rank[1]}]")]
    return f"{how}\n{chr(10).join(own) or said}".strip()[-3000:]


def _end_with(parent: int) -> None:
    """Ends this process soon after the one that asked for it, or the launcher between the two, was killed."""
    launcher = os.getppid()
    with contextlib.suppress(psutil.NoSuchProcess):
        asked = psutil.Process(parent)
        while os.getppid() == launcher and asked.is_running() and asked.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


def work(profile: str, stage: str, folder: Path, output: str, parent: int) -> None:
    """One of the processes that `train` in process `parent` started: trains into `folder`; the first one talks."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Its functions take the group that is there when it is imported as a default argument. Imported later it would keep
    # gloo's threads alive after destroy_process_group, and these can abort the interpreter's end (pytorch#190489).
    import torch.distributed.nn.functional  # noqa: F401
    from accelerate import PartialState

    study = Study.open(profile, output)
    study.quiet = True
    state = PartialState(cpu=study.device.type == "cpu")  # chooses this process's GPU
    with contextlib.ExitStack() as stack:
        if not state.is_main_process:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            study.fit_into(stage, folder)
        except UserError as error:
            (folder / "error.txt").write_text(str(error), encoding="utf-8")
            raise
    state.destroy_process_group()


def status(study: Study) -> pd.DataFrame:
    """stage, done (yes, no, unneeded, changed, damaged, weights not here), cost: what it took, or would take."""
    told, rows = study.manifest.read().get("stages", {}), []
    trained = all(study.ready(name) for name in study.models if name != "target" or not study.profile.target.path)
    for stage in DATA:
        parts = [study.made(s) for s in ([f"{stage}-{x}" for x in SPLITS] if stage in ("tokens", "rows") else [stage])]
        unneeded = trained and stage in ("tokenizer", "tokens", "rows")  # only a training asks for them
        seconds = sum(part.get("seconds", 0) for part in parts)
        done = "yes" if all(parts) else "unneeded" if unneeded else "no"
        rows.append((stage, done, _took(seconds) if all(parts) else "" if unneeded else "minutes at most"))
    rows += [(name, *_weights_status(study, name)) for name in study.models]
    for name, path in notebooks(study).items():
        done = study.current(name, _key(study, path, {}), _executed(study, path), quiet=True)
        rows.append((name, "yes" if done else "no", _took(told[name]["seconds"]) if name in told else "minutes"))
    done = (study.results / "report.html").is_file() and all(row[1] == "yes" for row in rows[len(DATA) :])
    rows.append(("report", "yes" if done else "no", "seconds"))
    return pd.DataFrame(rows, columns=["stage", "done", "cost"])


def _took(seconds: float) -> str:
    return f"took {seconds:.0f} s" if seconds < 100 else f"took {seconds / 60:.1f} min"


def _weights_status(study: Study, name: str) -> tuple[str, str]:
    if name == "target" and study.profile.target.path:
        return "yes", f"loaded from {study.profile.target.path}"
    folder = study.checkpoint(name)
    facts = stage_facts(folder)
    files = [*facts.get("weights", ()), *(["spec.json"] if name != "target" else [])]
    if facts and study.ready(name) and not all((folder / file).is_file() for file in files):
        return "damaged", _estimate(study, name)
    if facts and study.ready(name):
        return "yes", f"{_took(facts['seconds'])} on {facts['machine']}"
    if study.recorded_only(name):
        return "weights not here", _estimate(study, name)
    state = "changed" if facts else "damaged" if folder.is_dir() else "no"
    return state, _estimate(study, name)


def _estimate(study: Study, name: str) -> str:
    """The time of training from the shapes: 6 flops a weight and row, 2 for the frozen target's forward pass.

    A token is one row of `eagle`, of `medusa` one row with k projections, of the others the rows that their masks add.
    """
    profile, t = study.profile, study.profile.target
    width, inner, layers, vocabulary = study.sizes()
    budget = t.train if name == "target" else profile.drafters[name].train
    if budget is None:
        return "no training budget in the profile"
    layer = width**2 * (2 + 2 * t.kv_heads / t.heads) + 3 * width * inner
    flops = 6 * (layers * layer + width * vocabulary)
    if name != "target":
        spec = profile.drafters[name]
        ps, medusa = spec.kind.endswith("-ps"), spec.kind == "medusa"
        masks = spec.anchors * sum(max(spec.keep**d, spec.keep_min) for d in range(1, spec.k)) if ps else 0
        body = width**2 * spec.k if medusa else spec.layers * layer
        flops = flops / 3 + 6 * (1 + masks) * (body + width * vocabulary * (spec.k if medusa else 1))
    minutes, gpu = flops * budget.steps * budget.rows * profile.data.length / 60, GPU_FLOPS * min(width, 1024)
    cores = manifest.cores()
    here = f"{_long(minutes / CORE_FLOPS / cores)} on {cores} core{'s' if cores > 1 else ''}"
    return f"about {here}, {_long(minutes / gpu)} on one GPU"


def _long(minutes: float) -> str:
    """0.01 -> `0.1 min`, 150 -> `2.5 h`, 5760 -> `4.0 days`."""
    if minutes <= 120:
        return f"{max(0.1, minutes):.1f} min"
    return f"{minutes / 60:.1f} h" if minutes <= 48 * 60 else f"{minutes / 1440:.1f} days"
