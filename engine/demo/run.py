"""The demo from end to end: make a language and a model, then do with them what a user would do."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..digits import shown_number
from ..plain_json import to_json
from ..run_folder import REPORT_PAGE
from .corpus import STYLES, Pair, Subject, dialogues, preference_pairs, split_subjects, style_of
from .size import DemoSize
from .workspace import Workspace, prepare_workspace

Command = Callable[[Sequence[str]], int]
SEED = 7
_SAMPLES_SHOWN = 3
_WIDTH = 100


class Sample(NamedTuple):
    """One sampled answer of each model to a held-out prompt."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed."""

    before: dict[str, float]
    """``evaluate.evaluate`` of the starting model on the held-out pairs."""
    after: dict[str, float]
    """The same of the trained model."""
    samples: list[Sample]
    report: Path
    model: Path
    seconds: dict[str, float]
    """By stage."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each product.

    Matrices this small gain little from more and lose much when another process holds a core; and so the numbers do not
    depend on the number of cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        print(f"\n== {title}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run_demo(output_dir: Path, dpo: Command, *, size: DemoSize | None = None) -> DemoResult:
    """Train a tiny model from nothing and teach it a preference: no network, no accelerator, no other files.

    A synthetic language is generated, a tokenizer and a Llama are trained on it, and preference pairs are written;
    then ``dpo check``, ``plan``, ``precompute``, ``train``, ``evaluate`` and ``report`` run as from the command line.

    Args:
        output_dir: folder to write to; what an earlier demo wrote there is replaced.
        dpo: runs a command in this process, as the command line does: ``dpo(["check", "run.yaml"])``.
        size: how much is generated and trained; the default takes a minute or two on two CPU cores.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    from transformers.utils import logging as transformers_logging

    workspace = prepare_workspace(output_dir)
    transformers_logging.disable_progress_bar()
    with _one_thread():
        return _run(workspace, dpo, size or DemoSize())


def _run(workspace: Workspace, dpo: Command, size: DemoSize) -> DemoResult:
    clock = _Clock()
    learned, unseen = split_subjects(SEED)
    with clock.stage("starting model", "A language and a model that knows two styles of answer, kind and curt"):
        _make_model(workspace, size)
    with clock.stage("data", "Preference pairs: the kind answer is chosen, the curt one rejected"):
        held_out = _make_data(workspace, size, learned, unseen)
        _write_config(workspace, size)
    with clock.stage("check", f"dpo check {workspace.config}"):
        dpo(["check", str(workspace.config)])
    with clock.stage("plan", f"dpo plan {workspace.config}"):
        dpo(["plan", str(workspace.config)])
    with clock.stage("precompute", f"dpo precompute {workspace.config}"):
        dpo(["precompute", str(workspace.config)])
    with clock.stage("evaluate before", f"dpo evaluate {workspace.config}"):
        before = _evaluate(workspace, None)
    with clock.stage("train", f"dpo train {workspace.config}"):
        dpo(["train", str(workspace.config)])
    with clock.stage("evaluate after", f"dpo evaluate {workspace.config} --model {workspace.run}"):
        after = _evaluate(workspace, workspace.run)
    with clock.stage("report", f"dpo report {workspace.run}"):
        dpo(["report", str(workspace.run)])
    with clock.stage("samples", "Answers to questions that no training pair asks"):
        samples = _samples(workspace, held_out, size.samples)
        print(_format_samples(samples[:_SAMPLES_SHOWN]))
    report = workspace.run / REPORT_PAGE
    result = DemoResult(before, after, samples, report, workspace.run, clock.seconds)
    print(_format_result(result, workspace, len(held_out), len(unseen)))
    return result


def _evaluate(workspace: Workspace, model: Path | None) -> dict[str, float]:
    from ..config import load_config
    from ..evaluate import evaluate

    return evaluate(load_config(workspace.config), None if model is None else str(model))


def _make_model(workspace: Workspace, size: DemoSize) -> None:
    from .base_model import pretrain

    start = time.perf_counter()
    print(f"writing {size.dialogues:,} dialogues", flush=True)
    texts = list(dialogues(size.dialogues, SEED))
    loss, parameters = pretrain(texts, size.model, seed=SEED, folder=workspace.starting_model)
    print(
        f"{len(texts):,} dialogues, half of them kind and half curt; a Llama of {parameters:,} parameters trained for "
        f"{size.model.steps} steps in {time.perf_counter() - start:.0f} s to {shown_number(loss)} nats per token"
    )


