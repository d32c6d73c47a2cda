"""``dpo doctor`` reports everything, keeps going when a part is broken, and fails when numbers are wrong."""

from __future__ import annotations

import torch

import dpo_kernels
from engine import doctor


def test_a_healthy_machine():
    text, healthy = doctor.diagnose()
    assert healthy
    assert text.isascii()
    for part in (
        f"torch         {torch.__version__}", "threads", "linear_dpo_loss float32", "linear_logps_filtered",
        "attention bfloat16",
        "log-probs float32", "weight gradient bfloat16", "offline", "reference store",
    ):  # fmt: skip
        assert part in text
    assert text.endswith("healthy")


def test_wrong_numbers_are_found(monkeypatch):
    right = dpo_kernels.linear_logps
    monkeypatch.setattr(dpo_kernels, "linear_logps", lambda *args, **kwargs: right(*args, **kwargs) + 0.01)
    text, healthy = doctor.diagnose()
    assert not healthy
    assert "FAILED" in text
    assert "log-probs float32: error 1.00e-02" in text
    assert "reference store" in text


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
