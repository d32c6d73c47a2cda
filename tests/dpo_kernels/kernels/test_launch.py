"""Which devices the kernels take, on chips that are not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dpo_kernels import dispatch
from dpo_kernels.chunks import operand_dtype
from dpo_kernels.kernels import filtered_products, launch
from dpo_kernels.kernels.filtered_products import TileLists
from dpo_kernels.kernels.launch import obstacle
from dpo_kernels.kernels.tile_config import tile_config
from dpo_kernels.linear_logps.triton_tiles import full_waves


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch):
    """Let CUDA devices have these capabilities, the first one's being that of `cuda:0`."""

    def fake(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.setattr(torch.version, "hip", hip)

    return fake


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("capability", "refusal"),
    [
        ((6, 1), "need compute capability 8.0, and Test GPU has 6.1"),
        ((7, 0), "need compute capability 8.0, and Test GPU has 7.0"),
        ((7, 5), "need compute capability 8.0, and Test GPU has 7.5"),
        *[((major, minor), None) for major, minor in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3))],
        *[((major, minor), None) for major, minor in ((11, 0), (12, 0), (12, 1))],
    ],
)
def test_least_capability(chip, capability, refusal, dtype):
    """`auto` goes on in torch and says why, and an explicit request is refused."""
    chip(capability)
    found = obstacle(torch.device("cuda"), dtype)
    assert found == (refusal and f"the Triton kernels {refusal}")
    for op in dispatch.MODULES:
        choice = dispatch.choose(op, "auto", "cuda", dtype)
        if refusal is None:
            assert choice.impl == "triton"
            continue
        assert choice == ("torch", f"no Triton kernels: {found}")
        with pytest.raises(RuntimeError, match=rf"impl='triton' cannot run on cuda {dtype}: .* has {capability[0]}\."):
            dispatch.choose(op, "triton", "cuda", dtype)


def test_each_device_has_its_own_capability(chip):
    chip((9, 0), (7, 5))
    assert dispatch.choose("linear_dpo", "auto", "cuda:0", torch.bfloat16).impl == "triton"
    assert dispatch.choose("linear_dpo", "auto", "cuda:1", torch.bfloat16).impl == "torch"


def test_rocm_and_other_accelerators_are_refused(chip):
    """ROCm calls its devices CUDA devices; nor are products there taken to widen their results."""
    chip((9, 4), hip="7.0")
    assert obstacle(torch.device("cuda"), torch.bfloat16).endswith("and this torch is built for ROCm")
    assert dispatch.choose("linear_logps", "auto", "cuda", torch.bfloat16).impl == "torch"
    assert operand_dtype(OnCuda) == torch.float32
    chip((9, 0))
    assert obstacle(torch.device("xpu"), torch.bfloat16) == "the Triton kernels run on NVIDIA GPUs, not on xpu"
    assert operand_dtype(OnCuda) == torch.bfloat16


class OnCuda:
    """As much of a tensor as tells where it is."""

    device, dtype = torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(("arch", "D", "aligned"), [
    ("sm_80", 4096, True), ("sm_80", 4112, True), ("sm_80", 4104, False), ("sm_80", 4095, False), ("sm_90", 4104, True),
])  # fmt: skip
@pytest.mark.parametrize("kernel", ["slice_grad", "filtered_dx", "filtered_dw"])
def test_pointers_load_whole_vectors_of_multiples_of_16_alone(monkeypatch, kernel, arch, D, aligned):
    """Under the mask that other D need, elements go one by one; wide tiles would spill registers over it."""
    monkeypatch.setattr(launch, "device_arch", lambda device: arch)
    hidden, weight = (torch.empty(rows, D, dtype=torch.bfloat16, device="meta") for rows in (8, 512))
    expected = {"arch": arch, "dtype": torch.bfloat16, "D": D, "V": 512, "heavy": False, "aligned": aligned}
    if kernel == "slice_grad":
        found = launch.TileLaunch(kernel, hidden, weight, heavy=False).config
    else:
        lists = TileLists.make(torch.empty(1, 4, dtype=torch.bool, device="meta"), rows=128, columns=128)
        grad, operand = hidden.new_empty(8, 512), weight if kernel == "filtered_dx" else hidden
        found, *_ = filtered_products._launch(kernel, grad, operand, "block_v", lists, None)
        # Results are stored under that mask, however operands are loaded.
        expected["aligned"] = D % 16 == 0
    assert found == tile_config(kernel, **expected)


@pytest.mark.parametrize(
    ("rows", "most", "processors", "expected"),
    [(8192, 40, 132, 33), (8192, 40, None, 40), (4096, 80, 132, 66), (8192, 40, 148, 37), (100, 2, 132, 2)],
)
def test_slices_fill_waves(rows, most, processors, expected):
    assert full_waves(rows, most, processors) == expected
    if processors is not None and most >= 4:
        tiles = -(-rows // 128) * expected
        assert tiles / (-(-tiles // processors) * processors) > 0.97


def test_a_machine_without_a_gpu_describes_one():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert obstacle(torch.device("cuda"), torch.bfloat16) is None
