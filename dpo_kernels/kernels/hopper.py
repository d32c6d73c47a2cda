"""Calls ``csrc/hopper_logits.cu``: tiles of logits by the instructions that Hopper alone has.

The source is compiled when it is first needed, by NVRTC, which comes with every CUDA build of torch, and kept in the
cache folder. Where that is not possible the Triton kernels, which compute the same, are used, and `why_not` says why.

``DPO_HOPPER_KERNELS=none`` does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpo_kernels.head import Head
from dpo_kernels.kernels.tile_config import HOPPER_TILE, default_table_path

STATS, EXPS, GRADIENT = 0, 1, 2
"""What becomes of a tile: its sums; its sums and exponentials; the gradient of its logits."""
(ROWS, COLUMNS), DEPTH = HOPPER_TILE, 64
"""Of a block's tile, and features of a step."""
CLUSTER = 2
"""Blocks that share columns."""
FEW_TILES = 19
"""An empty tile beside so few costs more than the 5% that these kernels are faster."""
THREADS = 384
DIGEST_BYTES = hashlib.sha256().digest_size
SHARED_BYTES = 4 * (ROWS + COLUMNS) * DEPTH * 2 + 1024 + 128
"""Four stages of tiles, room to align them, barriers."""
VARIABLE = "DPO_HOPPER_KERNELS"
DTYPES = (torch.bfloat16, torch.float16)
_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE, _PACKAGE.parent / "csrc")
"""Where an installation has the sources, and a checkout."""
SOURCE, HEADERS = "hopper_logits.cu", ("hopper_machine.cuh", "hopper_epilogue.cuh")


class HopperError(RuntimeError):
    """What a library said."""


