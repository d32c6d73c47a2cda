"""A run between its first step and its model: steps, lines, evaluations, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import distributed, stop
from ..config import to_yaml
from ..durable import MANIFEST, remove_leftovers, write_atomically
from ..errors import Stopped, UserError
from ..model import load_sharded
from ..run_folder import CONFIG_FILE, read_samples
from ..seeds import seed_generators
from . import checkpoint as checkpoints
from . import sharded
from .best import Best
from .by_source import SourceMeter
from .checkpoint import Saved
from .describe import write_data_file
from .evaluation import evaluate_splits, evaluation_lines, format_evaluation, scalar_metrics, write_evaluation
from .evidence import Evidence
from .export import Origin, export_model, package_versions
from .feed import FeedError
from .metrics import IntervalMeter
from .optimizer import GuardedUpdate, build_optimizer, build_schedule, change_total
from .progress import log_line, step_bar, terminal_width
from .resume import Start, TrainResult, config_values, digests
from .rounding import round_and_measure
from .samples import add_samples, draw_samples, format_samples, keep_samples_until
from .saver import Saver
from .setup import Setup
from .storage import saves_beside
from .throughput import reset_peak_memory
from .trackers import Callback, CallbackTracker, Tracker, keep_rows_until, open_trackers

GO_ON = "go on with --resume"

log = logging.getLogger(__name__)


class Run:
    """The state of a run between its steps."""

    def __init__(self, setup: Setup, output_dir: Path, callbacks: Sequence[Callback] = ()):
        self.setup = setup
        self.callbacks = callbacks
        self.config = setup.config
        self.output_dir = output_dir
        self.policy = setup.policy
        self.feed = setup.feed
        self.done = self.saved = 0
        self.resumed_from: int | None = None
        self.epoch = 0.0
        self.last_row: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = 0
        self.sampled_at = -1
        self.stepped: Callable[[], object] = lambda: None
        """Called after each step."""
        self.best = Best(self.config)
        self.chosen: str | None = None
        """Which checkpoint the model is of, in words, where it is not the last one."""
        self.rounding: str | None = None
        self.meter = IntervalMeter(setup.device, peak_flops=setup.peak_flops)
        self.by_source = SourceMeter(
            setup.datasets["train"].source_names,
            setup.device,
            has_losses=not setup.objective.couples_pairs,
            unpaired=setup.objective.unpaired,
        )
        self.evidence = Evidence()
        self.trackers: list[Tracker] = []
        self._random: tuple[Path, Mapping[str, Any]] | None = None
        self._build_update()
        self.saver = Saver(
            output_dir,
            self.config.train.save_total_limit,
            beside=saves_beside(self.policy, self.config, total=self.feed.total_steps),
            device=setup.device,
        )

    def _build_update(self) -> None:
        optim = self.config.optim
        self.optimizer, self.names = build_optimizer(self.policy.model, optim, seed=self.config.train.seed)
        self.schedule = build_schedule(self.optimizer, optim, total_steps=self.feed.total_steps)
        self.update = GuardedUpdate(self.optimizer, self.schedule, max_grad_norm=optim.max_grad_norm)

    def restore(self, start: Start) -> None:
        """Continue from a checkpoint."""
        path, state = start.path, start.state
        self._load_weights(path, state)
        checkpoints.load_optimizer(path, state, self.optimizer, self.names)
        if (reference := self.setup.references.moving) is not None:
            checkpoints.load_reference(path, state, reference)
        self._restore_schedule(start)
        self.feed.go_on(state.get("stream"), state["step"])
        self.meter.load(state["meter"])
        self.by_source.load(state.get("by_source", []))
        self.done = self.saved = self.resumed_from = state["step"]
        self.epoch = state["epoch"]
        self.last_row, self.evaluation = state["last_row"], state["evaluation"]
        self.evaluated_at = state["evaluated_at"]
        self.best.load(state.get("best", {}), evaluated=bool(self.evaluated_at))
        self._random = (path, state)
        log.info("continuing after step %d of %s", self.done, path)

    def _load_weights(self, path: Path, state: Mapping[str, Any]) -> None:
        """Those of a checkpoint. A whole model is a new one, and so is its optimizer."""
        if checkpoints.is_sharded(state):
            sharded.load(path, self.policy)
        elif self.policy.has_adapter:
            checkpoints.load_adapter(self.policy, path)
        else:
            self.policy = self.setup.policy = load_sharded(
                replace(self.config.model, model_name_or_path=str(path), revision=None),
                self.setup.device,
                gradient_checkpointing=self.config.train.gradient_checkpointing,
                activation_offload=self.config.train.activation_offload,
                layout=self.policy.layout,
                weights_dtype=self.config.optim.weights_dtype,
                kernels=self.policy.kernels,
            )
            self._build_update()

    def _restore_schedule(self, start: Start) -> None:
        """As it was; of another number of steps, where that would be."""
        self.schedule.load_state_dict(start.state["schedule"])
        before, total = start.total(self.setup.datasets["train"].per_epoch), self.feed.total_steps
        if total != before:
            log.info("%s", change_total(self.schedule, self.config.optim, before=before, total=total))

    def train(self) -> TrainResult:
        # Until the model is written: with the last step done, that is the fastest way to lose nothing.
        with stop.postponed("the step in progress is finished and saved first"):
            self._open()
            try:
                with step_bar(self.done, self.feed.total_steps) as self.stepped:
                    self._steps()
                self.saver.finish()
                self._final_evaluation()
                if self.sampled_at != self.done or self.chosen is not None:
                    self._sample()
            except Stopped as end:
                raise self._stopped(end) from None
            except FeedError as end:
                raise self._broken(end) from None
            finally:
                self.saver.close()
                for tracker in self.trackers:
                    tracker.close()
            metrics = {**self.last_row, **scalar_metrics(self.evaluation)}
            distributed.announce("writes the model")
            export_model(
                self.output_dir,
                self.policy,
                self.setup.tokenizer,
                self.config,
                metrics,
                Origin(self.chosen, self.rounding),
            )
            if distributed.is_main():
                checkpoints.remove_stopped(self.output_dir)
            log.info("model written to %s", self.output_dir)
            return TrainResult(self.output_dir, self.done, metrics, self.resumed_from)

    def _stopped(self, end: Stopped) -> Stopped:
        """Make durable what is done, and say how to go on. An evaluation that was left is made again."""
        return Stopped(end.number, self._saved(), GO_ON)

    def _broken(self, end: FeedError) -> UserError:
        """Make durable what is done before data that cannot be read."""
        return UserError(f"{end}; the run ended{self._saved()}: correct this, then {GO_ON}")

    def _saved(self) -> str:
        """Save what is done, and say where that is."""
        self.saver.finish()
        if self.done > self.saved:
            self._require_finite()
            self._save(stopped=True)
        return f" after step {self.done} of {self.feed.total_steps}" if self.done else " before step 1"

    def _open(self) -> None:
        """Write what a run folder starts with, and set the random generators."""
        if distributed.is_main():
            remove_leftovers(self.output_dir)
            # A run that was killed may have left one too many, and no later checkpoint may be due.
            self.saver.prune(self._best_checkpoint())
            # A finished run that goes on is no longer finished.
            (self.output_dir / MANIFEST).unlink(missing_ok=True)
            write_atomically(self.output_dir / CONFIG_FILE, to_yaml(self.config))
            write_data_file(self.setup, self.output_dir)
            keep_samples_until(self.output_dir, self.done)
            keep_rows_until(self.output_dir, self.done, evaluated_at=self.evaluated_at)
            self.trackers = open_trackers(self.output_dir, self.config.train, first_step=self.done + 1)
            self.trackers += [CallbackTracker(callback) for callback in self.callbacks]
        # Processes draw different masks of dropout in adapters. In another number of them no old state fits.
        seed_generators((self.config.train.seed + distributed.rank() + distributed.size() * self.done) % 2**32)
        if self._random is not None:
            checkpoints.restore_random_state(*self._random)
        self.policy.train()

    def _steps(self) -> None:
        total = self.feed.total_steps
        reset_peak_memory(self.setup.device)
        self.meter.watch.start()
        if self.done and self._evaluates_at(self.done) and self.evaluated_at != self.done:
            # The run was asked to end in the middle of it.
            self._evaluate()
            if self._saves_at(self.done):
                self._save()
        if not self.done:
            self._sample()
        if self.best.ends_run:
            log.info("%s", self.best.words)
            return
        for step in self.feed.steps(self.done):
            objective = self.setup.objective
            self.update.passes = len(step.packs)
            scored = objective.backward(self.policy, step)
            routing = objective.routing
            assert routing is not None
            aux_loss = routing.aux_loss()
            means = routing.add_to(scored.step_means(step.num_terms), aux_loss)
            learning_rate = self.update.learning_rate
            self.saver.before_update()
            grad_norm = self.update.step(means[0])
            further = scored.further(step.num_terms)
            self.meter.add(means, step.work, aux_loss=aux_loss, expert_tokens=routing.expert_tokens, further=further)
            self.by_source.add(scored, step.sources)
            self.evidence.add(step, scored, means[0], grad_norm)
            self.done, self.epoch = step.number, step.epoch
            self._move_reference()
            evaluate_now = self._evaluates_at(step.number)
            # An evaluation may end the run, and its last step has a line.
            log_now = self._due("logging_steps", step.number) or (evaluate_now and self.best.patience is not None)
            log_now = log_now or step.number == total
            if log_now or evaluate_now or self._saves_at(step.number) or not self.update.deferred:
                self._require_finite()
            if log_now:
                self._log(grad_norm, learning_rate)
            if evaluate_now:
                self._evaluate()
            if self._due("sample_steps", step.number):
                self._sample()
            if self._saves_at(step.number):
                self._save()
            self.stepped()
            if self.best.ends_run:
                log.info("%s", self.best.words)
                break
        self.meter.watch.stop()

    def _sample(self) -> None:
        """Answers of the model as it is, where they are asked for; of a sharded one on all ranks together."""
        if self.config.train.sample_steps is None or not (distributed.is_main() or self.policy.sharded):
            return
        self.meter.watch.stop()
        dataset = self.setup.datasets[self.setup.held_out[0]]
        self.sampled_at = self.done
        # Tokenizer and configuration are in use there, too.
        self.saver.finish()
        samples = draw_samples(self.policy, self.setup.tokenizer, self.config, dataset, step=self.done)
        if distributed.is_main():
            add_samples(self.output_dir, samples)
            for tracker in self.trackers:
                tracker.show(self.done, read_samples(self.output_dir))
            log.info("%s", format_samples(samples))
        self.meter.watch.start()

    def _move_reference(self) -> None:
        """Where ``reference.sync_ref_model`` asks for it after the step that is done."""
        r = self.config.reference
        if r.sync_ref_model and self.done % r.ref_model_sync_steps == 0:
            self.setup.references.move(self.policy, r.ref_model_mixup_alpha)

    def _evaluates_at(self, step: int) -> bool:
        # Shares of all steps are rounded, so a checkpoint may fall between two evaluations.
        due = self._due("eval_steps", step) or (self.best.keeps and self._saves_at(step))
        return due and self.config.data.has_evaluation

    def _due(self, key: str, step: int) -> bool:
        """Whether what ``key`` of ``train`` counts is due after a step."""
        every = self.config.train.every(key, self.feed.total_steps)
        return every is not None and step % every == 0

    def _saves_at(self, step: int) -> bool:
        # The last one is what a finished run can be extended from.
        last = step == self.feed.total_steps or self.best.ends_run
        return (last and self.config.train.save_steps is not None) or self._due("save_steps", step)

    def _require_finite(self) -> None:
        """Stop when a loss or gradient was not finite; it has not reached the weights."""
        if not self.update.ok():
            raise UserError(self.evidence.explain(self.config))
        self.evidence.clear()

    def _log(self, grad_norm: Tensor, learning_rate: float) -> None:
        row = self.meter.row(step=self.done, epoch=self.epoch, grad_norm=grad_norm, learning_rate=learning_rate)
        row |= self.by_source.row()
        self.last_row = row
        self._track(row)
        run_here = self.done - (self.resumed_from or 0)
        left = (self.feed.total_steps - self.done) * self.meter.watch.seconds() / run_here
        log.info("%s", log_line(row, total_steps=self.feed.total_steps, seconds_left=left, width=terminal_width()))

    def _track(self, row: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.done, row)

    def _evaluate(self) -> None:
        self.meter.watch.stop()
        self.evaluation = evaluate_splits(
            self.policy,
            self.setup.datasets,
            self.setup.objective,
            self.config,
            lookup=self.setup.references.lookup,
        )
        self.evaluated_at = self.done
        self._track_evaluation()
        self.best.evaluated(self.evaluation, step=self.done, saved=self._saves_at(self.done))
        if self.update.moves_on_metric:
            self.update.evaluated(self.best.of(self.evaluation))
        self.meter.watch.start()

    def _track_evaluation(self) -> None:
        row = {"step": self.done, "epoch": round(self.epoch, 6), **scalar_metrics(self.evaluation)}
        self._track(row)
        for line in evaluation_lines(row):
            log.info("%s", line)

    def _take_best(self) -> None:
        """Go back to the weights of the best evaluation, where that is asked for."""
        best = self.best.kept
        if best is None or best.step == self.done:
            return
        path = checkpoints.checkpoint_path(self.output_dir, best.step)
        if distributed.is_main() and not path.exists():
            raise UserError(
                f"{path}, the checkpoint of the best evaluation, is gone: put it back, or write the last model with "
                f"--resume --train.load_best_model_at_end false"
            )
        # Its state makes room for a second model.
        self.optimizer.state.clear()
        state = distributed.broadcast(checkpoints.read_state(path) if distributed.is_main() else {})
        self._load_weights(path, state)
        if (reference := self.setup.references.moving) is not None:
            checkpoints.load_reference(path, state, reference)
        self.evaluation = best.evaluation
        self.chosen = f"step {best.step} of {self.done}, the best by {self.best.metric} ({best.shown_value})"
        log.info("the model is that of %s", self.chosen)

    def _final_evaluation(self) -> None:
        """Evaluate the weights as they will be written, which may be those of another step, or rounded ones."""
        if self.setup.held_out and self.evaluated_at != self.done:
            self._evaluate()
        self._take_best()
        cost = round_and_measure(self.setup, self.evaluation)
        if cost is not None:
            self.rounding = cost.text
            log.warning("stored as %s", cost.text)
        if not self.setup.held_out:
            return
        if cost is not None:
            self.evaluation = cost.values
            self._track_evaluation()
        log.info("%s", format_evaluation(self.evaluation))
        if distributed.is_main():
            write_evaluation(self.output_dir, self.evaluation)

    def _save(self, *, stopped: bool = False) -> None:
        self.meter.watch.stop()
        for tracker in self.trackers:
            tracker.flush()
        state = {
            "epoch": self.epoch,
            "stream": self.feed.place(self.done),
            "config": config_values(self.config),
            **digests(self.setup.datasets),
            "base": self.setup.base,
            "reference": self.setup.references.weights,
            "schedule": self.schedule.state_dict(),
            "meter": self.meter.state(),
            "by_source": self.by_source.state(),
            "last_row": self.last_row,
            "evaluation": self.evaluation,
            "evaluated_at": self.evaluated_at,
            "best": self.best.state(),
            "versions": package_versions(),
        }
        self.saver.save(
            Saved(self.policy, self.setup.tokenizer, self.optimizer, self.names, self.setup.references.moving),
            step=self.done,
            state=state,
            best=self._best_checkpoint(),
            stopped=stopped,
        )
        self.saved = self.done
        self.meter.watch.start()

    def _best_checkpoint(self) -> Path | None:
        """The checkpoint that a run may go back to."""
        best = self.best.kept
        return None if best is None else checkpoints.checkpoint_path(self.output_dir, best.step)
