"""The example of a training loop of one's own: every mode runs, and two processes learn what one learns."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels.hf import attach_head, pair_loss, response_logps
from tests.ranks import results_of_two

PATH = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"
WRAPPERS = ("ddp", "fsdp2", "accelerate", *(["lora"] if importlib.util.find_spec("peft") else []))
STEPS = 3


def load_example():
    spec = importlib.util.spec_from_file_location("own_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the last step, gathered, under the names that the model has without its wrapper."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def sharded_step(example, rank: int, param_dtype):
    """(rewards before step 1, gradients) under FSDP2 with the head as a unit of its own."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = example.load_model(None)
    attach_head(model)
    for unit in (*model.model.layers, model.lm_head, model):
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32))
    (batch,) = example.batches(example.pairs_of_tokens(8), 8, rank, 2)
    with torch.no_grad():
        ref_logps = model(**batch, objective=response_logps)
    out = model(**batch, objective=pair_loss(ref_logps, beta=0.5))
    out.loss.backward()
    return torch.cat([out.chosen_rewards, out.rejected_rewards]), gradients(model)


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: every wrapper in turn, in one group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    example, results = load_example(), {}
    for mode in WRAPPERS:
        model, losses = example.train(mode, steps=STEPS)
        results[mode] = losses, gradients(model)
    results["head alone"] = sharded_step(example, rank, None)[1]
    results["bfloat16"] = sharded_step(example, rank, torch.bfloat16)[0]
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return results_of_two(worker, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and gradients of one process in a mode."""

    @functools.cache
    def run(mode):
        model, losses = load_example().train(mode, steps=STEPS)
        return losses, gradients(model)

    return run


@pytest.mark.parametrize("mode", WRAPPERS)
def test_two_ranks_equal_one(ranks, alone, mode):
    """The last gradient is that of weights which two steps have moved."""
    want_losses, want = alone("lora" if mode == "lora" else "plain")
    assert any(grad.any() for grad in want.values())
    for rank in ranks:
        losses, found = rank[mode]
        assert losses == pytest.approx(want_losses, rel=1e-5)
        assert found.keys() == want.keys()
        for name, grad in want.items():
            assert_close(found[name], grad, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_that_is_sharded_by_itself(ranks):
    model, _ = load_example().train("plain", steps=1)
    for rank in ranks:
        for name, grad in gradients(model).items():
            assert_close(rank["head alone"][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_references_keep_their_bits_beside_bfloat16_parameters(ranks):
    """FSDP2 casts the floating tensors that it finds among a model's arguments: the rewards would not be 0."""
    assert not any(rank["bfloat16"].any() for rank in ranks)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_processes_are_asked_for_in_one_line(mode, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["own_loop.py", "--mode", mode])
    with pytest.raises(SystemExit) as ended:
        load_example().main()
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"error: --mode {mode} wants processes: torchrun --nproc_per_node 2 own_loop.py --mode {mode}")


def test_log_probs_come_pair_by_pair():
    example = load_example()
    model = example.load_model(None)
    attach_head(model)
    pairs = example.pairs_of_tokens(3)
    together = model(**example.collate(pairs), objective=response_logps)
    alone = [model(**example.collate([pair]), objective=response_logps) for pair in pairs]
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_it_learns(capsys):
    _, losses = load_example().train("plain", steps=12)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < 0.5
    assert capsys.readouterr().out.splitlines()[0] == "step 1  loss 0.6931  accuracy 0.00"


def test_adapters_are_trained_on_the_head_too():
    pytest.importorskip("peft")
    model, losses = load_example().train("lora", steps=4)
    assert losses[-1] < losses[0]
    grads = gradients(model)
    assert sum(".lora_B." in name and grad.any().item() for name, grad in grads.items()) == 5
    assert all("lora_" in name for name in grads)


def test_the_lines_of_the_guide_run():
    page = (PATH.parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    (snippet,) = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "attach_head" in block]
    example = load_example()
    given = {"torch": torch, "model": example.load_model(None), "batch": example.collate(example.pairs_of_tokens(4))}
    exec(snippet, given)
    assert given["out"].loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert given["model"].lm_head.weight.grad.any()
