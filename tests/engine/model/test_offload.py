"""Activations in host memory: the same numbers, what is moved and when, beside the computation."""

from __future__ import annotations

import pytest
import torch

from engine.config.schema import LoraConfig, ModelConfig
from engine.model import load_policy, offload
from engine.model.offload import OffloadedActivations
from tests.engine.model.test_adapters import pack
from tests.pretended_cuda import CUDA, on_host, pretended_cuda
from tests.pretended_streams import UnorderedError

CPU = torch.device("cpu")
ROWS = 64


@pytest.fixture(autouse=True)
def streams_of_one_device():
    offload._copy_stream.cache_clear()
    yield
    offload._copy_stream.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_gradients_are_those_of_activations_that_stay(dtype, checkpointing, lora, tiny_model_dir, monkeypatch):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype=dtype, lora=lora)
    batch = pack()
    weights = set()
    moved: list[torch.Tensor] = []
    pack_one = OffloadedActivations._pack

    def record(self, tensor):
        packed = pack_one(self, tensor)
        if isinstance(packed, tuple):
            moved.append(tensor)
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", record)
    results = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        policy = load_policy(model, device=CPU, gradient_checkpointing=checkpointing).train()
        weights = {p.data_ptr() for p in policy.parameters()}
        policy.activation_offload = offloaded
        logps = policy.logps(batch)
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
        assert bool(moved) == offloaded
    assert len(results[0]) == len(results[1]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(tensor.data_ptr() in weights for tensor in moved)
    rows = {batch.num_tokens, len(batch.plan.key_rows)}
    assert all(rows & set(tensor.shape) for tensor in moved)
    if checkpointing:
        # Only what goes from layer to layer, not what is inside of one.
        assert len(moved) <= 4 * policy.config.num_hidden_layers + 6


def test_rows_of_experts_are_moved(tiny_mixture_dir, monkeypatch):
    """Each token goes through several experts, which see a row for each."""
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_mixture_dir), dtype="float32"), device=CPU).train()
    rows = pack().num_tokens * policy.config.num_experts_per_tok
    kept = []
    pack_one = OffloadedActivations._pack

    def record(self, tensor):
        packed = pack_one(self, tensor)
        if rows in tensor.shape and tensor.numel() >= offload.SMALLEST:
            kept.append(packed is tensor)
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", record)
    batch = pack()
    results = []
    for offloaded in (False, True):
        policy.activation_offload = offloaded
        policy.zero_grad()
        policy.logps(batch).sum().backward()
        results.append([p.grad.clone() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept
    assert not any(kept)


def test_nothing_is_saved_without_gradients(tiny_model_dir):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=CPU)
    batch = pack()
    with torch.no_grad():
        want = policy.logps(batch)
        policy.activation_offload = True
        assert torch.equal(policy.logps(batch), want)


def work(x, weights):
    """Saves views of one storage, parts of one, the same twice, and what is changed in place between."""
    for weight in weights:
        whole = x @ weight
        left, right = whole.chunk(2, dim=1)
        x = torch.cat([left * right, (left.t() * 2).t().sin()], dim=1)
        x = x.mul(x.view(ROWS, -1))
        kept = x.tanh()
        x = kept.clone().add_(1.0).cos() + kept
    return x


def gradients(device, *, offloaded):
    torch.manual_seed(0)
    values = [torch.randn(ROWS, 32) / 8, *(torch.randn(32, 32) / 8 for _ in range(6))]
    if device == CUDA:
        values = [v.pin_memory().to(device, non_blocking=True) for v in values]
    x, *weights = map(torch.nn.Parameter, values)
    hooks = OffloadedActivations([ROWS])
    if offloaded:
        with hooks:
            out = work(x, weights)
    else:
        out = work(x, weights)
    for _ in range(2):
        # A graph that is gone through again brings everything back again.
        out.sum().backward(retain_graph=True)
    return [x.grad, *(w.grad for w in weights)], hooks._transfers


@pytest.fixture
def bounded(monkeypatch):
    """Storages of 8 KiB, of which few may be on their way."""
    monkeypatch.setattr(offload, "AHEAD_BYTES", 3 * ROWS * 32 * 4)


def test_each_storage_is_copied_once():
    """Whatever views of it are saved, and how often; a small part of a large one is copied alone."""
    x, weight = torch.randn(ROWS, 256, requires_grad=True), torch.randn(256, 320)
    hooks = OffloadedActivations([ROWS])
    with hooks:
        y = x.sin()
        whole = y @ weight.requires_grad_()
        left, right = whole.chunk(2, dim=1)
        column = whole[:, 4:84]
        outputs = [left * right, y.view(-1).view(ROWS, 256) * y, y.t().cos(), column * 2 * column]
    sizes = [copy.nbytes for copy in hooks._transfers.copies]
    assert sizes == [x.nbytes, y.nbytes, whole.nbytes, column.nbytes, column.nbytes]
    sum(output.sum() for output in outputs).backward()
    assert hooks._transfers.copies == [None] * 5
    assert hooks._transfers.moving == 0


def test_copies_run_beside_the_computation(bounded, monkeypatch):
    """On a pretended device: in order, never waited for by the host, within bounds; the bits are those without."""
    send = offload._Transfers.send

    def observed(self, flat):
        copy = send(self, flat)
        assert self.moving <= offload.AHEAD_BYTES
        return copy

    monkeypatch.setattr(offload._Transfers, "send", observed)
    with pretended_cuda() as cuda:
        want, _ = gradients(CUDA, offloaded=False)
        assert cuda.streams is None
        got, transfers = gradients(CUDA, offloaded=True)
        assert all(torch.equal(on_host(a), on_host(b)) for a, b in zip(want, got, strict=True))
        assert all(on_host(grad).isfinite().all() for grad in want)
        assert cuda.waits == 0
        assert cuda.streams is not None
        assert (set(transfers.copies), transfers.moving) == ({None}, 0)


FAULTS = {
    "no wait before a copy": ("_Beside", "copy", lambda self, target, source: _copy_at_once(self, target, source)),
    "no wait before use": ("_Beside", "wait", lambda self, event: None),
}


def _copy_at_once(lane, target, source):
    with torch.cuda.stream(lane._stream):
        target.copy_(source, non_blocking=True)
        return lane._stream.record_event()


@pytest.mark.parametrize("fault", FAULTS)
def test_streams_that_do_not_wait_are_found(fault, bounded, monkeypatch):
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(getattr(offload, owner), name, wrong)
    with pytest.raises(UnorderedError), pretended_cuda():
        gradients(CUDA, offloaded=True)


def test_what_is_needed_next_is_on_its_way(bounded, monkeypatch):
    """Backward, copies are started before what they bring is asked for, and no more than may be on the way."""
    ahead, most = [], []
    use = offload._Transfers.use

    def observed(self, copy):
        ahead.append(copy.source is not None or copy.back is not None)
        found = use(self, copy)
        most.append(self.moving)
        return found

    monkeypatch.setattr(offload._Transfers, "use", observed)
    gradients(CPU, offloaded=True)
    first_pass = ahead[: len(ahead) // 2]
    assert sum(first_pass) >= len(first_pass) - 2
    assert max(most) <= offload.AHEAD_BYTES + 2 * ROWS * 32 * 4
