"""The command line. Nothing here imports torch before a command needs it, so ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli import __version__, collector, ending, launch
from peftcli import cli_repeat as repeat
from peftcli.cli_options import (
    BaseModel,
    InitAdapter,
    Json,
    Overrides,
    Processes,
    RecipePath,
    RemoteCode,
    ResultPath,
    ResultPaths,
)

app = typer.Typer(
    name="peftcli",
    help="Fine-tune language models from YAML recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 1 unexpected error, 2 recipe or usage, 3 data, 4 model, 5 training, 6 out of memory, "
    "7 checkpoint or adapter file, 8 failed check, 9 folder in use, 10 failed gate, 11 not repeatable, 130/143 interrupted.",
)


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
    init_adapter: InitAdapter = None,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse to start where anything differs from RECIPE's lock.")] = False,
    processes: Processes = 1,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train what RECIPE says and write weights and a report."""
    from peftcli.recipe import load_recipe

    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    loaded = load_recipe(recipe, overrides or [])
    if processes > 1 and not launch.inside():
        raise typer.Exit(launch.spawn(processes))
    with collector.paused():
        from peftcli.lock import read_lock
        from peftcli.report.progress import make_progress
        from peftcli.run import Options
        from peftcli.run import train as run

    main_process = launch.rank() == 0
    display = make_progress(("json" if json else "auto") if main_process else "none")
    lock = recipe.with_suffix(".lock")
    held = read_lock(lock) if locked else None
    report = run(loaded, display, Options(resume, overwrite, init_adapter, trust_remote_code, held, lock))
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
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Measures of generated answers, such as rouge,bleu; default: the recipe's.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first N rows, or examples of each task.", show_default=False)
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Measure the base model too, and test the difference.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks of lm-evaluation-harness in place of the rows, such as hellaswag,gsm8k.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="With --tasks: examples before each question.", show_default=False)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="With --tasks: a folder with task files of your own.", show_default=False)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="With --tasks: put the questions into the chat template.")
    ] = False,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a run's result, or any PEFT adapter, on held-out rows."""
    if tasks is None and (num_fewshot is not None or include_path is not None or apply_chat_template):
        raise typer.BadParameter("--num-fewshot, --include-path and --apply-chat-template go with --tasks")
    if tasks is not None and (data or metrics or generate is not None):
        raise typer.BadParameter("--tasks takes the place of --data, --metrics and --generate")
    from peftcli.commands import evaluate as command
    from peftcli.commands.harness import Harness

    asked = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    harness = Harness(asked, num_fewshot, include_path, apply_chat_template) if tasks is not None else None
    command.run(
        result,
        data=data,
        base_model=base_model,
        quantization=quantization,
        dtype=dtype,
        generate=generate,
        metrics=metrics,
        limit=limit,
        compare_base=compare_base,
        harness=harness,
        json=json,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def merge(
    results: ResultPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is written.", show_default=False)],
    combine: Annotated[
        str | None,
        typer.Option(
            "--combine",
            help="How several become one: linear (weighted sum of the changes they make to each weight, exactly; the default), "
            "ties (large entries only, a sign elected for each place), dare (random entries, scaled up), "
            "svd (the sum, cut to a rank). As adapters these are PEFT's cat, ties_svd, dare_linear_svd and svd; PEFT's `linear` "
            "averages LoRA's factors instead, which is no sum of the changes.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="One for each, such as 0.7,0.3; default: equal, summing to 1 (ties: 1).", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of the entries that ties (default 0.2) and dare (0.5) keep.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Rank for svd and --as adapter; default: the largest of the LoRAs'.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of what dare drops; default 0.", show_default=False)] = None,
    form: Annotated[
        str, typer.Option("--as", help="model: folded into the base. adapter: one LoRA for peft, exact where it can be, and it says so.")
    ] = "model",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16; default: that of the base.", show_default=False)
    ] = None,
    base_model: BaseModel = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Of the base: nf4, fp4, int8 or none; default: the run's.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fold an adapter into its base, or combine several, and prove that what is written computes the same."""
    alone = len(results) == 1 and form == "model" and (combine, weights, density, rank, seed) == (None,) * 5
    if alone:
        from peftcli.commands import merge as command

        command.run(
            results[0],
            output,
            dtype=dtype,
            base_model=base_model,
            quantization=quantization,
            overwrite=overwrite,
            json=json,
            trust_remote_code=trust_remote_code,
        )
        return
    from peftcli.commands import combine as several

    several.run(
        results,
        output,
        weights=weights,
        rule=combine,
        density=density,
        rank=rank,
        seed=seed,
        form=form,
        dtype=dtype,
        base_model=base_model,
        quantization=quantization,
        overwrite=overwrite,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def export(
    result: ResultPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    form: Annotated[
        str, typer.Option("--format", help="adapters: AdapterHub's library (bottleneck adapters); peft: Hugging Face PEFT.")
    ] = "adapters",
    name: Annotated[str, typer.Option("--name", help="The adapter's name in AdapterHub's files.")] = "peftcli",
    base_model: BaseModel = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write an adapter in another library's layout. Runs and adapters of AdapterHub's library are read as they are."""
    from peftcli.commands import export as command

    command.run(result, output, form=form, name=name, base_model=base_model, overwrite=overwrite, trust_remote_code=trust_remote_code)


for command in (repeat.lock, repeat.verify, repeat.compare):
    app.command()(command)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, json: Json = False, trust_remote_code: RemoteCode = False) -> None:
    """Validate RECIPE, count, estimate memory and show what would be learned, without training."""
    from peftcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from peftcli.commands import check as command

    command.run(loaded, json=json, trust_remote_code=trust_remote_code)


data_app = typer.Typer(help="Look at a recipe's rows as the model sees them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("show")
def data_show(
    recipe: RecipePath,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option("--split", help="train or eval.")] = "train",
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many, from the first.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=1, help="This one alone.", show_default=False)] = None,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Render rows exactly as the model sees them, with what is learned coloured."""
    from peftcli.recipe import load_recipe

    if split not in ("train", "eval"):
        raise typer.BadParameter(f"--split: {split!r} is neither train nor eval")
    loaded = load_recipe(recipe, overrides or [])
    from peftcli.commands import data as command

    command.show(loaded, split=split, rows=rows, row=row, json=json, trust_remote_code=trust_remote_code)


@data_app.command("stats")
def data_stats(recipe: RecipePath, overrides: Overrides = None, json: Json = False, trust_remote_code: RemoteCode = False) -> None:
    """Lengths, truncation, padding waste, the share that is learned, duplicates and leakage."""
    from peftcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from peftcli.commands import data as command

    command.stats(loaded, json=json, trust_remote_code=trust_remote_code)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Explain this method.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Try every method on tiny models now; takes half a minute.")] = False,
    json: Json = False,
) -> None:
    """List the fine-tuning methods with what each was seen to do, or explain one."""
    from peftcli.commands import methods as command

    command.run(name, live=probe, json=json)


@app.command()
def init(
    path: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Recipe to write; default: recipe.yaml.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Base model.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option("--data", help="Training rows.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option("--method", help="Fine-tuning method.", show_default=False)] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What a run may take, such as 24GB; default: what is free.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The same as FILE.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe; with --model and --data, one that fits the model, the rows and the machine, and why."""
    from peftcli.commands import init as command

    if path is not None and output is not None:
        raise typer.BadParameter("FILE and --output exclude each other")
    target = path or output or Path("recipe.yaml")
    command.run(target, model=model, data=data, method=method, memory=memory, overwrite=overwrite, json=json)


@app.command()
def chat(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="Folders of runs or adapters of one base; the first answers.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="One more, under a name of your own.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Let each answer this, and exit.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    base_model: BaseModel = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Of the base: nf4, fp4, int8 or none; default: the run's.", show_default=False)
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to tuned models; /help lists what switches between adapters of one base, which is loaded once."""
    from peftcli.commands import chat as command

    command.run(
        results or [],
        adapter or [],
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        base_model=base_model,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )


def _finish(report: Any, folder: Path, json: bool) -> None:
    from peftcli.report.gates import refuse

    if json:
        from peftcli.report.write import report_text

        typer.echo(report_text(report), nl=False)
    else:
        from rich.console import Console

        from peftcli.report.console import print_summary

        print_summary(report, Console(), folder)
    refuse(report.gates)


def main() -> None:
    """Run the command line; a user's mistake ends in one message and a documented exit code, never in a traceback."""
    launch.follow_launcher()
    ending.run(app)


if __name__ == "__main__":
    main()
