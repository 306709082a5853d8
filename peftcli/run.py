"""The story of a run on one page: recipe -> model -> data -> train -> evaluate -> report."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from peftcli import environment, output
from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared, prepare
from peftcli.errors import CheckFailed, CheckpointError, TrainingError
from peftcli.evaluate import Evaluator, Scores, is_match
from peftcli.interchange import hf_peft
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import trains_base_weights
from peftcli.model.load import Base, load_base
from peftcli.model.task import CausalLM, supports_packing
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.redact import redact
from peftcli.recipe.render import dump_recipe
from peftcli.recipe.schema import Recipe
from peftcli.report import schema as rs
from peftcli.report.metrics import MetricsWriter, read_metrics
from peftcli.report.progress import Progress as Display
from peftcli.report.write import hash_files, write_report
from peftcli.train import checkpoint as checkpoints
from peftcli.train.loop import Loop, load_trainable
from peftcli.train.memory import peak_memory, reset_peak
from peftcli.train.optimizers import build_optimizer
from peftcli.train.signals import Interrupted, StopRequest

# Rows on which the model in memory and the model read back from disk are compared.
_CHECK_ROWS = 16
# Settings that may change when a run is resumed: they do not influence the weights.
_FREE = ("train.logging_steps", "train.save_steps", "train.save_total_limit", "train.report_to", "output_dir", "eval.")


@dataclass(frozen=True)
class Options:
    """What the command line says beyond the recipe."""

    resume: bool = False
    overwrite: bool = False
    init_adapter: Path | None = None
    trust_remote_code: bool = False


def train(loaded: LoadedRecipe, display: Display, options: Options | None = None) -> rs.Report:
    """Run a recipe from beginning to end and return the report that was written.

    Raises:
        PeftcliError: with the cause; what was saved before stays. ``Interrupted`` after a signal.
    """
    options = options or Options()
    recipe = loaded.recipe
    state = PartialState(cpu=not torch.cuda.is_available())
    environment.make_repeatable(recipe.train.seed, deterministic=recipe.train.deterministic, process=state.process_index)
    reset_peak(state.device)
    folder = Path(recipe.output_dir)
    if not state.is_main_process:
        return _run(loaded, display, options, folder, state)
    with output.OutputFolder(folder, resume=options.resume, overwrite=options.overwrite), display:
        return _run(loaded, display, options, folder, state)


def _run(loaded: LoadedRecipe, display: Display, options: Options, folder: Path, state: PartialState) -> rs.Report:
    recipe = loaded.recipe
    method: Method[Any] = registry.get(recipe.method.name)(recipe.method)
    display.note("loading the base model")
    base = load_base(
        recipe.base_model,
        device=state.device,
        base_dir=loaded.base_dir,
        trust_remote_code=options.trust_remote_code,
        master_weights=method.caps.whole_model,
    )
    display.note("reading the data")
    data = prepare(recipe.dataset, base.tokenizer, base_dir=loaded.base_dir, seed=recipe.train.seed, max_positions=base.max_positions)
    for note in data.audit.notes:
        display.warn(note)
    state.wait_for_everyone()
    plan = make_plan(recipe, data, state.num_processes)
    packed = supports_packing(base.model, base.model.config.get_text_config().vocab_size)
    resumed = _find_checkpoint(folder, display) if options.resume else None

    context = Context(recipe.train.seed, base.new_token_ids, base.quantization is not None)
    mixed = base.dtype == torch.bfloat16 and method.caps.whole_model
    before = _measure_base(recipe, base, data, packed, mixed, state, display) if resumed is None else None
    model = method.apply(base.model, context)
    if options.init_adapter is not None:
        start = hf_peft.read_adapter(_adapter_folder(options.init_adapter))
        hf_peft.load_tensors(model, method, start.tensors, start.folder / hf_peft.WEIGHTS)
    marks = output.fingerprints(model)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    mixed = base.dtype == torch.bfloat16 and trains_base_weights(model)

    accelerator = _accelerator(recipe, folder, mixed)
    task = CausalLM(model)
    groups = method.param_groups(model, recipe.train.learning_rate, recipe.train.weight_decay)
    optimizer = build_optimizer(groups, recipe.train, accelerator.device)
    module = accelerator.prepare_model(task)
    evaluator = None if data.eval is None else _evaluator(recipe, base, data.eval, packed, mixed, accelerator)
    total_steps = count_steps(recipe, plan)
    writer = None
    if accelerator.is_main_process:
        (folder / "recipe.yaml").write_text(redact(dump_recipe(resolved(loaded, base, folder))), encoding="utf-8")
        writer = MetricsWriter(folder / "metrics.jsonl", append=resumed is not None, truncate_after_step=resumed.progress.step if resumed else None)
    with StopRequest() as stop:
        loop = Loop(
            accelerator=accelerator,
            method=method,
            module=module,
            model=model,
            optimizer=optimizer,
            split=data.train,
            plan=plan,
            settings=recipe.train,
            total_steps=total_steps,
            packed=packed,
            pad_id=base.tokenizer.pad_token_id,
            evaluate=lambda: evaluator.scores(task).plain() if evaluator is not None else None,
            metrics=writer,
            display=display,
            folder=folder / "checkpoints",
            identity=identity(recipe, data, total_steps, accelerator.num_processes),
            stop=stop,
            before=asdict(before) if before is not None else None,
        )
        progress = loop.run(resumed)
    if recipe.train.load_best_model_at_end:
        _take_best(loop, progress, evaluator, task, display)

    display.note("saving and checking")
    accelerator.wait_for_everyone()
    check = None
    if accelerator.is_main_process:
        saved = output.save_result(folder, model, method, base.tokenizer, recipe, base.revision)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        alone = _evaluator(recipe, base, data.eval or data.train, packed, mixed, accelerator)
        check = output.live_check(saved, model, method, marks, steps=progress.step, loss=lambda: alone.scores(task, rows=_CHECK_ROWS, alone=True).loss)
    accelerator.wait_for_everyone()
    after = None
    if evaluator is not None:
        display.note("evaluating the tuned model")
        after = _scores(evaluator, task, recipe)
    if writer is not None:
        writer.close()
    accelerator.end_training()
    report = make_report(recipe, base, data, plan, loop, progress, after, check, resumed)
    if accelerator.is_main_process:
        files = sorted(p for p in [folder / "recipe.yaml", folder / "metrics.jsonl", *saved.iterdir()] if p.is_file())
        report = report.model_copy(update={"files": hash_files(folder, [path.relative_to(folder) for path in files])})
        records = read_metrics(folder / "metrics.jsonl").records
        write_report(folder, report, records, (folder / "recipe.yaml").read_text(encoding="utf-8"), redact=redact)
        if check is not None and not check.passed:
            raise CheckFailed(
                f"the live-adapter check failed for {saved}: {check.note or check.model_dump(exclude_defaults=True)}",
                hint=f"{folder / 'report.json'} holds the details; the weights are kept for inspection.",
            )
    return report


def make_plan(recipe: Recipe, data: Prepared, processes: int) -> Plan:
    """The order of the rows for the whole run."""
    settings = recipe.train
    return Plan(
        lengths=data.train.lengths,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        accumulation=settings.gradient_accumulation_steps,
        processes=processes,
        seed=settings.seed,
        shuffle=recipe.dataset.shuffle,
        group_by_length=recipe.dataset.group_by_length,
    )


def count_steps(recipe: Recipe, plan: Plan) -> int:
    """Optimizer steps of the run: ``max_steps``, else those of the epochs, a fraction of an epoch rounded up."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    whole, rest = int(recipe.train.epochs), recipe.train.epochs - int(recipe.train.epochs)
    steps = sum(len(plan.epoch(epoch)) for epoch in range(whole))
    return max(1, steps + math.ceil(rest * len(plan.epoch(whole)))) if rest else steps