class _TensorMap(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


class _Args(ctypes.Structure):
    """``Args`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("labels", "row_shift", "tile_shift", "tile_sum", "label_logit")),
        *((name, ctypes.c_void_p) for name in ("lse", "grad", "out", "bias")),
        *((name, ctypes.c_int64) for name in ("out_stride", "first_col", "ignore_index")),
        *((name, ctypes.c_int) for name in ("T", "V", "D", "group")),
        *((name, ctypes.c_float) for name in ("scale", "shift_slack")),
    ]


def takes(hidden_TD: Tensor) -> bool:
    """Whether these kernels run on such hidden states, given that tensor descriptors can describe them."""
    if not _on_device(hidden_TD.device) or isinstance(hidden_TD, FakeTensor):
        return False
    # Rows come in pairs of tiles: where many of them would be empty, Triton's single ones are faster.
    tiles = -(-hidden_TD.shape[0] // ROWS)
    if tiles % CLUSTER and tiles < FEW_TILES:
        return False
    return why_not(hidden_TD.device, hidden_TD.dtype) is None


def _on_device(device: torch.device) -> bool:
    return device.type == "cuda"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on tensors of a device and dtype; None when they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "they are for a GPU of compute capability 9.0"
    if dtype not in DTYPES:
        return f"they are for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _why_not(device.index if device.index is not None else torch.cuda.current_device(), dtype)


@functools.cache
def _why_not(index: int, dtype: torch.dtype) -> str | None:
    if os.environ.get(VARIABLE) == "none":
        return f"{VARIABLE}=none hides them"
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) != (9, 0):
        return "they are for a GPU of compute capability 9.0"
    try:
        with torch.cuda.device(index):
            # All that may be launched later: there a thread may be capturing a graph, or nobody catch the error.
            for mode in (STATS, EXPS, GRADIENT):
                _function(index, dtype, mode)
    except (HopperError, OSError) as error:
        return str(error)
    return None


def launch(
    mode: int,
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    *,
    first_col: int,
    ignore_index: int,
    group: int,
    shift_slack: float = 0.0,
    out: Tensor | None = None,
    **tensors: Tensor | None,
) -> None:
    """Fill what the mode writes, from hidden states and a head without a softcap, all in one dtype.

    `tensors` by the names of ``Args``: `lse` is fp64, the others fp32, all contiguous; `out` is in the dtype of the
    hidden states and has whole tiles of columns. `group` tiles of CLUSTER * ROWS rows pass over the columns together.
    """
    (T, D), V = hidden_TD.shape, head.weight_VD.shape[0]
    assert head.softcap is None
    for tensor in (head.weight_VD, head.bias_V, out):
        assert tensor is None or tensor.dtype == hidden_TD.dtype
    for name, tensor in tensors.items():
        expected = torch.float64 if name == "lse" else torch.float32
        assert tensor is None or (tensor.dtype == expected and tensor.is_contiguous()), name
    if out is not None:
        # Written in whole tiles of columns, 16 bytes at a time.
        assert out.shape[1] >= -(-V // COLUMNS) * COLUMNS
        assert out.stride(1) == 1
        assert out.stride(0) % 8 == 0
        assert out.data_ptr() % 16 == 0
    if mode != GRADIENT:
        partials = (-(-V // COLUMNS) * (1 if mode == EXPS else 2), T)
        assert all(t is not None and t.shape == partials for t in map(tensors.get, ("tile_shift", "tile_sum")))
    labels_T = labels_T.to(torch.int64).contiguous()
    args = _Args(
        labels=labels_T.data_ptr(),
        bias=None if head.bias_V is None else head.bias_V.data_ptr(),
        out=None if out is None else out.data_ptr(),
        out_stride=0 if out is None else out.stride(0),
        first_col=first_col,
        ignore_index=ignore_index,
        T=T,
        V=V,
        D=D,
        group=group,
        scale=head.slope,
        shift_slack=shift_slack,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    maps = [_tensor_map(hidden_TD, ROWS), _tensor_map(head.weight_VD, COLUMNS // CLUSTER)]
    parameters = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in (*maps, args)))
    index, multiprocessors, stream = _place(hidden_TD.device)
    with torch.cuda.device(index):
        _enter_context(index)
        function = _function(index, hidden_TD.dtype, mode)
        blocks = CLUSTER * min(-(-T // (ROWS * CLUSTER)) * -(-V // COLUMNS), multiprocessors // CLUSTER)
        shape = (blocks, 1, 1, THREADS, 1, 1)
        result = _driver().cuLaunchKernel(function, *shape, SHARED_BYTES, ctypes.c_void_p(stream), parameters, None)
        _check(result, "cuLaunchKernel")


def _place(device: torch.device) -> tuple[int, int, int]:
    """Index of a device, its multiprocessors, its current stream."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    return index, multiprocessors, torch.cuda.current_stream(index).cuda_stream


def _tensor_map(matrix: Tensor, rows: int) -> _TensorMap:
    """Describes tiles of `rows` rows and DEPTH features, with a swizzle of 128 bytes and zeros outside."""
    found = _TensorMap()
    kind = {torch.float16: 6, torch.bfloat16: 9}[matrix.dtype]
    sizes = (ctypes.c_uint64 * 2)(matrix.shape[1], matrix.shape[0])
    strides = (ctypes.c_uint64 * 1)(matrix.stride(0) * 2)
    box, steps = (ctypes.c_uint32 * 2)(DEPTH, rows), (ctypes.c_uint32 * 2)(1, 1)
    no_interleave, swizzle_128, promote_256, zeros = 0, 3, 3, 0
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(found), kind, 2, ctypes.c_void_p(matrix.data_ptr()), sizes, strides, box, steps,
            no_interleave, swizzle_128, promote_256, zeros,
        ),
        "cuTensorMapEncodeTiled",
    )  # fmt: skip
    return found


@functools.cache
def _function(index: int, dtype: torch.dtype, mode: int) -> ctypes.c_void_p:
    """The kernel for one mode, in the context of the current device, whose index it is."""
    code = compiled(dtype, mode)
    _enter_context(index)
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"hopper_logits_kernel"), "cuModuleGetFunction")
    max_dynamic_shared = 8
    _check(driver.cuFuncSetAttribute(function, max_dynamic_shared, SHARED_BYTES), "cuFuncSetAttribute")
    return function


