"""The story of a run on one page: recipe -> model -> data -> train -> evaluate -> report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from peftcli import environment, output, planner
from peftcli import lock as locks
from peftcli.account import make_report
from peftcli.data.prepare import Prepared, prepare
from peftcli.data.splits import unseen_tokens
from peftcli.errors import CheckFailed, CheckpointError, DataError, PeftcliError
from peftcli.estimate import CHECK_ROWS, Estimate
from peftcli.evaluate import Evaluator, Scores
from peftcli.forecast import Forecast
from peftcli.interchange import hf_peft
from peftcli.kernels import fast
from peftcli.lock import Lock
from peftcli.methods import registry
from peftcli.methods.base import Context, Method, TrainingBatch
from peftcli.methods.kinds import new_modules, trains_base_weights
from peftcli.model.eight_bit import multiply_in_8_bits, refuse
from peftcli.model.load import Base, checkpoint_activations, load_base, open_base
from peftcli.plan import count_steps, flatten, identity, make_plan, resolved
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.render import dump_recipe
from peftcli.recipe.schema import Recipe
from peftcli.redact import redact
from peftcli.report import schema as rs
from peftcli.report.files import write_text_atomically
from peftcli.report.gates import refuse_unmeasured
from peftcli.report.metrics import MetricsWriter, read_metrics
from peftcli.report.progress import Progress as Display
from peftcli.report.text import size
from peftcli.report.write import hash_files, write_report
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Layout, Task
from peftcli.train import checkpoint as checkpoints
from peftcli.train.loop import Loop, load_trainable
from peftcli.train.memory import Peak, give_back, is_out_of_memory, keep_caches_small, reset_peak
from peftcli.train.optimizers import at_own_rate, build_optimizer
from peftcli.train.preview import training_batches
from peftcli.train.signals import Interrupted, StopRequest


@dataclass(frozen=True)
class Options:
    """What the command line says beyond the recipe.

    Attributes:
        locked: what the run has to be, or it does not begin; ``locked_at``: where that stands, for the message.
    """

    resume: bool = False
    overwrite: bool = False
    init_adapter: Path | None = None
    trust_remote_code: bool = False
    locked: Lock | None = None
    locked_at: Path = Path(locks.NAME)


def train(loaded: LoadedRecipe, display: Display, options: Options | None = None) -> rs.Report:
    """Run a recipe from beginning to end and return the report that was written.

    Raises:
        PeftcliError: with the cause; what was saved before stays. ``Interrupted`` after a signal.
    """
    options = options or Options()
    settings = loaded.recipe.train
    state = PartialState(cpu=not torch.cuda.is_available())
    environment.make_repeatable(settings.seed, deterministic=settings.deterministic, process=state.process_index)
    fast.switch(on=settings.fast_paths)
    keep_caches_small()
    reset_peak(state.device)
    folder = Path(loaded.recipe.output_dir)
    if not state.is_main_process:
        return _Run(loaded, display, options, folder, state, clear=lambda: None).story()
    claimed = output.OutputFolder(folder, resume=options.resume, overwrite=options.overwrite)
    with claimed, display:
        return _Run(loaded, display, options, folder, state, clear=claimed.clear).story()


class _Run:
    """One run: its parts, in the order in which they come to be."""

    def __init__(
        self, loaded: LoadedRecipe, display: Display, options: Options, folder: Path, state: PartialState, *, clear: Callable[[], None]
    ) -> None:
        """``clear`` takes an earlier run out of the folder; called once nothing of the new one can be refused any more."""
        self.loaded, self.recipe, self.display, self.options, self.folder, self.state, self.clear = (
            loaded,
            loaded.recipe,
            display,
            options,
            folder,
            state,
            clear,
        )
        self.method: Method[Any] = registry.get(self.recipe.method.name)(self.recipe.method)
        self.task: Task[Any] = tasks.make(self.recipe.task)
        self.peak = Peak(state.device, "loading")
        self.need: Estimate | None = None

    def _phase(self, phase: str, note: str | None = None) -> None:
        """A new phase begins, with what is free given back."""
        self.peak.enter(phase)
        give_back()
        if note is not None:
            self.display.note(note)

    def story(self) -> rs.Report:
        """Load, train, save, check, evaluate, report."""
        self.opened = open_base(
            self.recipe.base_model,
            device=self.state.device,
            base_dir=self.loaded.base_dir,
            trust_remote_code=self.options.trust_remote_code,
        )
        if self.recipe.train.frozen_products is not None:
            refuse(self.recipe.train.frozen_products, self.opened.dtype, self.state.device)
        self.display.note("reading the data")
        self.data = self._read()
        self._lock()
        self._plan_memory()
        self._phase("loading", "loading the base model")
        self.base = self._load()
        packed = self.task.packs(self.base.model, self.base.model.config.get_text_config().vocab_size, self._longest())
        self.layout = Layout(packed, self.base.tokenizer.pad_token_id, self.state.device)
        if self.task.has_reference:
            self.data = self._with_base()
        resumed = _find_checkpoint(self.folder, self.display) if self.options.resume else None
        before = None if resumed else self._measure_base()
        self._apply(resumed)
        self._phase("training")
        with StopRequest() as stop:
            loop = self._loop(stop, before, resumed)
            try:
                loop.run(resumed)
            except (PeftcliError, Interrupted) as error:
                self._report_unfinished(loop, error)
                raise
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                seen = Forecast(self.opened, self.task, self.data, 0)
                told = seen.ran_out(self.recipe, loop.progress.step + 1, checkpoints.newest(loop.folder)[0])
                self._report_unfinished(loop, told)
                raise told from error
            except BaseException:
                loop.close()
                raise
        self._take_best(loop)
        self._phase("saving and checking", "saving and checking")
        saved, check = self._save(loop)
        after = None
        if self.evaluator is not None:
            self._phase("evaluation", "evaluating the tuned model")
            after = self._scores(self.evaluator)
            loop.record(after.logged())
        loop.close()
        return self._report(loop, saved, check, after)

    def _plan_memory(self) -> None:
        """What to recompute, where the recipe limits the memory; refused before the model is loaded where nothing fits."""
        if self.recipe.train.memory_budget is not None:
            program = psutil.Process().memory_info().rss if self.state.device.type == "cpu" else 0
            self.need = Forecast(self.opened, self.task, self.data, program).need(self.recipe)
            self.display.note(f"memory: {self.need.plan}; the peak should be {size(self.need.total)}, during {self.need.moment}")

    def _load(self) -> Base:
        base = load_base(
            self.opened,
            auto_model=self.task.auto_model,
            head=self.task.head(),
            seed=self.recipe.train.seed,
            master_weights=self.method.caps.whole_model,
            keep_dense=self.method.needs_dense_weights(),
        )
        if base.anew:
            self.display.note(f"{', '.join(base.anew)} has no weights in {base.source.name} and starts anew")
        return base

    def _read(self) -> Prepared:
        recipe, opened = self.recipe, self.opened
        rows = self.task.rows(recipe.dataset, opened.tokenizer)
        limit = self.method.row_limit(opened.max_positions)
        data = prepare(rows, base_dir=self.loaded.base_dir, seed=recipe.train.seed, max_positions=limit)
        self.recipe = recipe.model_copy(update={"task": self.task.settle(rows)})
        refuse_unmeasured(recipe.expect, self.task.figures)
        self.display.audit(data.audit.to_dict())
        for note in data.audit.notes:
            self.display.warn(note)
        if unseen := unseen_tokens(data.train, opened.new_token_ids):
            names = ", ".join(opened.tokenizer.convert_ids_to_tokens(sorted(unseen)))
            raise DataError(f"base_model.new_tokens: {names} occurs in no training row, so its embedding would stay as it is")
        self.state.wait_for_everyone()
        return data

    def _lock(self) -> None:
        """What this run is made of; refused where it has to be something else."""
        options, locked = self.options, self.options.locked
        if locked is None and not self.state.is_main_process:
            return
        processes = self.state.num_processes
        self.lock = locks.make_lock(self.recipe, self.opened, self.data, processes, init_adapter=options.init_adapter)
        if locked is not None:
            locks.refuse(locked, self.lock, str(options.locked_at))

    def _longest(self) -> int:
        return max(max(split.lengths) for split in (self.data.train, self.data.eval) if split is not None)

    def _with_base(self) -> Prepared:
        """The rows with what the base alone makes of them."""
        self._phase("evaluation", "measuring the reference: the base model on all rows")
        mixed = self._computes_mixed(self.base.model)
        train, held_out = (
            None if split is None else self._evaluator(split, mixed=mixed).with_base(self.base.model)
            for split in (self.data.train, self.data.eval)
        )
        assert train is not None
        return replace(self.data, train=train, eval=held_out)

    def _measure_base(self) -> Scores | None:
        if self.data.eval is None or not self.recipe.eval.before:
            return None
        self._phase("evaluation", "evaluating the base model")
        self.bare = self.task.module(self.base.model)
        return self._scores(self._evaluator(self.data.eval, mixed=self._computes_mixed(self.base.model)))

    def _computes_mixed(self, model: torch.nn.Module) -> bool:
        """Whether products run in bfloat16 over float32 weights, by autocast."""
        return self.base.dtype == torch.bfloat16 and (self.method.caps.whole_model or trains_base_weights(model))

    def _apply(self, resumed: checkpoints.Checkpoint | None) -> None:
        """Put the method to work and prepare what Accelerate prepares."""
        recipe, base, method = self.recipe, self.base, self.method
        quantized = base.quantization is not None
        ctx = Context(
            recipe.train.seed,
            base.new_token_ids,
            quantized,
            encode=base.encode,
            fresh=base.fresh,
            dense_weights=base.dense_weights,
            batches=self._batches,
            resumed=resumed.method if resumed else {},
        )
        heads = [parameter for name in new_modules(base.model, ctx) for parameter in base.model.get_submodule(name).parameters()]
        self.model = cast(Any, method.apply(base.model, ctx))
        base.dense_weights.clear()
        if self.options.init_adapter is not None:
            start = hf_peft.read_adapter(_adapter_folder(self.options.init_adapter))
            hf_peft.load_tensors(self.model, method, start.tensors, start.folder / hf_peft.WEIGHTS)
        if recipe.train.frozen_products is not None:
            multiply_in_8_bits(self.model, recipe.train.frozen_products, next(self._batches()).forward)
        self.marks = output.fingerprints(self.model)
        self.clear()
        if self.need is not None:
            planner.apply(self.model, self.need.plan, enable=checkpoint_activations)
        elif recipe.train.gradient_checkpointing:
            checkpoint_activations(self.model)
        mixed = self._computes_mixed(self.model)
        self.accelerator = _accelerator(recipe, self.folder, mixed)
        self.bare = self.task.module(self.model)
        groups = method.param_groups(self.model, recipe.train.learning_rate, recipe.train.weight_decay)
        if recipe.train.head_learning_rate is not None:
            groups = at_own_rate(groups, heads, recipe.train.head_learning_rate)
        self.optimizer = build_optimizer(groups, recipe.train, self.accelerator.device)
        self.module = self.accelerator.prepare_model(self.bare)
        self.check_evaluator = self._evaluator(self.data.eval or self.data.train, mixed=mixed)
        self.evaluator = self.check_evaluator if self.data.eval is not None else None

    def _batches(self) -> Iterator[TrainingBatch]:
        """The training batches, for a method that looks at them before it starts."""
        plan = make_plan(self.recipe, self.data, self.state.num_processes)
        return training_batches(plan, self.data.train, self.task, self.layout)

    def _evaluator(self, split: Any, *, mixed: bool) -> Evaluator:
        return Evaluator(self.state, self.task, split, self.base.tokenizer, self.layout, self.recipe.eval.batch_size, mixed)

    def _scores(self, evaluator: Evaluator) -> Scores:
        options = self.recipe.eval
        return evaluator.scores(
            self.bare,
            generate=options.generate,
            max_new_tokens=options.max_new_tokens,
            limit=options.generate_limit,
            metrics=options.metrics,
        )

    def _loop(self, stop: StopRequest, before: Scores | None, resumed: checkpoints.Checkpoint | None) -> Loop:
        recipe, accelerator = self.recipe, self.accelerator
        plan = make_plan(recipe, self.data, accelerator.num_processes)
        total_steps = count_steps(recipe, plan)
        writer = None
        if accelerator.is_main_process:
            dtype = str(self.base.dtype).removeprefix("torch.")
            kept = resolved(self.loaded, self.recipe, dtype, self.folder)
            write_text_atomically(self.folder / "recipe.yaml", redact(dump_recipe(kept)))
            self._write_lock(resumed is not None)
            if self.data.skipped:
                lines = (json.dumps(skipped._asdict(), ensure_ascii=True) for skipped in self.data.skipped)
                (self.folder / "skipped.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
            last = resumed.progress.step if resumed else None
            writer = MetricsWriter(self.folder / "metrics.jsonl", append=resumed is not None, truncate_after_step=last)
        return Loop(
            accelerator=accelerator,
            method=self.method,
            task=self.task,
            module=self.module,
            model=self.model,
            optimizer=self.optimizer,
            split=self.data.train,
            plan=plan,
            settings=recipe.train,
            total_steps=total_steps,
            layout=replace(self.layout, share=self._shares(), grouped=self.state.device.type == "cpu"),
            evaluate=lambda: self._scores(self.evaluator).logged() if self.evaluator is not None else None,
            metrics=writer,
            display=self.display,
            folder=self.folder / "checkpoints",
            identity=identity(recipe, self.data, total_steps, accelerator.num_processes),
            stop=stop,
            before=asdict(before) if before is not None else None,
        )

    def _shares(self) -> bool:
        """Whether a beginning that a batch's rows share is computed once. On a GPU the kernel for variable lengths cannot."""
        on_cpu = self.layout.packed and self.state.device.type == "cpu" and self.recipe.train.fast_paths
        with self.accelerator.autocast():  # as in training: a trained head is float32 behind a body in bfloat16
            return on_cpu and self.task.shares(self.model, self.base.model.config.get_text_config().vocab_size)

    def _write_lock(self, resumed: bool) -> None:
        """A resumed run keeps the lock that it began with; bytes are only promised where both parts ran in the same environment."""
        path = self.folder / locks.NAME
        if not (resumed and path.is_file()):
            locks.write_lock(path, self.lock)
            return
        for line in locks.differences(locks.read_lock(path), self.lock):
            self.display.warn(f"the run began under another lock: {line}")

    def _take_best(self, loop: Loop) -> None:
        """Go back to the weights of the lowest held-out loss, where the recipe asks for it and the last ones are not the best."""
        progress = loop.progress
        if not self.recipe.train.load_best_model_at_end or self.evaluator is None or progress.best_loss is None:
            return
        final = self.evaluator.scores(self.bare).loss
        if final <= progress.best_loss:
            progress.best_loss, progress.best_step = final, progress.step
            return
        found = checkpoints.read(loop.folder / f"step-{progress.best_step}")
        load_trainable(loop.model, found.trainable)
        self.method.load_state(found.method)
        best = f"step {progress.best_step}, whose held-out loss {progress.best_loss:.4f}"
        self.display.warn(f"took the weights of {best} is below the last step's {final:.4f}")

    def _save(self, loop: Loop) -> tuple[Path | None, rs.LiveAdapterCheck | None]:
        """The main process writes the result and reads it back; the others wait."""
        self.state.wait_for_everyone()
        saved, check = None, None
        if self.state.is_main_process:
            saved = output.save_result(self.folder, self.model, self.method, self.task, self.base, self.recipe)
            measure = self.check_evaluator
            check = output.live_check(
                saved,
                self.model,
                self.method,
                self.marks,
                steps=loop.progress.step,
                loss=lambda: measure.scores(self.bare, rows=CHECK_ROWS, alone=True).loss,
            )
        self.state.wait_for_everyone()
        return saved, check

    def _report(self, loop: Loop, saved: Path | None, check: rs.LiveAdapterCheck | None, after: Scores | None) -> rs.Report:
        status: rs.Status = "stopped_early" if loop.progress.step < loop.total_steps else "completed"
        files = {}
        if saved is not None:
            written = [
                *(self.folder / name for name in ("recipe.yaml", locks.NAME, "metrics.jsonl")),
                *sorted(p for p in saved.iterdir() if p.is_file()),
            ]
            files = hash_files(self.folder, [path.relative_to(self.folder) for path in written])
        report = self._account(loop, status, after=after, check=check, files=files)
        self._write(report)
        if check is not None and not check.passed:
            raise CheckFailed(
                f"the live-adapter check failed for {saved}: {check.note or check.model_dump(exclude_defaults=True)}",
                hint=f"{self.folder / 'report.json'} holds the details; the weights are kept for inspection.",
            )
        return report

    def _report_unfinished(self, loop: Loop, error: BaseException) -> None:
        """A run that did not end well leaves a report too, without a result."""
        loop.close()
        interrupted = isinstance(error, Interrupted)
        self._write(self._account(loop, "interrupted" if interrupted else "failed", error=str(error)))

    def _account(self, loop: Loop, status: rs.Status, **more: Any) -> rs.Report:
        return make_report(self.recipe, self.base, self.data, loop, status=status, peak=self.peak, need=self.need, **more)

    def _write(self, report: rs.Report) -> None:
        if self.state.is_main_process:
            records = read_metrics(self.folder / "metrics.jsonl").records
            write_report(self.folder, report, records, (self.folder / "recipe.yaml").read_text(encoding="utf-8"), redact=redact)


def _accelerator(recipe: Recipe, folder: Path, mixed: bool) -> Accelerator:
    # Accelerate keeps the precision for the whole process; each run has its own.
    AcceleratorState._reset_state()
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


def _find_checkpoint(folder: Path, display: Display) -> checkpoints.Checkpoint:
    found, notes = checkpoints.newest(folder / "checkpoints")
    for note in notes:
        display.warn(f"passed over: {note}")
    if found is None:
        raise CheckpointError(
            f"{folder / 'checkpoints'} holds no whole checkpoint to resume from",
            hint="train.save_steps writes them; start without --resume.",
        )
    return found


def _adapter_folder(path: Path) -> Path:
    return path / "adapter" if (path / "adapter" / hf_peft.CONFIG).is_file() else path


__all__ = ["Options", "train"]
