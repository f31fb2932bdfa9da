# SPDX-License-Identifier: Apache-2.0
"""Commands from dataclasses: a field with an Option (unipool/options.py) is an option of a command.

Each command also takes --config FILE, whose values stand where the command line gives none.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unipool.errors import CommandInterrupted, InputError
from unipool.options import Field, known_options, read_options

# Of the command line alone: a file does not decide that code is run.
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the code that the model's folder brings along"),
]
_FILE = "file with options, .toml, .yaml or .json; those given here come first"


def command(config: type) -> Callable[[Callable], Callable]:
    """A function f(given, ...) as typer takes a command with the options of the dataclass `config`.

    given: the values from --config and from the command line, by field, without defaults. Further
    parameters of f are options of the command line alone, annotated for typer.
    """
    known = known_options(config)

    def decorate(function: Callable) -> Callable:
        own = list(inspect.signature(function).parameters.values())[1:]

        def run(ctx: typer.Context, **values: Any) -> None:
            file = values.pop("config")
            given = {} if file is None else read_options(file, config)
            for name, field in known.items():
                value = values.pop(name)
                if ctx.get_parameter_source(name).name == "COMMANDLINE":
                    given[name] = field.convert(value)
            _check_complete(given, known)
            try:
                function(_full_paths(given, known), **values)
            except KeyboardInterrupt as error:  # of which typer keeps the exit code alone
                raise CommandInterrupted(str(error)) from error

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = _signature(list(known.values()), own)
        run.__annotations__ = {
            name: parameter.annotation for name, parameter in run.__signature__.parameters.items()
        }
        return run

    return decorate


def _signature(known: list[Field], own: list[inspect.Parameter]) -> inspect.Signature:
    keyword = inspect.Parameter.KEYWORD_ONLY
    file = Annotated[Path | None, typer.Option("--config", metavar="<file>", help=_FILE)]
    parameters = [
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
        *(_parameter(field) for field in known),
        *(parameter.replace(kind=keyword) for parameter in own),
        inspect.Parameter("config", keyword, default=None, annotation=file),
    ]
    return inspect.Signature(parameters)


def _parameter(field: Field) -> inspect.Parameter:
    """The field for typer. What it requires may come from a file, so typer requires nothing."""
    option, kind = field.option, Path if field.option.path else field.kind
    default = None if field.many or field.required else field.default
    if option.commas:
        kind = str
        default = ",".join(map(str, field.default)) if field.default else None
    elif field.many:
        kind = list[kind]
    if default is None:
        kind = kind | None
    rules = {"help": _help(field), "show_default": not option.help.endswith("]")}
    if field.choices:
        rules["metavar"] = f"<{'|'.join(field.choices)}>"
    if option.argument:
        made = typer.Argument(**rules)
    else:
        names = (field.flag,) if kind is bool else ()  # without a --no-... beside it
        made = typer.Option(*names, rich_help_panel=option.panel, **rules)
    annotation = Annotated[kind, made]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=annotation)


def _help(field: Field) -> str:
    notes = [f"[{field.option.bounds}]"] if field.option.bounds else []
    if field.required:
        notes.append("[required]")
    return " ".join([field.option.help, *notes])


def _check_complete(given: dict, known: dict[str, Field]) -> None:
    for name, field in known.items():
        if field.required and name not in given:
            kind = "argument" if field.option.argument else "option"
            raise InputError(f"Missing {kind} '{field.flag}' (see --help)")


def _full_paths(given: dict, known: dict[str, Field]) -> dict:
    """What is read gets its full path, to be found again."""

    def full(value):
        if isinstance(value, tuple):
            return tuple(map(full, value))
        return None if value is None else str(Path(value).resolve())

    return {
        name: full(value) if known[name].option.path == "read" else value
        for name, value in given.items()
    }