def _enter_context(index: int) -> None:
    """The driver's functions need a current context; a thread that has not called CUDA yet has none."""
    driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        _check(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
        _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise HopperError(f"{what}: {(name.value or b'?').decode()}")


def compiled(dtype: torch.dtype, mode: int) -> bytes:
    """Machine code for one dtype and mode, from the cache folder or from NVRTC.

    Raises:
        HopperError: there is no source, no NVRTC, or it refuses the source.
    """
    files = sources()
    compiler = _Compiler()
    given = options(dtype, mode)
    key = hashlib.sha256(b"\0".join([*files.values(), *map(str.encode, given), compiler.version])).hexdigest()[:32]
    table = default_table_path()
    kept = None if table is None else table.with_name("kernels") / f"{key}.cubin"
    if kept is not None and (found := _kept(kept)) is not None:
        return found
    code = compiler.compile(files, given)
    if kept is not None:
        _keep(kept, code)
    return code


def _kept(path: Path) -> bytes | None:
    """Machine code that was kept, None where there is none or the file is not as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def sources() -> dict[str, bytes]:
    """The source and its headers, by name.

    Raises:
        HopperError: they are not there.
    """
    folder = next((folder for folder in FOLDERS if (folder / SOURCE).is_file()), None)
    if folder is None:
        raise HopperError(f"{SOURCE} is not installed")
    try:
        return {name: (folder / name).read_bytes() for name in (SOURCE, *HEADERS)}
    except OSError as error:
        raise HopperError(f"{error.filename}: {error.strerror}") from error


def options(dtype: torch.dtype, mode: int) -> list[str]:
    """Of NVRTC."""
    return ["--gpu-architecture=sm_90a", "-std=c++17", f"-DHALF={int(dtype == torch.float16)}", f"-DMODE={mode}"]


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all; a folder that cannot be written only means that the next process compiles again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes of several machines may share the folder.
        handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            os.unlink(part)
    except OSError:
        return


class _Compiler:
    """NVRTC."""

    def __init__(self) -> None:
        self.library = _nvrtc()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}".encode()

    def compile(self, files: dict[str, bytes], options: list[str]) -> bytes:
        """Machine code of the first of the files, which includes the others by name."""
        program = ctypes.c_void_p()
        (name, source), *headers = ((name.encode(), text) for name, text in files.items())
        names, texts = ((ctypes.c_char_p * len(headers))(*column) for column in zip(*headers, strict=True))
        made = self.library.nvrtcCreateProgram(ctypes.byref(program), source, name, len(headers), texts, names)
        self._check(made)
        try:
            given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
            if self.library.nvrtcCompileProgram(program, len(options), given):
                raise HopperError(f"NVRTC {self.version.decode()} refuses {SOURCE}: {self._log(program)}")
            return self._read(program, "CUBIN")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        lines = self._read(program, "ProgramLog").decode(errors="replace").splitlines()
        return next((line.strip() for line in lines if "error" in line), "no reason given")

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, result: int) -> None:
        if result:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise HopperError(f"NVRTC: {self.library.nvrtcGetErrorString(result).decode()}")


def _nvrtc() -> ctypes.CDLL:
    """NVRTC of the CUDA version that torch is built for: of NVIDIA's wheels, the loader's path, or a toolkit."""
    version = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{version}"
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    places: list[Any] = [path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    places += [name, f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/lib64/{name}"]
    for place in places:
        try:
            # It looks for its second half by name alone, wherever it lies itself.
            for builtins in sorted(Path(place).parent.glob(f"libnvrtc-builtins.so.{version}*")):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(place))
        except OSError:
            continue
    raise HopperError(f"{name} is not found")
