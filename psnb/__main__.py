"""The command line: `psnb run`, `psnb train`, `psnb list`, `psnb report`, `psnb bench` (also `python -m psnb`)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psnb
from psnb.errors import UserError

EXAMPLES = """examples:
  psnb run                                            the embedded study, as far as it is not done yet
  psnb run --only 03_draft_length -p '03_draft_length.ks=[1,2,4]'
  psnb run --profile h200 --fresh                     measure everything again
  psnb run --profile my.toml --only eagle-ps --fresh  train one drafter again
  psnb train --profile h200 --stage eagle --processes 2   one model, on two GPUs; goes on where a killed run was
  psnb list --profile smoke                           what is done, what the rest would cost
  psnb bench --profile my.toml --json bench.json      how fast everything is on this machine
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="psnb", description=psnb.__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"psnb {psnb.__version__}")
    commands = top.add_subparsers(dest="command", metavar="run | train | list | report | bench")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--profile", default="embedded", metavar="P", help="a profile's name, or a .toml file (default: embedded)"
    )
    common.add_argument(
        "--output", default="", metavar="DIR", help="folder for results/ and figures/ (default: the project's)"
    )

    run = commands.add_parser("run", parents=[common], help="run the notebooks and write the report")
    run.add_argument("--only", metavar="STAGE", help="run this stage alone (names: psnb list)")
    run.add_argument(
        "--fresh", action="store_true", help="measure again; with --only make that stage again, weights too"
    )
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NOTEBOOK.name=value",
        help="a notebook's parameter",
    )

    train = commands.add_parser("train", parents=[common], help="train one model, or go on with it")
    train.add_argument("--stage", required=True, metavar="NAME", help="the target or a drafter (names: psnb list)")
    train.add_argument("--processes", type=int, default=1, metavar="N", help="processes, one a GPU (default: 1)")
    train.add_argument("--fresh", action="store_true", help="train it again")
    train.add_argument("--into", default="", help=argparse.SUPPRESS)  # one of the processes of
    train.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)

    commands.add_parser("list", parents=[common], help="stages, what is done, what each costs")

    report = commands.add_parser("report", parents=[common], help="write the report from what was run")
    report.add_argument("--readme", action="store_true", help="write the profile's results block of README.md instead")

    bench = commands.add_parser("bench", parents=[common], help="how fast each way of decoding is on this machine")
    bench.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="drafters (default: the profile's)")
    bench.add_argument("--k", type=int, default=5, metavar="K", help="tokens a draft (default: 5)")
    bench.add_argument("--nodes", type=int, default=0, metavar="N", help="nodes of trees (default: chains alone)")
    bench.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts (default: 8)")
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens a prompt (default: 64)")
    bench.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7], metavar="T")
    bench.add_argument("--repeats", type=int, default=1, metavar="N", help="seeds a prompt (default: 1)")
    bench.add_argument("--json", default="", metavar="FILE", help="write everything there too")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0, 1 (a file cannot be written), 2 (the user can mend it), 130 (Ctrl-C)."""
    given = parser().parse_args(arguments)
    if given.command is None:
        parser().print_help(sys.stderr)
        return 2
    try:
        return command(given)
    except UserError as error:
        print(f"psnb: error: {error}", file=sys.stderr)
        return 1 if type(error).__name__ == "DiskError" else 2
    except KeyboardInterrupt:
        print("psnb: stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `psnb list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"psnb: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def command(given: argparse.Namespace) -> int:
    """One command, parsed. Heavy modules are imported where they are needed."""
    from psnb import runner
    from psnb.study import Study

    if given.command == "list":
        status = runner.status(Study.open(given.profile, given.output))
        for row in [status.columns, *status.itertuples(index=False)]:
            print("{:<20}{:<18}{}".format(*row))
    elif given.command == "run":
        parameters = _parameters(given.parameters)
        results = runner.run(given.profile, given.only, given.fresh, parameters, given.output)
        _where(results, report=given.only in (None, "report"))
    elif given.command == "train" and given.into:
        runner.work(given.profile, given.stage, Path(given.into), given.output, given.parent)
    elif given.command == "train":
        Study.open(given.profile, given.output).check_files(given.stage)
        print(runner.train(given.profile, given.stage, given.processes, given.fresh, given.output))
    elif given.command == "bench":
        _bench(given)
    elif given.readme:
        from psnb import report

        study = Study.open(given.profile, given.output)
        readme = study.root / "README.md"
        report.readme(readme, study.results / "summary.csv")
        print(f"written: {readme}")
    else:
        study = Study.open(given.profile, given.output)
        runner.report(study)
        _where(study.results)
    return 0


def _parameters(texts: list[str]) -> dict[str, dict[str, str]]:
    """["NOTEBOOK.name=value", ...] -> {notebook: {name: value}}; UserError for another form."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        notebook, dot, name = left.partition(".")
        if not (equals and dot):
            raise UserError(f"-p {text}: write it as NOTEBOOK.name=value, such as 03_draft_length.ks=[1,2,4]")
        found.setdefault(notebook, {})[name] = value
    return found


def _bench(given: argparse.Namespace) -> None:
    from psnb import bench, manifest
    from psnb.study import Study

    if given.json:
        manifest.check_writable(Path(given.json))
    names = ("methods", "k", "nodes", "prompts", "tokens", "temperatures", "repeats")
    found = bench.run(Study.open(given.profile, given.output), **{name: getattr(given, name) for name in names})
    if given.json:
        bench.write(found, Path(given.json))
    print(f"{found['profile']}, {found['dtype']}, {manifest.machine_name(found['machine'])}")
    print(bench.table(found).to_string(index=False, na_rep=""))
    if found["peak_gb"] is not None:
        print(f"peak memory {found['peak_gb']:.1f} GB, graphs captured in {found['capture_seconds']:.0f} s")
    if given.json:
        print(f"written: {given.json}")


def _where(results: Path, report: bool = True) -> None:
    """Prints what lies where; the report only where it is of this run."""
    files = {"report.html": "report", "summary.csv": "numbers", "manifest.json": "manifest"}
    for name, what in files.items():
        if (results / name).is_file() and (report or what != "report"):
            print(f"{what + ':':<10}{results / name}")


if __name__ == "__main__":
    sys.exit(main())
