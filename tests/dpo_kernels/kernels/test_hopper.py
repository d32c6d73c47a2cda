"""``kernels.hopper`` without a GPU: its source and its callers agree, the driver would take what it is handed, what
becomes of accumulators is right (the source's own text, run by threads of the CPU), and the machine code does what it
is meant to.

On a GPU `make gpu` compares the kernel with float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dpo_kernels.head import Head
from dpo_kernels.kernels import hopper, launch, slice_grad, tile_logps
from dpo_kernels.kernels.tile_config import table_entries

FILES = hopper.sources()
TEXT = b"".join(FILES.values()).decode()
KINDS = {"int": ctypes.c_int, "float": ctypes.c_float, "long long": ctypes.c_int64}


def number(name: str) -> int:
    return int(re.search(rf"constexpr int {name} = (\d+);", TEXT)[1])


def test_the_source_and_its_caller_agree():
    body = re.search(r"struct Args \{(.*?)\n\};", TEXT, re.S)[1]
    fields = []
    for kind, names in re.findall(r"^  (?:const )?([\w ]+?\*?) ((?:\w+, )*\w+);", body, re.M):
        fields += [(name, ctypes.c_void_p if kind.endswith("*") else KINDS[kind]) for name in names.split(", ")]
    assert fields == hopper._Args._fields_
    assert (number("ROWS"), number("COLS"), number("DEPTH")) == (hopper.ROWS, hopper.COLUMNS, hopper.DEPTH)
    assert number("CLUSTER") == hopper.CLUSTER
    assert f"__launch_bounds__({hopper.THREADS}, 1)" in TEXT
    barriers = 2 * 8 * number("STAGES")
    tiles = number("STAGES") * (hopper.ROWS + hopper.COLUMNS) * hopper.DEPTH * 2
    assert tiles + 1023 + barriers <= hopper.SHARED_BYTES <= 227 * 1024
    for name in ("STATS", "EXPS", "GRADIENT"):
        assert f"#define {name} {getattr(hopper, name)}\n" in TEXT


def test_only_tiles_that_the_kernel_has_are_given_to_it():
    for kernel, by_dtype in table_entries("sm_90").items():
        for dtype, entries in by_dtype.items():
            for bounds, config in entries:
                if config.hopper:
                    assert kernel in ("linear_stats", "linear_exps", "slice_grad")
                    assert dtype in ("bfloat16", "float16")
                    assert (config.block_n, config.block_v) == (hopper.ROWS, hopper.COLUMNS)
                    assert config.tma
                    assert bounds.get("heavy") is False
    assert not any(
        config.hopper
        for arch in ("sm_80", "sm_100", "default")
        for by_dtype in table_entries(arch).values()
        for entries in by_dtype.values()
        for _, config in entries
    )


class Driver:
    """libcuda as far as it is called; it refuses what cuTensorMapEncodeTiled and cuLaunchKernel are documented to."""

    def __init__(self):
        self.maps: list[SimpleNamespace] = []
        self.launches: list[tuple] = []

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, found, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill
    ):
        assert kind in (6, 9), "CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _BFLOAT16"
        assert rank == len(sizes) == len(box) == len(steps) == len(strides) + 1
        assert address.value % 16 == 0
        assert all(0 < size <= 2**32 for size in sizes)
        assert all(stride % 16 == 0 and stride < 2**40 for stride in strides)
        assert all(0 < side <= 256 for side in box)
        assert swizzle == 3, "CU_TENSOR_MAP_SWIZZLE_128B"
        assert box[0] * 2 <= 128
        assert strides[0] >= 2 * sizes[0]
        self.maps.append(SimpleNamespace(address=address.value, sizes=list(sizes), box=list(box)))
        return 0

    def cuLaunchKernel(self, function, x, y, z, tx, ty, tz, shared, stream, parameters, extra):  # noqa: N802
        assert x % hopper.CLUSTER == 0
        assert x > 0
        assert (y, z, tx, ty, tz) == (1, 1, hopper.THREADS, 1, 1)
        assert shared <= 227 * 1024
        assert extra is None
        assert len(parameters) == 3
        args = ctypes.cast(parameters[2], ctypes.POINTER(hopper._Args)).contents
        values = {name: getattr(args, name) for name, _ in hopper._Args._fields_}
        self.launches.append((function, x, values))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A machine that has the kernel, as far as its callers can tell; tensors stay on the CPU."""
    found = Driver()
    monkeypatch.setattr(hopper, "_driver", lambda: found)
    monkeypatch.setattr(hopper, "_enter_context", lambda index: None)
    monkeypatch.setattr(hopper, "_function", lambda index, dtype, mode: (dtype, mode))
    monkeypatch.setattr(hopper, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "_on_device", lambda device: True)
    monkeypatch.setattr(hopper, "_place", lambda device: (0, 132, None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launch, "device_arch", lambda device: "sm_90")
    return found


def operands(T: int, D: int, V: int, dtype=torch.bfloat16, **options) -> tuple[torch.Tensor, Head, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden, Head(weight, **options), torch.randint(V, (T,))


@pytest.mark.parametrize(("T", "D", "V"), [(256, 128, 1000), (200, 72, 300), (4096, 64, 257)])
@pytest.mark.parametrize("dtype", hopper.DTYPES)
def test_what_the_driver_is_handed(driver, T, D, V, dtype):
    hidden, head, labels = operands(T, D, V, dtype, logit_scale=0.5, temperature=2.0)
    part, label_logit = head.columns(slice(8, V)), torch.empty(T)
    exps = tile_logps.empty_exps(hidden, V)
    found = tile_logps.tile_partials(hidden, part, labels.int(), label_logit, first_col=8, exps=exps)
    (function, blocks, args), (of_hidden, of_weight) = driver.launches[0], driver.maps
    assert function == (dtype, hopper.EXPS)
    assert blocks == min(132, 2 * -(-T // 256) * -(-(V - 8) // 256))
    assert (of_hidden.sizes, of_hidden.box) == ([D, T], [64, 128])
    assert (of_weight.sizes, of_weight.box) == ([D, V - 8], [64, 128])
    assert of_weight.address == part.weight_VD.data_ptr()
    assert (args["T"], args["V"], args["D"], args["first_col"], args["scale"]) == (T, V - 8, D, 8, 0.25)
    assert args["tile_shift"] == found.shift_JT.data_ptr()
    assert args["tile_sum"] == found.sum_JT.data_ptr()
    assert args["out"] == exps.data_ptr()
    assert args["out_stride"] == exps.stride(0)
    assert args["shift_slack"] == (10.0 if dtype == torch.float16 else 24.0)
    assert found.width == 256
    assert found.shift_JT.shape == (-(-(V - 8) // 256), T)

    without = tile_logps.tile_partials(hidden, part, labels, label_logit, first_col=8)
    assert driver.launches[1][0] == (dtype, hopper.STATS)
    assert without.width == 128
    assert without.shift_JT.shape == (2 * -(-(V - 8) // 256), T)

    lse, grad = torch.zeros(T, dtype=torch.float64), torch.zeros(T)
    slice_grad.slice_grad(hidden, part, labels, lse, grad, exps, first_col=8, ignore_index=-100)
    assert driver.launches[2][0] == (dtype, hopper.GRADIENT)
    assert driver.launches[2][2]["ignore_index"] == -100


def test_what_it_does_not_take_goes_to_triton(driver, monkeypatch):
    asked = []
    monkeypatch.setattr(hopper, "launch", lambda *args, **kwargs: asked.append(args))
    hidden, head, labels = operands(256, 128, 512)

    def goes_to_hopper(hidden=hidden, head=head, **options) -> bool:
        asked.clear()
        try:
            tile_logps.tile_partials(hidden, head, labels[: len(hidden)], torch.empty(len(hidden)), **options)
        except Exception:
            # Triton without a GPU.
            assert not asked
        return bool(asked)

    assert goes_to_hopper()
    assert not goes_to_hopper(token_stats=True)
    assert not goes_to_hopper(head=Head(head.weight_VD, softcap=3.0))
    assert not goes_to_hopper(hidden=hidden.float(), head=Head(head.weight_VD.float()))
    # Rows that overlap; such as do not begin at multiples of 16 bytes; a tile whose neighbour is empty.
    assert not goes_to_hopper(hidden=hidden[:, :127].contiguous(), head=Head(head.weight_VD[:, :127].contiguous()))
    assert not goes_to_hopper(hidden=hidden[:128])
    assert not goes_to_hopper(hidden=hidden[:1].expand(256, 128))


def test_reasons_why_not(monkeypatch):
    assert "compute capability 9.0" in hopper.why_not(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not float32" in hopper.why_not(torch.device("cuda", 0), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(hopper, "_enter_context", lambda index: None)
    monkeypatch.setattr(hopper, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    for reason, patch in {
        "DPO_HOPPER_KERNELS=none hides them": lambda: monkeypatch.setenv(hopper.VARIABLE, "none"),
        "libnvrtc.so.99 is not found": lambda: monkeypatch.setattr(torch.version, "cuda", "99.0"),
        "hopper_logits.cu is not installed": lambda: monkeypatch.setattr(hopper, "FOLDERS", ()),
    }.items():
        monkeypatch.delenv(hopper.VARIABLE, raising=False)
        hopper._why_not.cache_clear()
        patch()
        assert hopper.why_not(torch.device("cuda", 0), torch.bfloat16) == reason
    hopper._why_not.cache_clear()


def test_machine_code_that_was_kept(tmp_path, monkeypatch):
    """Compiled once, and again when the file is not as it was written: cut off at any byte, or another byte."""
    compiled = []

    class Compiler:
        version = b"1.0"

        def compile(self, source, options):
            compiled.append(options)
            return b"machine code " + str(options).encode()

    monkeypatch.setattr(hopper, "_Compiler", Compiler)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    code = hopper.compiled(torch.bfloat16, hopper.STATS)
    assert hopper.compiled(torch.bfloat16, hopper.STATS) == code
    assert len(compiled) == 1
    (kept,) = (tmp_path / "kernels").iterdir()
    whole = kept.read_bytes()
    for damaged in [whole[:size] for size in range(len(whole))] + [b"x" + whole[1:], whole[:-1] + b"x", whole + b"x"]:
        kept.write_bytes(damaged)
        compiled.clear()
        assert hopper.compiled(torch.bfloat16, hopper.STATS) == code
        assert len(compiled) == 1
        assert kept.read_bytes() == whole
    assert hopper.compiled(torch.float16, hopper.STATS) != code
    monkeypatch.setenv("DPO_CACHE", str(kept))
    assert hopper.compiled(torch.bfloat16, hopper.STATS) == code, "a folder that cannot be made"


# ---------------------------------------------------------------- what becomes of accumulators


@pytest.fixture(scope="module")
def epilogue(tmp_path_factory) -> Path:
    """``hopper_epilogue.cuh`` compiled for threads of the CPU: a program for each mode."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("hopper")
    # Sizes and types, then the epilogue as it is; what is an instruction of Hopper's the harness has in C++.
    head = FILES[hopper.SOURCE].decode().partition("#include")[0]
    (folder / "epilogue.h").write_text(head + FILES["hopper_epilogue.cuh"].decode())
    harness = Path(__file__).with_name("hopper_epilogue.cpp")
    for mode in range(3):
        command = [compiler, "-std=c++17", "-O1", "-pthread", f"-DMODE={mode}", "-DHALF=0", f"-I{folder}", str(harness)]
        subprocess.run([*command, "-o", str(folder / f"mode{mode}")], check=True, capture_output=True, text=True)
    return folder


T, V = 200, 300
"""The second group of rows ends past T, the second tile of columns past V."""


def run_epilogue(
    folder: Path, mode: int, products: torch.Tensor, **inputs: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Both tiles of a block's 128 rows from row 128 and of the rows before it, by the program of a mode."""
    names = ("labels", "row_shift", "lse", "grad", "bias")
    given = {"products": products, **{name: inputs.get(name) for name in names}}
    for name, tensor in given.items():
        path = folder / name
        path.unlink(missing_ok=True)
        if tensor is not None:
            path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    subprocess.run([str(folder / f"mode{mode}"), str(folder), str(T), str(V)], check=True, timeout=120)

    def read(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=dtype).view(shape)

    parts = {hopper.STATS: 4, hopper.EXPS: 2}.get(mode, 0)
    found = {"out": read("out", torch.bfloat16, 256, 512)} if mode != hopper.STATS else {}
    if parts:
        found |= {name: read(name, torch.float32, parts, T) for name in ("tile_shift", "tile_sum")}
        found["label_logit"] = read("label_logit", torch.float32, T)
    return found


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    """Products of 256 x 512, of which T x V count, in which no column stands for another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (T,), generator=generator)
    labels[:6] = torch.tensor([0, V - 1, 255, 256, -100, 127])
    labels[140] = -100
    return {
        "products": 3 * torch.randn(256, 512, generator=generator),
        "labels": labels,
        "bias": torch.randn(V, generator=generator).bfloat16(),
        "row_shift": 4 + torch.rand(T, generator=generator),
    }


SCALE = 0.75
"""Of the programs, as their slack of shifts is 2."""


@pytest.mark.parametrize("mode", [hopper.STATS, hopper.EXPS])
@pytest.mark.parametrize("options", [(), ("bias", "row_shift")], ids=["plain", "bias and shift"])
def test_sums_and_exponentials_of_a_tile(epilogue, case, mode, options):
    chosen = {name: case[name] for name in options}
    found = run_epilogue(epilogue, mode, case["products"], labels=case["labels"], **chosen)
    z = case["products"][:T].clone()
    if "bias" in chosen:
        z[:, :V] += chosen["bias"].float()
    z *= SCALE
    z[:, V:] = float("-inf")
    rows = (case["labels"] >= 0).nonzero()[:, 0]
    expected_label = z[rows, case["labels"][rows]].clone()
    torch.testing.assert_close(found["label_logit"][rows], expected_label, rtol=0, atol=1e-6)
    z[rows, case["labels"][rows]] = float("-inf")
    width = 128 if mode == hopper.STATS else 256
    tiles = z.view(T, -1, width)
    shift = tiles.amax(2)
    if "row_shift" in chosen:
        own = chosen["row_shift"][:, None].expand_as(shift)
        shift = torch.where(shift <= own + 2, own, shift)
    torch.testing.assert_close(found["tile_shift"], shift.T, rtol=0, atol=1e-6)
    exps = (tiles - shift.masked_fill(shift.isneginf(), 0)[:, :, None]).exp()
    torch.testing.assert_close(found["tile_sum"], exps.sum(2).T, rtol=1e-5, atol=1e-6)
    if mode == hopper.EXPS:
        torch.testing.assert_close(found["out"][:T], exps.view(T, 512).bfloat16(), rtol=2**-7, atol=1e-6)
        assert found["out"][T:].isnan().all(), "rows past the last were written"


def test_gradient_of_a_tile(epilogue, case):
    products = case["products"].clone()
    # An ignored row is 0 even where its hidden state is not finite.
    products[140] = float("nan")
    lse = torch.linspace(5, 1e4, T, dtype=torch.float64)
    products[:T] += ((lse - 8) / SCALE).float()[:, None]
    grad = torch.linspace(-2, 2, T)
    found = run_epilogue(
        epilogue, hopper.GRADIENT, products, labels=case["labels"], lse=lse, grad=grad, bias=case["bias"]
    )["out"]
    z = SCALE * (products[:T, :V] + case["bias"].float()).double()
    onehot = torch.nn.functional.one_hot(case["labels"].clamp(min=0), V)
    expected = SCALE * grad.double()[:, None] * (onehot - (z - lse[:, None]).exp())
    expected[case["labels"] < 0] = 0
    # Near 1e4 the products themselves are fp32: 1e-3 of a probability.
    torch.testing.assert_close(found[:T, :V].double(), expected, rtol=2**-7, atol=2e-3)
    assert (found[:T, V:] == 0).all()
    assert (found[140] == 0).all()
    assert found[T:].isnan().all()


# ---------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory) -> dict[int, Path]:
    """By NVRTC, which builds of torch for CUDA bring."""
    try:
        compiler = hopper._Compiler()
    except hopper.HopperError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cubins")
    found = {}
    for mode in range(3):
        found[mode] = folder / f"{mode}.cubin"
        found[mode].write_bytes(compiler.compile(FILES, hopper.options(torch.bfloat16, mode)))
    return found


@pytest.mark.parametrize("mode", range(3))
def test_the_loop_is_free_of_fences_and_spills(machine_code, mode):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", machine_code[mode]], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([tool, "-res-usage", machine_code[mode]], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
    products = [i for i, name in enumerate(instructions) if name.startswith("HGMMA")]
    assert products
    assert all(instructions[i].startswith("HGMMA.64x256x16.F32.BF16") for i in products)
    loop = instructions[products[0] : products[-1]]
    # An arrival that releases to the cluster by a fence of the whole GPU would wait in every step.
    assert not [name for name in loop if name.startswith(("MEMBAR", "ERRBAR", "CCTL", "STL", "LDL"))]
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // hopper.THREADS
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= 16, "accumulators are spilled"
    assert any(name.startswith("UTMALDG") and "MULTICAST" in name for name in instructions)