def identity(recipe: Recipe, data: Prepared, total_steps: int, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with, flat, by dotted name."""
    flat = {key: value for key, value in flatten(recipe).items() if not key.startswith(_FREE)}
    files = {f"file {path}": digest for path, digest in data.files}
    return {**flat, **files, "processes": processes, "total steps": total_steps}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted name."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            flat[path] = value

    walk(recipe.model_dump(mode="json"), "")
    return flat


def resolved(loaded: LoadedRecipe, base: Base, folder: Path) -> Recipe:
    """The recipe as the run's folder keeps it: with the dtype that the machine decided, and local paths as seen from there."""
    recipe = loaded.recipe

    def seen(path: str | None) -> str | None:
        if path is None or Path(path).is_absolute() or not loaded.resolve_path(path).exists():
            return path
        return os.path.relpath(loaded.resolve_path(path).resolve(), folder.resolve())

    def sources(section: Any) -> Any:
        return [s.model_copy(update={"path": seen(s.path)}) for s in section] if section else section

    model = recipe.base_model.model_copy(update={"dtype": str(base.dtype).removeprefix("torch."), "name": seen(recipe.base_model.name)})
    rows = recipe.dataset
    dataset = rows.model_copy(update={"train": sources(rows.train), "eval": sources(rows.eval), "chat_template": seen(rows.chat_template)})
    return recipe.model_copy(update={"base_model": model, "dataset": dataset})


def _accelerator(recipe: Recipe, folder: Path, mixed: bool) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if mixed else "no",
        log_with=list(recipe.train.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if recipe.train.report_to:
        accelerator.init_trackers("peftcli", config={k: v for k, v in flatten(recipe).items() if isinstance(v, (int, float, str, bool))})
    return accelerator


def _evaluator(recipe: Recipe, base: Base, split: Any, packed: bool, mixed: bool, accelerator: Any) -> Evaluator:
    return Evaluator(accelerator, split, base.tokenizer, packed, recipe.eval.batch_size, mixed)


def _scores(evaluator: Evaluator, task: CausalLM, recipe: Recipe) -> Scores:
    options = recipe.eval
    return evaluator.scores(task, generate=options.generate, max_new_tokens=options.max_new_tokens, limit=options.generate_limit)


def _measure_base(recipe: Recipe, base: Base, data: Prepared, packed: bool, mixed: bool, state: PartialState, display: Display) -> Scores | None:
    if data.eval is None or not recipe.eval.before:
        return None
    display.note("evaluating the base model")
    return _scores(_evaluator(recipe, base, data.eval, packed, mixed, Accelerator(cpu=state.device.type == "cpu")), CausalLM(base.model), recipe)


def _find_checkpoint(folder: Path, display: Display) -> checkpoints.Checkpoint:
    found, notes = checkpoints.newest(folder / "checkpoints")
    for note in notes:
        display.warn(f"passed over: {note}")
    if found is None:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no whole checkpoint to resume from", hint="train.save_steps writes them; start without --resume.")
    return found


def _adapter_folder(path: Path) -> Path:
    return path / "adapter" if (path / "adapter" / hf_peft.CONFIG).is_file() else path


def _take_best(loop: Loop, progress: checkpoints.Progress, evaluator: Evaluator | None, task: CausalLM, display: Display) -> None:
    """Go back to the weights of the lowest held-out loss, unless the last ones are the best."""
    if evaluator is None or progress.best_step is None:
        return
    final = evaluator.scores(task).loss
    if progress.best_loss is not None and final <= progress.best_loss:
        progress.best_loss, progress.best_step = final, progress.step
        return
    best = checkpoints.read(loop.folder / f"step-{progress.best_step}")
    load_trainable(loop.model, best.trainable)
    display.warn(f"took the weights of step {progress.best_step}, whose held-out loss {progress.best_loss:.4f} is below the last step's {final:.4f}")


def make_report(
    recipe: Recipe,
    base: Base,
    data: Prepared,
    plan: Plan,
    loop: Loop,
    progress: checkpoints.Progress,
    after: Scores | None,
    check: rs.LiveAdapterCheck | None,
    resumed: checkpoints.Checkpoint | None,
) -> rs.Report:
    """Everything that is known of the run, as the report's schema wants it."""
    accelerator, before = loop.accelerator, progress.before
    memory, kind = peak_memory(accelerator.device)
    seconds = max(progress.seconds, 1e-9)
    trainable = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    stopped = progress.step < loop.total_steps
    return rs.Report(
        status="stopped_early" if stopped else "completed",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=rs.ModelInfo(
            name=recipe.base_model.name,
            revision=base.revision,
            sha256=base.source.sha256(),
            dtype=str(base.dtype).removeprefix("torch."),
            quantization=base.quantization,
            architecture=type(base.model).__name__,
            parameters=base.parameters,
            trainable_parameters=trainable,
        ),
        method=rs.MethodInfo(
            name=recipe.method.name, options={k: v for k, v in recipe.method.model_dump(mode="json").items() if k != "name"}, paper=loop.method.paper
        ),
        data=rs.DataInfo(
            train=rs.SplitInfo(**asdict(data.train.counts)),
            eval=rs.SplitInfo(**asdict(data.eval.counts)) if data.eval is not None else None,
            files=[rs.DataFile(path=path, sha256=digest) for path, digest in data.files],
            batch_order_sha256=plan.digest(progress.epoch + 1),
        ),
        train=rs.TrainInfo(
            steps=progress.step,
            epochs=round(progress.epoch + progress.position / max(1, len(plan.epoch(progress.epoch))), 4),
            loss_first=progress.loss_first,
            loss_last=progress.loss_last,
            loss_best=progress.best_loss,
            best_step=progress.best_step,
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / seconds,
            supervised_tokens_per_second=progress.supervised_tokens / seconds,
            peak_memory_bytes=memory,
            peak_memory_kind="allocated" if kind == "allocated" else "resident",
            world_size=accelerator.num_processes,
            batch_order=f"{'shuffled' if plan.shuffle else 'file order'}, seed {plan.seed}",
            optimizer=recipe.train.optimizer,
            resumed_from=resumed.folder.name if resumed else None,
            fast_paths=["packed rows", "loss on supervised positions only"] if loop.packed else [],
        ),
        eval_before=eval_info(before) if before else None,
        eval=eval_info(asdict(after)) if after else None,
        examples=_examples(recipe, data, before, after),
        environment=environment.describe(accelerator.device, deterministic=recipe.train.deterministic),
        checks=rs.Checks(label_audit=data.audit.to_dict(), live_adapter=check),
        notes=list(data.audit.notes),
    )


def eval_info(scores: dict[str, Any]) -> rs.EvalInfo:
    """The report's form of :class:`Scores` (as a plain dict, which is how checkpoints keep it)."""
    return rs.EvalInfo(
        **{k: scores[k] for k in ("loss", "perplexity", "token_accuracy", "supervised_tokens", "rows", "exact_match", "seconds")},
        intervals={k: (v[0], v[1]) for k, v in scores["intervals"].items()},
        generated=len(scores["answers"]) or None,
    )


def _examples(recipe: Recipe, data: Prepared, before: dict[str, Any] | None, after: Scores | None) -> list[rs.Example]:
    if after is None or not after.answers or data.eval is None:
        return []
    examples = []
    for index, item in enumerate(data.eval.generation[: len(after.answers)][: recipe.eval.examples]):
        old = before["answers"][index] if before and index < len(before["answers"]) else None
        new = after.answers[index]
        examples.append(
            rs.Example(
                prompt=item.prompt,
                reference=item.reference,
                before=old,
                after=new,
                correct_before=None if old is None else is_match(old, item.reference),
                correct_after=is_match(new, item.reference),
            )
        )
    return examples


__all__ = ["Interrupted", "Options", "TrainingError", "train"]
