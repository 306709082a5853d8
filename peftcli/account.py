"""The account of a run: everything that is known of it, as the report's schema wants it."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from peftcli import environment
from peftcli.data.prepare import Prepared
from peftcli.estimate import Estimate
from peftcli.evaluate import Scores
from peftcli.kernels import fast
from peftcli.model.load import Base
from peftcli.recipe.schema import Recipe
from peftcli.report import schema as rs
from peftcli.report.gates import judge
from peftcli.tasks.answers import judged
from peftcli.tasks.intervals import Difference
from peftcli.train.checkpoint import Progress
from peftcli.train.loop import Loop
from peftcli.train.memory import Peak


def make_report(
    recipe: Recipe,
    base: Base,
    data: Prepared,
    loop: Loop,
    *,
    status: rs.Status,
    peak: Peak,
    need: Estimate | None = None,
    error: str | None = None,
    after: Scores | None = None,
    check: rs.LiveAdapterCheck | None = None,
    files: dict[str, str] | None = None,
) -> rs.Report:
    """The report of a run that ended with ``status``, the recipe's gates judged.

    Args:
        peak: of the memory, since the run began. ``need``: what was predicted where the recipe limits it.
        after: metrics of the tuned model. ``check``: of the saved weights. ``files``: sha256 by relative path.
    """
    progress = loop.progress
    measured = progress.before is None or math.isfinite(progress.before["loss"])
    report = rs.Report(
        status=status,
        error=error,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_model(recipe, base, loop),
        method=rs.MethodInfo(
            name=recipe.method.name,
            options={k: v for k, v in recipe.method.model_dump(mode="json").items() if k != "name"},
            paper=loop.method.paper,
        ),
        data=rs.DataInfo(
            train=rs.SplitInfo(**asdict(data.train.counts)),
            eval=rs.SplitInfo(**asdict(data.eval.counts)) if data.eval is not None else None,
            files=[rs.DataFile(path=path, sha256=digest) for path, digest in data.files],
            batch_order_sha256=loop.plan.digest(progress.epoch + 1),
        ),
        train=_train(recipe, loop, peak, need),
        eval_before=eval_info(progress.before) if progress.before and measured else None,
        eval=eval_info(asdict(after)) if after else None,
        comparisons=comparisons(Scores(**progress.before), after) if progress.before and measured and after else {},
        examples=_examples(recipe, data, progress.before, after),
        environment=environment.describe(loop.accelerator.device, deterministic=recipe.train.deterministic),
        files=files or {},
        checks=rs.Checks(label_audit=data.audit.to_dict(), live_adapter=check),
        notes=[
            *data.audit.notes,
            *(loop.method.notes() if files else []),
            *([] if measured else ["the base model's held-out loss is not a number"]),
        ],
    )
    return report.model_copy(update={"gates": judge(recipe.expect, report)})


def _model(recipe: Recipe, base: Base, loop: Loop) -> rs.ModelInfo:
    return rs.ModelInfo(
        name=recipe.base_model.name,
        revision=base.revision,
        sha256=base.source.sha256(),
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=base.quantization,
        architecture=type(base.model).__name__,
        parameters=base.parameters,
        trainable_parameters=sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
    )


def _train(recipe: Recipe, loop: Loop, peak: Peak, need: Estimate | None) -> rs.TrainInfo:
    progress: Progress = loop.progress
    memory, phase = peak.look()
    seconds = max(progress.seconds, 1e-9)
    plan = loop.plan
    return rs.TrainInfo(
        steps=progress.step,
        epochs=round(progress.epoch + progress.position / max(1, len(plan.epoch(progress.epoch))), 4),
        loss_first=rs.finite(progress.loss_first),
        loss_last=rs.finite(progress.loss_last),
        loss_best=rs.finite(progress.best_loss),
        best_step=progress.best_step,
        tokens=progress.tokens,
        supervised_tokens=progress.supervised_tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / seconds,
        supervised_tokens_per_second=progress.supervised_tokens / seconds,
        peak_memory_bytes=memory,
        peak_memory_kind="allocated" if loop.accelerator.device.type == "cuda" else "resident",
        peak_memory_phase=phase,
        predicted_memory_bytes=need.total if need else None,
        memory_plan=str(need.plan) if need else None,
        world_size=loop.accelerator.num_processes,
        batch_order=f"{'shuffled' if plan.shuffle else 'file order'}, seed {plan.seed}",
        optimizer=recipe.train.optimizer,
        resumed_from=loop.resumed_from,
        fast_paths=[*(["packed rows", "loss on supervised positions only"] if loop.layout.packed else []), *fast.taken()],
    )


def eval_info(scores: dict[str, Any]) -> rs.EvalInfo:
    """The report's form of :class:`Scores` (as a plain dict, which is how checkpoints keep it)."""
    return rs.EvalInfo(
        loss=scores["loss"],
        metrics=scores["metrics"],
        supervised_tokens=scores["units"],
        rows=scores["rows"],
        seconds=scores["seconds"],
        intervals={k: (v[0], v[1]) for k, v in scores["intervals"].items()},
        generated=len(scores["answers"]) or None,
    )


def comparisons(before: Scores, after: Scores) -> dict[str, rs.PairedTest]:
    """The report's form of the paired tests."""
    return {name: paired_test(found) for name, found in after.since(before).items()}


def paired_test(found: Difference) -> rs.PairedTest:
    """The report's form of one paired test."""
    return rs.PairedTest(difference=found.value, interval=found.interval, p_value=found.p_value, test=found.test)


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
                correct_before=None if old is None else judged(recipe.eval.metrics, old, item.references),
                correct_after=judged(recipe.eval.metrics, new, item.references),
            )
        )
    return examples
