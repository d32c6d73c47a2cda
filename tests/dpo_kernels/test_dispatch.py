"""Which implementation runs, what is refused, and what importing the package brings in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dpo_kernels import describe, dispatch, linear_dpo_loss, linear_logps, native

WITHOUT_TRITON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")

sys.modules["triton"] = None
sys.meta_path.insert(0, Refuse())

import torch
import dpo_kernels
from dpo_kernels import describe, linear_dpo_loss, linear_logps

torch.manual_seed(0)
weight = torch.randn(7, 3, requires_grad=True)
labels = torch.tensor([1, 2, 3, 4])
linear_logps(torch.randn(4, 3), weight, labels).sum().backward()
linear_dpo_loss(torch.randn(4, 3), weight, labels, torch.tensor([0, 2, 4]), torch.zeros(2)).loss.backward()
assert weight.grad.isfinite().all()
assert describe("cpu").triton_version is None, describe("cpu")
assert describe("cuda").linear_logps.impl == "torch"
try:
    linear_logps(torch.randn(4, 3), weight, labels, impl="triton")
except RuntimeError as error:
    print(error)
"""

IMPORTS = """
import sys
import dpo_kernels
dpo_kernels.describe("cpu")
print([name for name in ("triton", "transformers", "engine", "trl", "numpy.testing") if name in sys.modules])
"""


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_torch_alone() -> None:
    assert run_fresh(IMPORTS) == "[]"


def test_works_without_triton() -> None:
    assert "triton is not installed" in run_fresh(WITHOUT_TRITON)


def test_describe_names_the_choice_and_the_reason() -> None:
    description = describe("cpu")
    impl = "torch" if native.library() is None else "native"
    assert (description.linear_logps.impl, description.linear_dpo_loss.impl) == (impl, impl)
    text = str(description)
    assert text.startswith("dpo_kernels on cpu float32 (torch ")
    assert f"linear_dpo_loss: {impl} (cpu tensors" in text
    assert (native.why_not() or f"native code for {native.isa()}") in text
    assert describe("cpu", torch.float64).linear_dpo_loss.impl == "torch"
    assert describe(dtype=torch.bfloat16).dtype == "bfloat16"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it was not built."""
    monkeypatch.setattr(native, "_load", lambda: native._Loaded(None, "the native extension is not built; build it"))


@pytest.mark.parametrize("op", dispatch.MODULES)
def test_native_is_refused_and_never_replaced(op: str, no_library) -> None:
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run on cpu torch\.float32: the native extension"):
        dispatch.choose(op, "native", "cpu", torch.float32)
    choice = dispatch.choose(op, "auto", "cpu", torch.float32)
    assert choice.impl == "torch"
    assert choice.reason.endswith("the native extension is not built; build it")


@pytest.mark.parametrize("op", dispatch.MODULES)
def test_native_is_refused_what_it_does_not_compute(op: str) -> None:
    with pytest.raises(RuntimeError, match=r"float64: the native extension computes in float32; float64 is for torch"):
        dispatch.choose(op, "native", "cpu", torch.float64)
    with pytest.raises(RuntimeError, match="the native extension computes on the CPU"):
        dispatch.choose(op, "native", "cuda", torch.bfloat16)


def test_an_explicit_request_reaches_the_op(no_library) -> None:
    hidden, weight, labels = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([1, 2, 3, 4])
    with pytest.raises(RuntimeError, match="native extension is not built"):
        linear_logps(hidden, weight, labels, impl="native")
    for trained in (False, True):
        pairs = hidden, weight.requires_grad_(trained), labels, torch.tensor([0, 2, 4]), torch.zeros(2)
        with pytest.raises(RuntimeError, match=r"^linear_dpo_loss impl='native' .*native extension is not built"):
            linear_dpo_loss(*pairs, impl="native")


def test_a_loss_without_a_kernel_goes_to_torch_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = dispatch._load("linear_dpo", "triton")
    monkeypatch.setattr(module, "why_not", lambda *args: None)
    asked = ("linear_dpo", "cuda", torch.bfloat16)
    assert dispatch.choose(asked[0], "auto", *asked[1:], losses=["sigmoid", "sft"]).impl == "triton"
    choice = dispatch.choose(asked[0], "auto", *asked[1:], losses=["sigmoid", "of tomorrow"])
    assert choice == ("torch", "no Triton kernels: no kernel computes the losses of tomorrow")
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run .* no kernel computes the losses of tomorrow"):
        dispatch.choose(asked[0], "triton", *asked[1:], losses=["of tomorrow"])
    # What the op asks with: the names of the call's losses.
    monkeypatch.setattr(module, "LOSSES", ("ipo",))
    hidden, weight = torch.randn(4, 3), torch.randn(7, 3, requires_grad=True)
    labels, cu = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
    with pytest.raises(RuntimeError, match="no kernel computes the losses sigmoid"):
        linear_dpo_loss(hidden, weight, labels, cu, torch.zeros(2), impl="triton")


@pytest.mark.parametrize("op", dispatch.MODULES)
def test_auto_takes_triton_on_cuda_only_where_it_can(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda *args: None)
    assert dispatch.choose(op, "auto", "cuda", torch.bfloat16).impl == "triton"
    assert dispatch.choose(op, "auto", "meta", torch.bfloat16).impl == "triton"
    monkeypatch.setattr(dispatch, "why_not", lambda *args: "too old a GPU")
    assert dispatch.choose(op, "auto", "cuda", torch.bfloat16) == ("torch", "no Triton kernels: too old a GPU")