def _make_data(
    workspace: Workspace, size: DemoSize, learned: Sequence[Subject], unseen: Sequence[Subject]
) -> list[Pair]:
    pairs = preference_pairs(size.pairs, learned, SEED, "train")
    held_out = preference_pairs(size.held_out, unseen, SEED, "held-out")
    for path, rows in ((workspace.train_data, pairs), (workspace.held_out_data, held_out)):
        path.write_text("".join(to_json(pair.row()) + "\n" for pair in rows), encoding="utf-8")
    held = f"{len(held_out):,} held-out pairs about {len(unseen)} others"
    print(f"{len(pairs):,} pairs about {len(learned)} subjects; {held}")
    print(_wrapped("prompt", pairs[0].prompt))
    print(_wrapped("chosen", pairs[0].chosen))
    print(_wrapped("rejected", pairs[0].rejected))
    return held_out


def _write_config(workspace: Workspace, size: DemoSize) -> None:
    import yaml

    config = {
        "model": {"model_name_or_path": str(workspace.starting_model), "dtype": "float32"},
        "data": {
            "dataset_name": str(workspace.train_data),
            "eval_dataset_name": str(workspace.held_out_data),
            "max_length": 256,
        },
        "packing": {"pairs_per_step": size.pairs_per_step, "tokens_per_pack": 4096},
        "loss": {"loss_type": "sigmoid", "beta": 0.5},
        "optim": {"learning_rate": size.learning_rate, "warmup_steps": size.warmup_steps},
        "reference": {"store": str(workspace.references)},
        "train": {
            "output_dir": str(workspace.run),
            "num_train_epochs": 1,
            "seed": SEED,
            "logging_steps": size.logging_steps,
            "eval_steps": size.eval_steps,
        },
    }
    workspace.config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _samples(workspace: Workspace, held_out: Sequence[Pair], count: int) -> list[Sample]:
    """What each model answers to the first held-out prompts, drawn with the same seed."""
    from .base_model import answer

    prompts = [pair.prompt for pair in held_out[:count]]
    print(f"drawing {count} answers of the starting model, then {count} of the trained one", flush=True)
    before = answer(workspace.starting_model, prompts, seed=SEED)
    after = answer(workspace.run, prompts, seed=SEED)
    return [Sample(*texts) for texts in zip(prompts, before, after, strict=True)]


def _wrapped(label: str, text: str) -> str:
    head = f"  {label:<9} "
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _format_samples(samples: Sequence[Sample]) -> str:
    parts = []
    for prompt, before, after in samples:
        parts += [_wrapped("prompt", prompt), _wrapped("before", before), _wrapped("after", after), ""]
    return "\n".join(parts[:-1])


def _format_result(result: DemoResult, workspace: Workspace, held_out: int, subjects: int) -> str:
    before, after, samples = result.before, result.after, result.samples
    per_token, rewards, margin = "eval_ranking_accuracy_per_token", "eval_rewards/accuracies", "eval_rewards/margins"
    drawn_before = Counter(style_of(sample.before) for sample in samples)
    drawn_after = Counter(style_of(sample.after) for sample in samples)
    table = [
        ("accuracy: chosen has the higher log-prob per token", f"{before[per_token]:.1%}", f"{after[per_token]:.1%}"),
        ("accuracy: chosen has the higher reward", "(all 0)", f"{after[rewards]:.1%}"),
        ("reward margin", shown_number(before[margin]), shown_number(after[margin])),
        ("loss (nats)", shown_number(before["eval_loss"]), shown_number(after["eval_loss"])),
        *(
            (
                f"answers that open with a {style} phrase, of {len(samples)}",
                f"{drawn_before[style]}",
                f"{drawn_after[style]}",
            )
            for style in STYLES
        ),
    ]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    return "\n".join(
        [
            "",
            f"== Result on {held_out:,} held-out pairs, about {subjects} subjects that no training pair asks about",
            f"{'':<54}{'before':>10}{'after':>10}",
            *(f"{name:<54}{first:>10}{second:>10}" for name, first, second in table),
            "",
            f"seconds    {sum(result.seconds.values()):.0f} ({stages})",
            f"pictures   {result.report}",
            f"model      {result.model}",
            f"try        dpo train {workspace.config} --train.output_dir {workspace.folder / 'run-2'} --loss.beta 0.1",
        ]
    )
