"""The training loop. It knows methods and tasks only through their interfaces and names none.

The loss of an optimizer step is the sum of its units' losses (tokens, or rows where each is judged as a whole) over the number
of its units, counted over all accumulation steps and processes. The counts are known from the plan, so no process has to ask another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftcli.data.batching import Plan, StepPlan
from peftcli.data.splits import Split
from peftcli.errors import CheckpointError, TrainingError
from peftcli.methods.base import Method, Tick
from peftcli.methods.kinds import trainable_state
from peftcli.recipe.schema import TrainSection
from peftcli.report.metrics import MetricsWriter
from peftcli.report.progress import Progress as Display
from peftcli.tasks.base import Layout, Task
from peftcli.train import checkpoint as checkpoints
from peftcli.train.figures import Figures, Told, defers
from peftcli.train.memory import Heap, give_back, peak_memory
from peftcli.train.optimizers import learning_rate_factor
from peftcli.train.signals import Interrupted, StopRequest


@dataclass
class Loop:
    """Everything a run needs, put together by ``peftcli.run``.

    Attributes:
        task: what is learned. ``module``: its prepared module; ``model``: the unwrapped model inside it.
        layout: how rows become tensors.
        evaluate: returns the held-out metrics of the model as it is, ``loss`` among them, or ``None``.
        progress: where the run stands, also after it failed. ``resumed_from``: name of the checkpoint that it went on from.
        identity: what a resumed run must share with the checkpoint (recipe, data, world size); differences are refused.
    """

    accelerator: Accelerator
    method: Method[Any]
    task: Task[Any]
    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    split: Split
    plan: Plan
    settings: TrainSection
    total_steps: int
    layout: Layout
    evaluate: Callable[[], Mapping[str, Any] | None]
    metrics: MetricsWriter | None
    display: Display
    folder: Path
    identity: dict[str, Any]
    stop: StopRequest
    before: dict[str, Any] | None = None
    progress: checkpoints.Progress = field(default_factory=checkpoints.Progress)
    resumed_from: str | None = None
    _heap: Heap = field(default_factory=Heap, init=False, repr=False)
    _pending: Figures | None = field(default=None, init=False, repr=False)
    _told: Told | None = field(default=None, init=False, repr=False)

    def run(self, resumed: checkpoints.Checkpoint | None = None) -> checkpoints.Progress:
        """Train to the end and return where it stands.

        Raises:
            TrainingError: the loss or the gradient is not a number; no step was taken on it.
            Interrupted: a signal asked for it; a checkpoint was written first.
        """
        progress = self._restore(resumed) if resumed else checkpoints.Progress(identity=self.identity, before=self.before)
        self.progress, self.resumed_from = progress, resumed.folder.name if resumed else None
        self.display.start(self.total_steps, progress.step)
        self.module.train()
        clock = time.perf_counter()
        peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        while progress.step < self.total_steps:
            for step in itertools.islice(self.plan.epoch(progress.epoch), progress.position, None):
                factor = learning_rate_factor(progress.step + 1, self.total_steps, self.settings)
                for group, peak in zip(self.optimizer.param_groups, peak_lrs, strict=True):
                    group["lr"] = peak * factor
                supervised = sum(self.split.units(row) for row in step.rows)
                self._step(step, supervised, progress)
                last = progress.step == self.total_steps
                due = self._due(self.settings.logging_steps, progress.step) or progress.step == 1 or last
                if due or self._due(self.settings.eval_steps, progress.step) or self._due(self.settings.save_steps, progress.step):
                    self._settle()
                progress.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                self._log(progress, due=due)
                improved = self._evaluate(progress) if self._due(self.settings.eval_steps, progress.step) and not last else False
                patience = self.settings.early_stopping_patience
                if patience is not None and progress.evaluations_without_gain >= patience:
                    self.display.warn(f"stopped early at step {progress.step}: no gain in {patience} evaluations")
                    return progress
                asked = self.stop.requested(self.accelerator)
                wanted = self._due(self.settings.save_steps, progress.step) or (improved and self.settings.load_best_model_at_end)
                if (wanted and not last) or asked:
                    self.save(progress)
                if asked:
                    raise Interrupted(self.stop.signal, self.folder / f"step-{progress.step}")
                clock = time.perf_counter()
                if last:
                    break
            else:
                progress.epoch, progress.position = progress.epoch + 1, 0
        return progress

    def _step(self, step: StepPlan, supervised: int, progress: checkpoints.Progress) -> None:
        """One optimizer step. Its figures are read before it is taken, on a GPU before the next one is."""
        accelerator, share = self.accelerator, step.shares[self.accelerator.process_index]
        rows = step.rows
        # DDP averages gradients over the processes; the factor turns its mean back into the sum.
        scale = accelerator.num_processes / max(1, supervised)
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        parts: dict[str, torch.Tensor] = {}
        batches = [group for micro in share for group in self.task.groups(micro, self._widths, self.layout)]
        for index, micro in enumerate(batches):
            self._heap.before_batch(sum(self.plan.lengths[row] for row in micro))
            batch = self.task.batch(self.split, micro or step.rows[:1], self.layout, silent=not micro)
            final = index == len(batches) - 1
            with contextlib.nullcontext() if final else accelerator.no_sync(self.module):
                loss = self.method.loss(self.module, batch)
                accelerator.backward(loss.total * scale)
            total += loss.total.detach()
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + value.detach().double()
        tick = Tick(progress.step + 1, self.total_steps, progress.epoch)
        self.method.before_step(self.model, tick)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        self._settle()
        summed = accelerator.reduce(total, reduction="sum")
        others = accelerator.reduce(torch.stack([*parts.values()]), reduction="sum") if parts else None
        self._pending = Figures(progress.step + 1, rows, supervised, total, norm, summed, [*parts], others)
        if defers(self.optimizer, accelerator.device):
            self.optimizer.found_inf = self._pending.broken.float()  # type: ignore[attr-defined]
        else:
            self._settle()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.model, tick)
        progress.step += 1
        progress.position += 1
        progress.tokens += sum(self.plan.lengths[row] for row in rows)
        progress.supervised_tokens += supervised

    @functools.cached_property
    def _widths(self) -> tuple[Sequence[int], ...]:
        return self.split.widths

    def _settle(self) -> None:
        """Read the figures that are on their way, and count them.

        Raises:
            TrainingError: they are not numbers; no step was taken on them.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._told = told = pending.told()
        if not (math.isfinite(told.norm) and math.isfinite(told.loss)):
            rows = pending.rows
            raise TrainingError(
                f"step {pending.step}: the {'gradient' if math.isfinite(told.loss) else 'loss'} is not a number; no step was taken. "
                f"Rows: {', '.join(self.split.origins[row] for row in rows[:4])}{', ...' if len(rows) > 4 else ''}",
                hint=f"lower train.learning_rate, look at those rows, or use dtype float32. {self._last_good()}",
            )
        progress = self.progress
        progress.window_tokens += pending.units
        progress.window_loss += told.total
        for name, value in told.parts.items():
            progress.window_parts[name] = progress.window_parts.get(name, 0.0) + value

    def _log(self, progress: checkpoints.Progress, *, due: bool) -> None:
        self.display.advance(progress.step)
        if not due or self._told is None:
            return
        loss = progress.window_loss / max(1, progress.window_tokens)
        progress.loss_first = loss if progress.loss_first is None else progress.loss_first
        progress.loss_last = loss
        means = {name: value / max(1, progress.window_tokens) for name, value in progress.window_parts.items()}
        progress.window_loss, progress.window_tokens, progress.window_parts = 0.0, 0, {}
        record = {
            "step": progress.step,
            "epoch": self._epochs(),
            "loss": loss,
            **means,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self._told.norm,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised_tokens,
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "peak_memory_bytes": peak_memory(self.accelerator.device)[0],
            "seconds": round(progress.seconds, 3),
            **self.method.metrics(self.model),
        }
        if self.metrics is not None:
            self.metrics.write(record)
        self.accelerator.log({f"train/{k}": v for k, v in record.items() if k not in ("step",)}, step=progress.step)
        self.display.step(record)

    def _epochs(self) -> float:
        """Epochs that are done, with the fraction of the current one."""
        progress = self.progress
        return round(progress.epoch + progress.position / max(1, len(self.plan.epoch(progress.epoch))), 4)

    def _evaluate(self, progress: checkpoints.Progress) -> bool:
        """Evaluate, log, keep count of gains; whether this is the best so far."""
        give_back()
        result = self.evaluate()
        give_back()
        self.module.train()
        return result is not None and self.record(result)

    def record(self, result: Mapping[str, Any]) -> bool:
        """Log held-out metrics of the model as it is now, and their ``intervals``; whether its loss is the lowest so far."""
        progress = self.progress
        record = {"step": progress.step, "epoch": self._epochs(), **{f"eval_{k}": v for k, v in result.items()}}
        if self.metrics is not None:
            self.metrics.write(record)
        self.accelerator.log({f"eval/{k}": v for k, v in result.items() if k != "intervals"}, step=progress.step)
        self.display.evaluation(record)
        gained = progress.best_loss is None or result["loss"] < progress.best_loss - self.settings.early_stopping_threshold
        if gained:
            progress.best_loss, progress.best_step, progress.evaluations_without_gain = result["loss"], progress.step, 0
        else:
            progress.evaluations_without_gain += 1
        return gained

    def save(self, progress: checkpoints.Progress) -> None:
        """Write a checkpoint, then read it back and compare it with what is in memory."""
        self._settle()
        accelerator = self.accelerator
        prepare = checkpoints.stage if accelerator.is_main_process else checkpoints.staged
        aside = prepare(self.folder, progress.step)
        accelerator.wait_for_everyone()
        checkpoints.write_rng(aside, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            trainable = trainable_state(self.model)
            path = checkpoints.commit(
                aside,
                progress=progress,
                trainable=trainable,
                optimizer=self.optimizer,
                method=self.method.state(),
                keep=self.settings.save_total_limit,
                protect=progress.best_step,
            )
            again = checkpoints.read(path)
            wrong = [
                name
                for name, p in trainable.items()
                if name not in again.trainable or not torch.equal(again.trainable[name], p.detach().cpu())
            ]
            if wrong or len(again.trainable) != len(trainable):
                raise CheckpointError(f"{path}: what was written is not what was trained: {', '.join(wrong[:3])}")
        accelerator.wait_for_everyone()

    def close(self) -> None:
        """No more lines will be written."""
        if self.metrics is not None:
            self.metrics.close()
        self.accelerator.end_training()

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Progress:
        saved, now = checkpoint.progress.identity, self.identity
        changed = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
        if changed:
            differences = "; ".join(f"{key}: was {saved.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise CheckpointError(
                f"{checkpoint.folder} belongs to another run: {differences}",
                hint="resume with the recipe and data of that run, or start anew in another output_dir.",
            )
        load_trainable(self.model, checkpoint.trainable)
        checkpoints.load_optimizer(self.optimizer, checkpoint.optimizer)
        self.method.load_state(checkpoint.method)
        checkpoints.set_rng_state(checkpoints.read_rng(checkpoint, self.accelerator.process_index))
        if self.accelerator.is_main_process:
            # The process before may have been killed between a checkpoint's last file and the removal of an older one.
            checkpoints.tidy(self.folder, checkpoint.progress.step, self.settings.save_total_limit, checkpoint.progress.best_step)
        return checkpoint.progress

    def _last_good(self) -> str:
        found, _ = checkpoints.newest(self.folder)
        return f"The last good checkpoint is {found.folder}." if found else "There is no checkpoint yet (train.save_steps)."

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0


def load_trainable(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved values into the trainable parameters.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = trainable_state(model)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))
        raise CheckpointError(f"the checkpoint's parameters are not the model's: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(f"the checkpoint's {name} is {tuple(tensors[name].shape)}, the model's {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])
