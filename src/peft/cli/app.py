"""The typer application: turns the option dataclasses into commands and errors into one line."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from peft.cli.options import (
    ARGUMENT,
    GROUPS,
    CheckOptions,
    CompareOptions,
    ConvertOptions,
    EstimateOptions,
    EvalOptions,
    GenerateOptions,
    InspectOptions,
    MergeOptions,
    PlanOptions,
    TrainOptions,
)
from peft.errors import PeftError


def build_app() -> Any:
    """The `typer.Typer` with all commands."""
    import typer

    app = typer.Typer(
        name="peft",
        help="Parameter-efficient fine-tuning of language models.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_show_locals=False,
        epilog="Start with: peft train --model FOLDER_OR_HUB_ID --data examples.jsonl --output my-adapter --dry-run",
    )
    app.callback()(_root())
    _add(app, "plan", PlanOptions, _plan, "What an adapter would change in a model; reads no weight.")
    _add(app, "estimate", EstimateOptions, _estimate, "The memory that training an adapter takes; reads no weight.")
    _add(app, "train", TrainOptions, _train, "Fine-tune a causal language model; run it again to resume.")
    _add(app, "eval", EvalOptions, _evaluate, "Loss, perplexity and token accuracy of a saved adapter.")
    _add(app, "generate", GenerateOptions, _generate, "Answer a prompt with a saved adapter.")
    _add(app, "compare", CompareOptions, _compare, "Train many methods on labelled texts, in one table and picture.")
    _add(app, "convert", ConvertOptions, _file("convert"), "Write an adapter in the format of another program.")
    _add(app, "inspect", InspectOptions, _file("inspect"), "What an adapter holds, and what is wrong with it.")
    _add(app, "check", CheckOptions, _file("inspect", "check"), "Whether an adapter fits a base model.")
    _add(app, "merge", MergeOptions, _file("merge"), "Merge adapters into a base model, file by file; resumes.")
    return app


def _root() -> Callable[..., None]:
    """What `peft` itself takes: --version."""
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            import peft

            typer.echo(f"peft {peft.__version__}")
            raise typer.Exit()

    def root(version: bool = False) -> None:
        pass

    declared = typer.Option("--version", help="Print the version.", callback=show, is_eager=True)
    annotation = typing.Annotated[bool, declared]
    parameter = inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    root.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return root


def _plan(options: PlanOptions) -> int:
    from peft.cli.check import check_foresight

    check_foresight(options)
    from peft.cli.foresight import plan

    return plan(options)


def _estimate(options: EstimateOptions) -> int:
    from peft.cli.check import check_estimate

    check_estimate(options)
    from peft.cli.foresight import estimate

    return estimate(options)


def _train(options: TrainOptions) -> int:
    from peft.cli.check import check_train

    check_train(options)
    from peft.cli.train import run

    return run(options)


def _evaluate(options: EvalOptions) -> int:
    from peft.cli.check import check_eval

    check_eval(options)
    from peft.cli.evaluate import run

    return run(options)


def _generate(options: GenerateOptions) -> int:
    from peft.cli.check import check_generate

    check_generate(options)
    from peft.cli.generate import run

    return run(options)


def _compare(options: CompareOptions) -> int:
    from peft.cli.check import check_compare

    check_compare(options)
    from peft.cli.compare.run import run

    return run(options)


def _file(module: str, function: str = "run") -> Callable[[Any], int]:
    """The function of `peft.cli.MODULE`, imported when it is called."""

    def run(options: Any) -> int:
        from importlib import import_module

        return int(getattr(import_module(f"peft.cli.{module}"), function)(options))

    return run


def _add(app: Any, name: str, kind: type, run: Callable[[Any], int], help: str) -> None:
    """Register `run` under `name`, with one command-line option for each field of the dataclass `kind`."""

    def command(**values: Any) -> None:
        import typer

        raise typer.Exit(_guarded(run, kind(**values)))

    command.__signature__ = _signature(kind)  # type: ignore[attr-defined]
    app.command(name, help=help)(command)


def _leave_the_others() -> None:
    """End what several processes had together: threads that still listen to it may abort this one at its end."""
    if "torch.distributed" not in sys.modules:
        return
    from peft.core.sharded.gather import together

    if together():
        sys.modules["torch.distributed"].destroy_process_group()


def _guarded(run: Callable[[Any], int], options: Any) -> int:
    """The exit code: 0 done, 1 the system refused, 2 wrong option, 130 interrupted."""
    from peft.cli.report import error

    try:
        code = run(options)
        _leave_the_others()
        return code
    except PeftError as problem:
        error(str(problem))
        return 1 if isinstance(problem, OSError) else 2
    except OSError as problem:  # a full disk, a folder without permission
        error(str(problem))
        return 1
    except KeyboardInterrupt:
        error("Interrupted. The same command goes on from the last saved state, if there is one.")
        return 130


def _signature(kind: type) -> inspect.Signature:
    """Keyword parameters annotated with typer options, from the dataclass `kind`."""
    import typer

    types = typing.get_type_hints(kind)
    parameters = []
    for f in sorted(fields(kind), key=lambda f: (GROUPS.index(f.metadata["group"]), f.default is not MISSING)):
        meta = f.metadata
        flags = meta["flags"] or ("--" + f.name.replace("_", "-"),)
        kind_of = typer.Argument if flags == ARGUMENT else typer.Option
        declared = kind_of(*(() if flags == ARGUMENT else flags), help=meta["help"], rich_help_panel=meta["group"])
        default = inspect.Parameter.empty if f.default is MISSING else f.default
        annotation = typing.Annotated[types[f.name], declared]  # type: ignore[valid-type,name-defined]
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return inspect.Signature(parameters)
