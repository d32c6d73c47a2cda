"""Arguments of the tuner, and what it prints."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dpo_kernels.tuning.errors import TuningError

MODEL_SHAPES = ((2048, 128256), (4096, 128256), (3584, 152064), (2304, 256000), (4096, 32768))
"""(hidden size, vocabulary) of Llama 3.2 1B, Llama 3 8B, Qwen 2.5 7B, Gemma 2 2B and Mistral 7B."""
DRY_SHAPE, DRY_ROWS = (32, 96), 24
ROWS = 8192
KERNELS = ("linear_stats", "linear_exps", "slice_grad")
DTYPES = ("bfloat16", "float16", "float32")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TuningError(f"{message}; see `{self.prog} --help`")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The arguments of the tuner."""
    parser = _Parser(
        prog=prog,
        description="Time tile shapes of the Triton kernels on this machine's NVIDIA GPU, and keep those that are "
        "faster than the shipped ones in a table that every later run reads. Works on tensors of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--hidden-size", type=_positive, metavar="D", help="of one model, with --vocab-size; default: a list of models"
    )
    parser.add_argument("--vocab-size", type=_positive, metavar="V", help="of one model, with --hidden-size")
    parser.add_argument(
        "--rows", type=_positive, default=ROWS, metavar="N", help="completion tokens of a call (default: %(default)s)"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL", help=_kernel_help())
    parser.add_argument(
        "--heavy",
        action="store_true",
        help="tune what runs with a softcap or token statistics, in place of what runs without",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="table to write; default: the one that runs read")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, in Triton's interpreter, on tiny shapes; writes only to --output",
    )
    return parser


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Tune, print what was gained, and return 0, or 1 when a candidate computed wrong numbers. Raises TuningError."""
    try:
        options = build_parser(prog).parse_args(arguments)
    except SystemExit as done:
        # --help prints and leaves
        return int(done.code or 0)
    shapes = _shapes(options)
    if options.dry_run:
        # Read by triton when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        # numpy reports what lanes beyond the mask compute.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
    import torch

    from dpo_kernels.kernels.tile_config import TileTableError

    try:
        return _tune(options, shapes)
    except TileTableError as error:
        raise TuningError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise TuningError("out of GPU memory; give fewer --rows, or one model by its sizes") from error


def _tune(options: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> int:
    import torch

    device = _device(dry_run=options.dry_run)
    from dpo_kernels.kernels.tile_config import TABLE_VARIABLE, default_table_path, device_arch, user_table_path
    from dpo_kernels.tuning.problems import problem_groups
    from dpo_kernels.tuning.search import Search
    from dpo_kernels.tuning.table import check_writable, write_entry

    path = options.output
    if path is None and not options.dry_run:
        path = user_table_path()
        if path is None:
            if os.environ.get(TABLE_VARIABLE):
                reason = f"{TABLE_VARIABLE}=shipped leaves no table to write; unset it, or"
            else:
                reason = "there is no home folder to keep a table in;"
            raise TuningError(f"{reason} name one with --output")
    if path is not None:
        check_writable(path)
    search = Search(device, dry_run=options.dry_run)
    print(f"{search.machine}; {options.dtype}, {options.rows:,} rows; table: {path or 'none, a dry run'}", flush=True)
    results = []
    dtype = getattr(torch, options.dtype)
    groups = problem_groups(options.kernels, shapes, dtype=dtype, rows=options.rows, heavy=options.heavy)
    for group in groups:
        result = search.tune(group)
        results.append(result)
        print(result.line(), flush=True)
        if path is not None:
            write_entry(path, device_arch(device), result)
    print("\n" + "\n".join(_report(results)))
    if options.dry_run:
        print("\nno times and no gain: those of the interpreter say nothing of a GPU")
    read = user_table_path() or default_table_path()
    if path is not None and (read is None or path.resolve() != read.resolve()):
        print(f"\nto use it: {TABLE_VARIABLE}={path}")
    return 1 if any(result.wrong for result in results) else 0


def _device(*, dry_run: bool):  # type: ignore[no-untyped-def]
    import torch

    try:
        from dpo_kernels.kernels.launch import INTERPRETING
    except ImportError as error:
        raise TuningError(f"tuning needs triton ({error}): pip install 'triton>=3.6'") from error
    if dry_run:
        if not INTERPRETING:
            raise TuningError("triton was imported before --dry-run could ask for its interpreter; start a new process")
        return torch.device("cpu")
    if INTERPRETING:
        raise TuningError("TRITON_INTERPRET=1 is set, so that nothing would be compiled; unset it, or give --dry-run")
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise TuningError("tuning needs an NVIDIA GPU, and torch sees none here; --dry-run shows the steps on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def _shapes(options: argparse.Namespace) -> Sequence[tuple[int, int]]:
    given = (options.hidden_size, options.vocab_size)
    if (given[0] is None) != (given[1] is None):
        raise TuningError("--hidden-size and --vocab-size go together: the sizes of one model's head")
    if options.dry_run:
        options.rows = min(options.rows, DRY_ROWS)
    if given[0] is not None:
        return (given,)
    return (DRY_SHAPE,) if options.dry_run else MODEL_SHAPES


def _report(results) -> list[str]:  # type: ignore[no-untyped-def]
    lines = [
        "| kernel | D | V | shipped, ms | best, ms | gain | tile |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    return lines + [row for result in results for row in result.table_rows()]


def _kernel_help() -> str:
    return f"of {', '.join(KERNELS)}; default: all"


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
