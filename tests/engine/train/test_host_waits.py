"""Between two logged steps the host never waits for the device, shown on a pretended one that refuses to be waited for.

Whole runs take their steps on it: feed, losses, the ops' own bodies, gradients, clipping, the guarded update, metrics.
"""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import transformers
from packaging.version import Version

from dpo_kernels import dispatch
from dpo_kernels.losses import LOSS_TYPES
from engine.model.attention import choice
from engine.train import feed, references
from engine.train import run as run_module
from engine.train.evaluation import evaluate_policy
from engine.train.setup import Setup, prepare
from tests.engine.train.conftest import save_family
from tests.pretended_cuda import CUDA, PretendedCuda, on_host, pretended_cuda


class Inline:
    """An executor that works in the thread that asks, where the pretended device is."""

    def __init__(self, **unused):
        pass

    def submit(self, function, *args):
        done: Future = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, **unused):
        pass


@pytest.fixture(autouse=True)
def inline_feed(monkeypatch):
    monkeypatch.setattr(feed, "ThreadPoolExecutor", Inline)
    # No kernels without a GPU, and no native code on one: what is left of the choice is the way of the GPU in torch.
    monkeypatch.setattr(dispatch, "why_not", lambda op, impl, *unused: None if impl == "torch" else "pretended")
    monkeypatch.setattr(choice.library, "why_not", lambda: "pretended")


def waiting(function, run, cuda: PretendedCuda, waits: set[int]):
    """The function, in which the host may wait; notes the step."""

    def wrapped(*args):
        with cuda.waiting():
            function(*args)
        waits.add(run.done)

    return wrapped


def take_steps(setup: Setup, folder, others: list, cuda: PretendedCuda | None):
    """The steps of a run, on the pretended device or here.

    Returns:
        The last row of metrics, the trained weights, and the steps in which the host waited.
    """
    if cuda is not None:
        for policy in (setup.policy, *others):
            cuda.take(policy)
        setup.feed.device = CUDA
    run = run_module.Run(setup, folder)
    waits: set[int] = set()
    if cuda is not None:
        run._require_finite = waiting(run._require_finite, run, cuda, waits)
        run._log = waiting(run._log, run, cuda, waits)
    run.policy.train()
    run._steps()
    weights = {n: on_host(p.detach()) for n, p in run.policy.named_parameters() if p.requires_grad}
    return run.last_row, weights, waits


LOSSES = [{"loss_type": name} for name in LOSS_TYPES]
LOSSES += [
    {"loss_type": "plackett_luce"},
    {"loss_type": "kto"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
]
LORA = {"model": {"lora": {"r": 4, "alpha": 8}}}
BF16 = {"model": {"dtype": "bfloat16"}}
CASES = {f"{loss['loss_type']} {len(loss)}": {"loss": loss} for loss in LOSSES}
CASES |= {
    "bf16": BF16,
    "lora": LORA,
    "lora ipo bf16": {"model": {**LORA["model"], **BF16["model"]}, "loss": {"loss_type": "ipo"}},
    "lora simpo": {**LORA, "loss": {"loss_type": "simpo"}},
    "lora dropout": {"model": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}, "loss": {"loss_type": "aot"}},
    "live adapters": {**LORA, "reference": {"mode": "live"}},
    "live model": {"reference": {"mode": "live"}},
    "no clipping": {"optim": {"max_grad_norm": 0.0}},
    "stochastic": {**BF16, "optim": {"master_weights": "stochastic"}},
    "offloaded state": {"optim": {"offload": True}},
    "kahan offloaded": {**BF16, "optim": {"master_weights": "kahan", "offload": True}},
    "kahan": {**BF16, "optim": {"master_weights": "kahan"}},
    "checkpointing": {**BF16, "train": {"gradient_checkpointing": True}},
    "offload": {**BF16, "train": {"activation_offload": True}},
    "one prompt a response": {"packing": {"share_prompts": False}},
    "experts": lambda folder: {"model": {"model_name_or_path": str(folder), "dtype": "bfloat16"}},
}
IN_ROWS = {"lfm2": "mixers", "bloom": "rows"}
"""Families that packs alone would change, and their layouts."""


@pytest.mark.parametrize("case", CASES)
def test_steps_between_two_log_lines(case, make_config, monkeypatch, tmp_path, tiny_mixture_dir):
    loaded: list = []
    load = references.load_reference
    monkeypatch.setattr(references, "load_reference", lambda *args: loaded.append(load(*args)) or loaded[-1])
    sections = CASES[case](tiny_mixture_dir) if callable(CASES[case]) else CASES[case]
    train = {"logging_steps": 2, "max_steps": 4, "save_steps": None, **sections.get("train", {})}
    results = []
    for here in (True, False):
        config = make_config(**{**sections, "train": {**train, "output_dir": str(tmp_path / str(here))}})
        setup = prepare(config)
        if here:
            results.append(take_steps(setup, tmp_path, [], None))
        else:
            with pretended_cuda() as cuda:
                results.append(take_steps(setup, tmp_path, loaded, cuda))
    (want, _, _), (got, _, waits) = results
    assert waits == {2, 4}
    names = [name for name in want if not name.startswith("perf/")]
    assert [got[name] for name in names] == pytest.approx([want[name] for name in names], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", IN_ROWS)
def test_steps_of_a_model_in_rows(family, dtype, make_config, tmp_path, tiny_tokenizer):
    if IN_ROWS[family] == "rows" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("masks of transformers before 5.21 copy their zero to the GPU in every forward pass")
    folder = save_family(family, tmp_path / family, tiny_tokenizer)
    train = {"logging_steps": 2, "max_steps": 4, "save_steps": None}
    setup = prepare(make_config(model={"model_name_or_path": str(folder), "dtype": dtype}, train=train))
    assert setup.policy.layout.kind == IN_ROWS[family]
    with pretended_cuda() as cuda:
        _, _, waits = take_steps(setup, tmp_path, [], cuda)
    assert waits == {2, 4}


@pytest.mark.parametrize("case", ["sigmoid 1", "aot 1", "bf16", "lora", "live model", "experts"])
def test_an_evaluation_waits_no_more_often_for_many_packs(
    case, make_config, monkeypatch, pairs_jsonl, tiny_mixture_dir
):
    loaded: list = []
    load = references.load_reference
    monkeypatch.setattr(references, "load_reference", lambda *args: loaded.append(load(*args)) or loaded[-1])
    sections = CASES[case](tiny_mixture_dir) if callable(CASES[case]) else CASES[case]
    waits, values = [], []
    for tokens in (None, 4096, 200):
        packing = {"tokens_per_pack": tokens or 4096}
        setup = prepare(make_config(**sections, packing=packing, data={"eval_dataset_name": str(pairs_jsonl)}))
        call = (setup.policy, setup.datasets["eval"], setup.objective, setup.config)
        lookup = setup.references.lookup("eval")
        if tokens is None:
            values.append(evaluate_policy(*call, lookup=lookup))
            continue
        with pretended_cuda() as cuda:
            for policy in (setup.policy, *loaded):
                cuda.take(policy)
            with cuda.waiting():
                values.append(evaluate_policy(*call, lookup=lookup))
            waits.append(cuda.waits)
    assert 0 < waits[0] == waits[1] <= 4
    for found in values[1:]:
        assert found == pytest.approx(values[0], rel=2e-3, abs=2e-3)
