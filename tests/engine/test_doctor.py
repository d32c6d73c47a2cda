"""``dpo doctor`` reports everything, keeps going when a part is broken, and fails when numbers are wrong."""

from __future__ import annotations

import math
import re
from importlib import metadata

import pytest
import torch

import dpo_kernels
from engine import doctor
from engine.model import selftest
from engine.model.attention import choice
from engine.model.kernels import compiled, liger
from tests.engine.model import stand_ins


def test_a_healthy_machine():
    text, healthy = doctor.diagnose()
    assert healthy
    assert text.isascii()
    for part in (
        "none (none pays on cpu)", "linear attention", "threads", "linear_dpo_loss float32", "linear_logps_filtered",
        "attention bfloat16",
        "log-probs float32", "weight gradient bfloat16", "offline", "reference store",
        "loss after a step bfloat16  ok",
    ):  # fmt: skip
        assert part in text
    assert re.search(r"sdpa bfloat16, gradients +ok", text)
    assert re.search(rf"^  torch +{re.escape(metadata.version('torch'))}$", text, re.M)
    assert text.endswith("healthy")


NO_GPU = [
    ("13.0", None, "none found (torch is built for CUDA 13.0)"),
    (None, "7.1", "none found (torch is built for ROCm 7.1)"),
    (None, None, "none (torch is a CPU build)"),
]


@pytest.mark.parametrize(("cuda", "hip", "words"), NO_GPU)
def test_a_machine_without_a_gpu(monkeypatch, cuda, hip, words):
    for name, version in {"cuda": cuda, "hip": hip, "xpu": None}.items():
        monkeypatch.setattr(torch.version, name, version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ("gpu", words) in list(doctor._machine())


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        (("liger_kernel", "triton"), "liger, else compile, else none (first choice; compared"),
        (("triton",), "compile, else none (passed over liger: liger-kernel is not installed"),
        (
            (),
            "none (passed over liger: liger-kernel is not installed (pip install dpo-kernels[liger]); compile: ",
        ),
    ],
)
def test_what_computes_blocks_on_a_gpu(installed, words, monkeypatch):
    if "liger_kernel" in installed:
        pytest.importorskip("liger_kernel")
    for module in (liger, compiled):
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in installed else None)
    rows = dict(doctor._blocks("cuda"))
    assert rows["model.kernels auto"].startswith(words)
    assert ("liger_kernel" in installed) == ("not installed" not in rows["model.kernels liger"])
    assert ("triton" in installed) == (rows["model.kernels compile"] == "torch.compile can generate code")


def test_wrong_numbers_are_found(monkeypatch):
    right = dpo_kernels.linear_logps
    monkeypatch.setattr(dpo_kernels, "linear_logps", lambda *args, **kwargs: right(*args, **kwargs) + 0.01)
    text, healthy = doctor.diagnose()
    assert not healthy
    assert "FAILED" in text
    assert "log-probs float32: error 1.00e-02" in text
    assert "reference store" in text


def test_every_attention_kernel_that_runs_is_tested(monkeypatch):
    stand_ins.install(monkeypatch)
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    text, healthy = doctor.diagnose()
    assert healthy, text
    for name in ("flash3", "flash", "varlen", "sdpa"):
        assert f"  {name} bfloat16, gradients" in text
    assert "gradient bfloat16" in text
    # on the CPU it has no gradients, and auto goes on without it
    assert re.search(r"flex bfloat16 +passed over: it fails here: Unsupported: ", text)
    kernel = choice.KERNELS["varlen"]
    monkeypatch.setitem(
        choice.KERNELS, "varlen", kernel._replace(attend=lambda *args, **kwargs: 1.1 * kernel.attend(*args, **kwargs))
    )
    text, healthy = doctor.diagnose()
    assert not healthy
    assert "FAILED" in text
    assert "varlen bfloat16: error 1.00e-01 of its norm, allowed 1e-02" in text
    choice._probe.cache_clear()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": 0.7}, r"first loss float32: error 6\.85e-03 from ln 2"),
        ({"gradient_error": float("nan")}, "gradient float32: error nan of its norm"),
        ({"loss_after": 0.7}, r"loss float32: 0\.7000 after a step, 0\.6931 before"),
    ],
)
def test_a_wrong_step_is_found(monkeypatch, wrong, message):
    step = selftest.Step(math.log(2), 1e-6, 0.5)._replace(**wrong)
    monkeypatch.setattr(selftest, "training_step", lambda *args: step)
    text, healthy = doctor.diagnose()
    assert not healthy
    assert re.search(message, text)


def test_nan_is_wrong(monkeypatch):
    right = dpo_kernels.linear_logps
    monkeypatch.setattr(dpo_kernels, "linear_logps", lambda *args, **kwargs: right(*args, **kwargs) * float("nan"))
    assert not doctor.diagnose()[1]


def test_a_broken_installation_is_reported_not_raised(monkeypatch):
    def broken(*args):
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(dpo_kernels, "describe", broken)
    text, healthy = doctor.diagnose()
    assert not healthy
    assert "ImportError: libcudart.so.12" in text
    assert "log-probs float32" in text


def test_offline_and_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    text, _ = doctor.diagnose()
    assert "only local folders" in text
    assert f"{tmp_path / 'cache' / 'reference'} (not there yet" in text
    (tmp_path / "cache" / "reference").mkdir(parents=True)
    (tmp_path / "cache" / "reference" / "shard").write_bytes(b"x" * 2**20)
    assert "(1.0 MiB" in doctor.diagnose()[0]
    assert f"{tmp_path / 'cache' / 'rows'} (not there yet" in text
