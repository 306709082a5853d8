"""The command line. Nothing here imports torch before a command needs it, so ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from peftcli import __version__
from peftcli.errors import OutOfMemoryError, PeftcliError

app = typer.Typer(
    name="peftcli",
    help="Fine-tune language models from YAML recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 1 unexpected error, 2 recipe or usage, 3 data, 4 model, 5 training, 6 out of memory, "
    "7 checkpoint or adapter file, 8 failed check, 9 folder in use, 130/143 interrupted.",
)

Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs to standard output.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override recipe values, such as train.learning_rate=1e-4.", show_default=False),
]
ResultPath = Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.", show_default=False)]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Base model, when it is not where the run or adapter says.", show_default=False)
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; needs a pinned base_model.revision.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"peftcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune language models from YAML recipes."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")] = False,
    init_adapter: Annotated[
        Path | None, typer.Option("--init-adapter", help="Start from this adapter's weights.", show_default=False)
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, max=1024, help="Processes on this machine (gloo on the CPU, NCCL on GPUs).")
    ] = 1,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train what RECIPE says and write weights and a report."""
    from peftcli.recipe import load_recipe

    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    loaded = load_recipe(recipe, overrides or [])
    from peftcli import launch

    if processes > 1 and not launch.inside():
        raise typer.Exit(launch.spawn(processes))
    from peftcli.report.progress import make_progress
    from peftcli.run import Options
    from peftcli.run import train as run

    main_process = launch.rank() == 0
    display = make_progress(("json" if json else "auto") if main_process else "none")
    report = run(loaded, display, Options(resume, overwrite, init_adapter, trust_remote_code))
    if main_process:
        _finish(report, Path(loaded.recipe.output_dir), json)


@app.command("eval")
def evaluate(
    result: ResultPath,
    data: Annotated[list[str] | None, typer.Option("--data", help="Held-out rows; default: the recipe's own.", show_default=False)] = None,
    base_model: BaseModel = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="nf4, fp4 or int8; default: the recipe's.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 or bfloat16; default: the recipe's.", show_default=False)
    ] = None,
    generate: Annotated[
        bool | None, typer.Option("--generate/--no-generate", help="Also generate answers; default: the recipe's.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows.", show_default=False)] = None,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a run's result, or any PEFT adapter, on held-out rows."""
    from peftcli.commands import evaluate as command

    command.run(
        result,
        data=data,
        base_model=base_model,
        quantization=quantization,
        dtype=dtype,
        generate=generate,
        limit=limit,
        json=json,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def merge(
    result: ResultPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16; default: that of the base.", show_default=False)
    ] = None,
    base_model: BaseModel = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fold an adapter into its base and prove that the merged model computes the same."""
    from peftcli.commands import merge as command

    command.run(result, output, dtype=dtype, base_model=base_model, overwrite=overwrite, json=json, trust_remote_code=trust_remote_code)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, json: Json = False, trust_remote_code: RemoteCode = False) -> None:
    """Validate RECIPE, count, estimate memory and show what would be learned, without training."""
    from peftcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from peftcli.commands import check as command

    command.run(loaded, json=json, trust_remote_code=trust_remote_code)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Explain this method.")] = None,
    json: Json = False,
) -> None:
    """List the fine-tuning methods, or explain one."""
    from peftcli.commands import methods as command

    command.run(name, json=json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="Recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Base model.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option("--data", help="Training rows.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option("--method", help="Fine-tuning method.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from peftcli.commands import init as command

    command.run(path, model=model, data=data, method=method, overwrite=overwrite)


@app.command()
def chat(
    result: ResultPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and exit.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    base_model: BaseModel = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to a tuned model."""
    from peftcli.commands import chat as command

    command.run(
        result,
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        base_model=base_model,
        trust_remote_code=trust_remote_code,
    )


def _finish(report: Any, folder: Path, json: bool) -> None:
    if json:
        from peftcli.report.write import report_text

        typer.echo(report_text(report), nl=False)
        return
    from rich.console import Console

    from peftcli.report.console import print_summary

    print_summary(report, Console(), folder)


def _fail(error: PeftcliError) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    from peftcli.recipe.redact import redact

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), redact(error.message)))
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), redact(error.hint)))
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line; a user's mistake ends in one message and a documented exit code, never in a traceback."""
    try:
        app()
    except PeftcliError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        _fail(_out_of_memory())
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail(_out_of_memory())
        if isinstance(error, RuntimeError) and "deterministic" in str(error):
            _fail(PeftcliError(str(error).splitlines()[0], hint="set train.deterministic=false to allow it."))
        raise
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"{error}\nhint: --resume goes on from there.\n")
        sys.exit(code)


def _out_of_memory() -> OutOfMemoryError:
    return OutOfMemoryError(
        "memory ran out",
        hint="lower train.batch_size (and raise train.gradient_accumulation_steps), lower dataset.max_length, "
        "set train.gradient_checkpointing=true, or base_model.quantization=nf4; `peftcli check RECIPE` estimates the need.",
    )


if __name__ == "__main__":
    main()
