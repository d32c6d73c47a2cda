"""Trains a masked-diffusion model, teaches it a preference, and measures how its estimates vary: no network, no GPU.

python -m examples.masked_diffusion                         three minutes on one core; writes runs/masked-diffusion
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.plain_json import to_json

from .figures import draw_training, draw_variance
from .language import WINDOW, Language, make_language
from .model import MaskedModel
from .train import Evaluation, Size, learn_preferences, pretrain
from .variance import NAIVE, Variance, measure

_SHOWN = 3
_LINES = 6


@dataclass(frozen=True)
class Result:
    """What the example showed."""

    pretraining_losses: list[float]
    losses: list[float]
    evaluations: list[Evaluation]
    variances: dict[str, Variance]
    styles: dict[str, dict[str, int]]
    """Of answers to held-out prompts, before and after."""
    seconds: float


def run(output: Path, size: Size, seed: int) -> Result:
    """All of it; writes two pictures and results.json to ``output``."""
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    _say("A language, and a masked-diffusion model that knows two styles of answer, kind and curt")
    language = make_language(size.texts, size.pairs, size.held_out, seed)
    reference, pretraining_losses = pretrain(language, size, seed)
    _report_losses(pretraining_losses, "nats per token")
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    print(
        f"{parameters:,} parameters, {len(language.text.prompts_BP):,} dialogues, vocabulary {len(language.tokenizer)}"
    )

    _say(f"DPO on ELBO estimates: {size.steps} steps of {size.pairs_per_step} pairs, the kind answer is chosen")
    policy, evaluations, losses = learn_preferences(reference, language, size, seed)
    _report_evaluations(evaluations)

    _say("Answers to questions that no training pair asks, drawn by iterative unmasking")
    styles = _answers(language, {"before": reference, "after": policy}, size.samples, seed)

    _say(f"Variance of a pair's score, {size.draws} estimates for each of {size.measured_pairs} held-out pairs")
    variances = measure(policy, reference, language.held_out.part(slice(size.measured_pairs)), size.draws, seed)
    _report_variances(variances)

    result = Result(pretraining_losses, losses, evaluations, variances, styles, time.perf_counter() - start)
    draw_training(evaluations).savefig(output / "training.png")
    draw_variance(variances).savefig(output / "variance.png")
    (output / "results.json").write_text(to_json(asdict(result), indent=1) + "\n", encoding="utf-8")
    print(f"\n{result.seconds:.0f} s; pictures and numbers are in {output}")
    return result


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _report_losses(losses: list[float], unit: str) -> None:
    every = max(1, len(losses) // _LINES)
    for end in range(every, len(losses) + 1, every):
        print(f"  steps {end - every + 1:4d} to {end:4d}  {sum(losses[end - every : end]) / every:.3f} {unit}")


def _report_evaluations(evaluations: list[Evaluation]) -> None:
    print("held-out pairs:   step   ranked right   reward right   margin (nats)   loss (nats)")
    for found in evaluations:
        print(
            f"{found.step:22d}{found.ranking_accuracy:15.1%}{found.reward_accuracy:15.1%}{found.margin:16.2f}"
            f"{found.loss:14.3f}"
        )


def _answers(language: Language, models: dict[str, MaskedModel], count: int, seed: int) -> dict[str, dict[str, int]]:
    """Styles of ``count`` answers of each model; a few are printed beside each other."""
    prompts_BP = language.held_out.prompts_BP[:count]
    drawn = {
        name: model.answer(prompts_BP, WINDOW, torch.Generator().manual_seed(seed)) for name, model in models.items()
    }
    for row, prompt_P in enumerate(prompts_BP[:_SHOWN]):
        print(f"  prompt  {language.words(prompt_P)}")
        for name, responses_BR in drawn.items():
            print(f"  {name:<6}  {language.words(responses_BR[row])}")
        print()
    styles = {name: dict(language.styles(responses_BR)) for name, responses_BR in drawn.items()}
    for name, found in styles.items():
        print(f"  {name:<6}  {', '.join(f'{found.get(style, 0)} {style}' for style in ('kind', 'curt', 'neither'))}")
    return styles


def _report_variances(variances: dict[str, Variance]) -> None:
    naive = variances[NAIVE].own
    print(f"{'variance in nats^2 (factor)':<30}{'masks of their own':>18}{'shared masks':>18}")
    for name, found in variances.items():
        own, shared = (f"{value:.3g} ({naive / value:.3g}x)" for value in (found.own, found.shared))
        print(f"{name:<30}{own:>18}{shared:>18}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small gain little from more threads, and so the numbers do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.masked_diffusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/masked-diffusion"),
        help="folder to write to (default: runs/masked-diffusion)",
    )
    parser.add_argument("--seed", type=int, default=7, help="of the language, the models and all masks (default: 7)")
    options = parser.parse_args()
    if not 0 <= options.seed < 2**32:
        parser.error("--seed takes a number from 0 to 4294967295")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {options.output}: {error.strerror}; choose another folder with --output")
    with one_thread():
        run(options.output, Size(), options.seed)


if __name__ == "__main__":
    main()
