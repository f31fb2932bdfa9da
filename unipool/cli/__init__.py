# SPDX-License-Identifier: Apache-2.0
"""The `unipool` command: train, compare, demo, generate, eval, probe, analyze, convert,
resize, doctor.

Bad input is one line on stderr and exit code 2; a run that had to stop is one line and exit code 1;
a run that a signal stopped exits with 128 + the signal's number.
"""

import contextlib
import os
import signal
import sys
import tempfile
import traceback
from typing import Annotated

try:
    import typer
except ImportError:  # the extra `train` is not installed: `main` says so
    typer = None

import unipool
from unipool import doctor as _doctor
from unipool.errors import CommandInterrupted, InputError, TrainingError
from unipool.options import nearest
from unipool.terminal import printable

_EXTRA = 'pip install "unipool[train]"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that a terminal lacks ends no command
            stream.reconfigure(errors="backslashreplace")
    if arguments[:1] == ["doctor"]:
        try:
            return _doctor.main(arguments[1:])
        except Exception as error:
            return _fail(_unexpected(error), code=1)
    if typer is None:
        return _fail(
            f"the command line needs typer: {_EXTRA} (only `unipool doctor` works without)"
        )
    try:
        return app(args=arguments, prog_name="unipool", standalone_mode=False) or 0
    except InputError as error:
        return _fail(str(error))
    except TrainingError as error:
        return _fail(str(error), code=1)
    except ImportError as error:
        hint = "" if "pip install" in str(error) else f"; try {_EXTRA}"
        return _fail(f"{str(error).splitlines()[0]}{hint} (see `unipool doctor`)", code=1)
    except (CommandInterrupted, KeyboardInterrupt, typer.Abort) as error:
        return _fail(str(error) or "interrupted", code=130)
    except (BrokenPipeError, SystemExit) as error:  # whoever read our output has enough
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # the parser's exit is that of a pipe only if it comes from one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            return _fail(_unexpected(error), code=1)
        return _fail(f"cannot use {error.filename}: {error.strerror}", code=1)
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors
            return _fail(f"{_parser_message(error)} (see --help)")
        return _fail(_unexpected(error), code=1)


def _unexpected(error: Exception) -> str:
    """The line for what nobody foresaw; the traceback is in a file that it names."""
    text = "".join(traceback.format_exception(error))
    what = " ".join(traceback.format_exception_only(error)[-1].split())
    try:
        handle, path = tempfile.mkstemp(prefix="unipool-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        print(printable(text, lines=True), file=sys.stderr)
        path = "above"
    return f"an error of UniPool itself: {what} (traceback: {path}; please report it)"


def _parser_message(error) -> str:
    """One line, which names the known option nearest to one that is unknown."""
    if type(error).__name__ == "NoSuchOption":
        known = [name for parameter in error.ctx.command.params for name in parameter.opts]
        return f"No such option: {error.option_name}{nearest(error.option_name, known)}"
    return " ".join(error.format_message().split())


def _fail(message: str, code: int = 2) -> int:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(f"unipool: {printable(message)}", file=sys.stderr)
    return code


if typer is not None:
    from unipool.cli.analyze import analyze
    from unipool.cli.compare import compare
    from unipool.cli.convert import convert
    from unipool.cli.demo import demo
    from unipool.cli.doctor import doctor
    from unipool.cli.eval import evaluate
    from unipool.cli.generate import generate
    from unipool.cli.probe import probe
    from unipool.cli.resize import resize
    from unipool.cli.train import train

    app = typer.Typer(
        help="Mixture-of-Experts models whose layers share one pool of experts.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def _root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
        ] = False,
    ) -> None:
        if version:
            print(f"unipool {unipool.__version__}")
            raise typer.Exit(0)

    for name, function in {
        "train": train,
        "compare": compare,
        "demo": demo,
        "generate": generate,
        "eval": evaluate,
        "probe": probe,
        "analyze": analyze,
        "convert": convert,
        "resize": resize,
        "doctor": doctor,
    }.items():
        app.command(name)(function)
