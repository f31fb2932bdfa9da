# SPDX-License-Identifier: Apache-2.0
"""The `unipool` command: train, compare, demo, generate, eval, probe, analyze, convert,
resize, doctor.

Bad input is one line on stderr and exit code 2; a run that had to stop is one line and exit code 1;
a run that a signal stopped exits with 128 + the signal's number.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

try:
    import typer
except ImportError:  # the extra `train` is not installed: `main` says so
    typer = None

import unipool
from unipool import doctor as _doctor

_EXTRA = 'pip install "unipool[train]"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments[:1] == ["doctor"]:
        return _doctor.main(arguments[1:])
    if typer is None:
        return _fail(
            f"the command line needs typer: {_EXTRA} (only `unipool doctor` works without)"
        )
    from unipool.errors import InputError, TrainingError

    try:
        return app(args=arguments, prog_name="unipool", standalone_mode=False) or 0
    except InputError as error:
        return _fail(str(error))
    except TrainingError as error:
        return _fail(str(error), code=1)
    except ImportError as error:
        hint = "" if "pip install" in str(error) else f"; try {_EXTRA}"
        return _fail(f"{str(error).splitlines()[0]}{hint} (see `unipool doctor`)", code=1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", code=130)
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors
            return _fail(f"{' '.join(error.format_message().split())} (see --help)")
        raise


def _fail(message: str, code: int = 2) -> int:
    print(f"unipool: {message}", file=sys.stderr)
    return code


if typer is not None:
    from unipool.cli.compare import compare
    from unipool.cli.eval import evaluate
    from unipool.cli.probe import analyze, probe
    from unipool.cli.resize import convert, resize
    from unipool.training.config import TrainConfig, plain, with_last_rate

    app = typer.Typer(
        help="Mixture-of-Experts models whose layers share one pool of experts.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    _MODEL, _DATA, _OPTIM, _RUN = "Model", "Data", "Optimisation", "Run"

    def _option(help: str, panel: str, *names: str, **rules):
        return typer.Option(*names, help=help, rich_help_panel=panel, **rules)

    @app.callback(invoke_without_command=True)
    def _root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
        ] = False,
    ) -> None:
        if version:
            print(f"unipool {unipool.__version__}")
            raise typer.Exit(0)

    @app.command()
    def train(
        ctx: typer.Context,
        # --- model
        form: Annotated[
            Literal["dense", "vanilla", "unipool"],
            _option("dense MLPs, experts private to each layer, or one shared pool", _MODEL),
        ] = TrainConfig.form,
        scale: Annotated[
            str, _option("sizes: tiny, small, 182m, 469m, 650m, 830m or 978m", _MODEL)
        ] = TrainConfig.scale,
        d_model: Annotated[int | None, _option("model width D", _MODEL, min=1)] = None,
        d_ff: Annotated[int | None, _option("width F of one expert", _MODEL, min=1)] = None,
        layers: Annotated[int | None, _option("layers L", _MODEL, min=1)] = None,
        heads: Annotated[int | None, _option("attention heads", _MODEL, min=1)] = None,
        kv_heads: Annotated[int | None, _option("key/value heads", _MODEL, min=1)] = None,
        init_std: Annotated[
            float | None, _option("standard deviation of the first weights", _MODEL, min=0)
        ] = None,
        num_pools: Annotated[
            int | None, _option("pools G, from 1 (shared) to L (layer-private)", _MODEL, min=1)
        ] = None,
        pool_size: Annotated[int | None, _option("experts M in a pool", _MODEL, min=1)] = None,
        top_k: Annotated[int | None, _option("experts k a token", _MODEL, min=1)] = None,
        router: Annotated[
            Literal["norm", "softmax", "recurrent"] | None,
            _option("how experts are scored; recurrent: a GRU over the layers", _MODEL),
        ] = None,
        router_state_size: Annotated[
            int | None,
            _option("width of the recurrent router's state [width D, at most 256]", _MODEL, min=1),
        ] = None,
        router_scoring: Annotated[
            Literal["softmax", "norm"] | None,
            _option("scores of the recurrent router [softmax]", _MODEL),
        ] = None,
        balance: Annotated[
            Literal["pool", "layer", "none"] | None, _option("what is kept in balance", _MODEL)
        ] = None,
        balance_coefficient: Annotated[
            float | None, _option("weight of the balance loss", _MODEL, min=0)
        ] = None,
        balance_delay: Annotated[
            int | None,
            _option("load of the same (0) or the last (1) micro-batch", _MODEL, min=0, max=1),
        ] = None,
        # --- data
        data: Annotated[
            list[Path] | None,
            _option(
                "text or .jsonl file, or a folder of them; repeatable [the standard "
                "library's source]",
                _DATA,
            ),
        ] = None,
        field: Annotated[str, _option("field of a .jsonl row", _DATA)] = TrainConfig.field,
        tokenizer: Annotated[
            Path | None, _option("Hugging Face tokenizer folder [bytes]", _DATA)
        ] = None,
        val_fraction: Annotated[
            float, _option("part of the text to hold out", _DATA)
        ] = TrainConfig.val_fraction,
        seq_len: Annotated[int, _option("tokens a sequence", _DATA)] = TrainConfig.seq_len,
        # --- optimisation
        batch_size: Annotated[
            int, _option("sequences a micro-batch", _OPTIM)
        ] = TrainConfig.batch_size,
        accumulate: Annotated[
            int, _option("micro-batches a step", _OPTIM)
        ] = TrainConfig.accumulate,
        steps: Annotated[int, _option("optimizer steps", _OPTIM)] = TrainConfig.steps,
        seed: Annotated[
            int, _option("weights, held-out split and order of the text", _OPTIM)
        ] = TrainConfig.seed,
        lr: Annotated[float, _option("highest learning rate", _OPTIM)] = TrainConfig.lr,
        min_lr: Annotated[
            float | None, _option("last learning rate of the cosine [a tenth of --lr]", _OPTIM)
        ] = None,
        warmup: Annotated[
            float, _option("part of the steps to warm up over", _OPTIM)
        ] = TrainConfig.warmup,
        weight_decay: Annotated[
            float, _option("AdamW weight decay, of matrices only", _OPTIM)
        ] = TrainConfig.weight_decay,
        clip: Annotated[float, _option("greatest gradient norm", _OPTIM)] = TrainConfig.clip,
        device: Annotated[
            Literal["auto", "cpu", "cuda"], _option("where to train", _OPTIM)
        ] = TrainConfig.device,
        precision: Annotated[
            Literal["fp32", "bf16"], _option("bf16: autocast over float32 weights", _OPTIM)
        ] = TrainConfig.precision,
        # --- run
        out: Annotated[Path, _option("folder of the run", _RUN)] = Path(TrainConfig.out),
        resume: Annotated[
            bool, _option("go on from the last complete checkpoint in --out", _RUN, "--resume")
        ] = False,
        save_every: Annotated[
            int, _option("steps between checkpoints, 0: only the last", _RUN)
        ] = TrainConfig.save_every,
        eval_every: Annotated[
            int, _option("steps between evaluations, 0: only the last", _RUN)
        ] = TrainConfig.eval_every,
        eval_tokens: Annotated[
            int, _option("held-out tokens to evaluate on, 0: all", _RUN)
        ] = TrainConfig.eval_tokens,
        log_every: Annotated[
            int, _option("steps between rows of metrics.jsonl", _RUN)
        ] = TrainConfig.log_every,
        keep: Annotated[int, _option("checkpoints to keep", _RUN)] = TrainConfig.keep,
    ) -> None:
        """Train a language model into a run folder."""
        names = {entry.name for entry in dataclasses.fields(TrainConfig)}
        given = {
            name: plain(name, value)
            for name, value in ctx.params.items()
            if name in names and ctx.get_parameter_source(name).name == "COMMANDLINE"
        }
        _train(given, resume)

    app.command()(compare)

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/demo"),
        steps: Annotated[
            int | None, typer.Option(help="steps a model [a few minutes each on 2 cores]", min=1)
        ] = None,
        seed: Annotated[int, typer.Option(help="weights and order of the text", min=0)] = 0,
        device: Annotated[
            Literal["auto", "cpu", "cuda"], typer.Option(help="where to train")
        ] = "auto",
        resume: Annotated[
            bool, typer.Option("--resume", help="go on with an interrupted demo")
        ] = False,
    ) -> None:
        """Train three small models, layer-private and shared-pool, and compare them."""
        from rich.console import Console

        from unipool.training.demo import STEPS, DemoInterruptedError, run_demo

        try:
            run_demo(
                out,
                steps=steps or STEPS,
                seed=seed,
                device=device,
                resume=resume,
                console=Console(),
            )
        except DemoInterruptedError as stop:
            options = f" --steps {steps}" if steps else ""
            options += f" --seed {seed}" if seed else ""
            print(f"stopped; go on with: unipool demo --resume --out {out}{options}")
            raise typer.Exit(128 + stop.signal) from None

    @app.command()
    def generate(
        model: Annotated[Path, typer.Argument(help="run, checkpoint or Hugging Face folder")],
        prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
        max_new_tokens: Annotated[int, typer.Option(help="tokens to write", min=1)] = 200,
        temperature: Annotated[
            float, typer.Option(help="0: always the likeliest token", min=0, max=100)
        ] = 0.8,
        seed: Annotated[int, typer.Option(help="of the sampling", min=0)] = 0,
        device: Annotated[
            Literal["auto", "cpu", "cuda"], typer.Option(help="where to run")
        ] = "auto",
    ) -> None:
        """Write some text with a trained model."""
        from unipool.checkpoints import find_model
        from unipool.models.generation import generate_text
        from unipool.models.loading import load_model

        find_model(model)  # before the slow imports, so that a wrong path shows at once
        from unipool.models.loading import resolve_device

        loaded, text_tokenizer = load_model(model, resolve_device(device))
        print(generate_text(loaded, text_tokenizer, prompt, max_new_tokens, temperature, seed))

    app.command("eval")(evaluate)
    app.command()(probe)
    app.command()(analyze)
    app.command()(convert)
    app.command()(resize)

    @app.command("doctor")
    def doctor_command() -> None:
        """Say what is installed, test each op, and give the fix for what is wrong."""
        raise typer.Exit(_doctor.main([]))  # listed here for --help; `main` handles it itself


def _train(given: dict, resume: bool) -> None:
    """Run `unipool train` with the options `given` on the command line."""
    from unipool.errors import InputError

    out = given.get("out", TrainConfig.out)
    if resume:
        if not Path(out, "config.json").is_file():
            raise InputError(f"--resume: {out} holds no run")
        config = TrainConfig.load(Path(out, "config.json")).resumed_with(given | {"out": out})
    else:
        config = TrainConfig(**with_last_rate(given))

    from rich.console import Console

    from unipool.training.run import run_training

    console = Console()
    result = run_training(config, resume=resume, console=console)
    if result.validation is None:
        again = f"unipool train --resume --out {out}"
        console.print(f"stopped after step {result.step}; go on with: {again}", soft_wrap=True)
        raise typer.Exit(128 + result.signal)
    console.print(f"model: {Path(out, 'model')}", soft_wrap=True)
