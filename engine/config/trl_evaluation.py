"""The keys of TRL that say when a run is evaluated and saved, what is evaluated, and which checkpoint is the best."""

from __future__ import annotations

from typing import Any

from .trl_model import ModelKeys
from .trl_sets import hold_out_rows

_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow an evaluation."""


class EvaluationKeys(ModelKeys):
    """Topics of ``from_trl.py``: evaluation, checkpoints, and how evaluations are compared."""

    saves_best = False
    """Whether a checkpoint is written after every evaluation that is the best."""

    def _cadence(self, kind: str, key: str, default: int) -> None:
        """``KIND_strategy`` and ``KIND_steps``."""
        strategy, value = self.trl.take(f"{kind}_strategy", "steps"), self.trl.take(key)
        train = self.result.values["train"]
        if strategy in ("no", False) and kind == "save":
            train[key] = None
            self._same(f"{kind}_strategy", f"no -> train.{key} null")
        elif strategy == "epoch" and kind == "save" and (share := self._share_of_an_epoch()):
            train[key] = share
            self._same(f"{kind}_strategy", f"epoch -> train.{key} {share:g} of all steps")
        elif strategy == "best" and kind == "save":
            self.saves_best = True
        elif strategy != "steps":
            self._same(f"{kind}_strategy", f"{strategy}: here every train.{key} optimizer steps, {default} by default")
        elif value is not None:
            train[key] = self._steps(key, value)

    def _share_of_an_epoch(self) -> float | None:
        """One epoch as a share of all steps; None where it is all of them, or steps are not counted in epochs."""
        train = self.result.values["train"]
        epochs = float(train["num_train_epochs"])
        return 1 / epochs if epochs > 1 and "max_steps" not in train else None

    def _held_out(self) -> None:
        """``test_split_size``: a share, or so many rows."""
        size, data = self.trl.keys.get("test_split_size"), self.result.values["data"]
        if size is None:
            return
        size = self.trl.as_number("test_split_size", self.trl.take("test_split_size"))
        if {"eval_fraction", "eval_dataset_name"} & set(self.given.get("data", {})):
            self._same("test_split_size", "other rows are evaluated")
        elif size > 0:
            rows = {key: self.trl.keys.get(key) for key in ("dataset_name", "dataset_train_split")}
            found, text = hold_out_rows({**{k: v for k, v in rows.items() if v is not None}, **data}, size)
            self.trl.keys.update({key: found.pop(key) for key in ("dataset_train_split",) if key in found})
            data |= found
            self._new("test_split_size", text)

    def _evaluation(self) -> None:
        data, train = self.result.values["data"], self.result.values["train"]
        strategy = self.trl.take("eval_strategy", self.trl.take("evaluation_strategy", "no"))
        steps, split = self.trl.take("eval_steps"), self.trl.take("dataset_test_split")
        # a YAML "no" is false
        if strategy in ("no", False):
            for key, value in (("eval_steps", steps), ("dataset_test_split", split)):
                if value is not None:
                    self._same(key, "no effect without eval_strategy")
            return
        has_rows = any("eval_split" in one for one in data.get("datasets", ()))
        if has_rows or "eval_fraction" in data or data.get("eval_dataset_name"):
            split = None
        elif data.get("datasets"):
            self._new("eval_strategy", "no rows of a mixture are held out, so none are evaluated")
            return
        elif data.get("dataset_name"):
            data["eval_dataset_name"] = data["dataset_name"]
            data["eval_dataset_split"] = str(split or "test")
            self._same("eval_strategy", f"split {split or 'test'} -> data.eval_dataset_name, data.eval_dataset_split")
        if strategy == "steps":
            default = train.get("logging_steps", 10)
            train["eval_steps"] = self._steps("eval_steps", default if steps is None else steps)
        elif strategy == "epoch" and (share := self._share_of_an_epoch()):
            train["eval_steps"] = share
            self._same("eval_strategy", f"epoch -> train.eval_steps {share:g} of all steps")
        else:
            self._same("eval_strategy", f"{strategy}: evaluated once, after training; set train.eval_steps for more")

    def _best(self) -> None:
        """What evaluations are compared for and by, once it is known whether there are any."""
        train = self.result.values["train"]
        keeps = self.trl.flag("load_best_model_at_end")
        if self.saves_best and not keeps:
            self._new("save_strategy", "best: here a checkpoint every train.save_steps steps, the best one among them "
                      "kept with train.load_best_model_at_end")  # fmt: skip
        compared = ["load_best_model_at_end"] if keeps else []
        compared += [key for key in ("early_stopping_patience",) if train.get(key) is not None]
        if compared and train.get("eval_steps") is None:
            for key in compared:
                self._new(key, f"there is one evaluation at most, after training, so that the last model is written; "
                          f"set train.eval_steps and train.{key} to compare evaluations")  # fmt: skip
            for section in (train, self.given.get("train", {})):
                section.pop("early_stopping_patience", None)
            compared = []
        metric = {key: self.trl.take(key) for key in ("metric_for_best_model", "greater_is_better")}
        metric = {key: value for key, value in metric.items() if value is not None}
        if compared or self.result.values["optim"].get("lr_scheduler_type") in _BY_METRIC:
            self._name_a_set(metric)
            train |= metric
        else:
            for key in metric:
                self._same(key, "no effect where evaluations are not compared")
        if "load_best_model_at_end" in compared:
            train["load_best_model_at_end"] = True
            self._save_what_is_compared()

    def _name_a_set(self, metric: dict[str, Any]) -> None:
        """Of several evaluation sets one decides, which has to be named."""
        sets = self.result.values["data"].get("eval_dataset_name")
        if not isinstance(sets, dict):
            return
        name = str(metric.get("metric_for_best_model", "loss")).removeprefix("eval_")
        if not name.startswith(tuple(f"{label}_" for label in sets)):
            metric["metric_for_best_model"] = chosen = f"{next(iter(sets))}_{name}"
            self._new("metric_for_best_model", f"several sets are evaluated, and none is named: {chosen} decides here")

    def _save_what_is_compared(self) -> None:
        """Checkpoints where evaluations are, or at every second one and so on."""
        train = self.result.values["train"]
        every, default = train["eval_steps"], 500
        if "save_steps" not in train and (self.saves_best or every < 1 or default % every):
            train["save_steps"] = every
            self._same("save_steps", f"every evaluation has a checkpoint -> train.save_steps {every:g}")
