"""The ``dpo`` command: arguments, errors and exit codes. What each command does is in ``commands.py``."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from . import distributed, stop
from .config.fields import iter_keys, nearest
from .config.help import config_help
from .errors import SeveralErrors, Stopped, UserError, disk_fault, out_of_memory

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

_COMMANDS = {
    "demo": "train a tiny model from nothing, offline, in a few minutes",
    "init": "write a commented configuration file, or convert one of TRL",
    "check": "read the data and name every problem in it by row",
    "plan": "count packs, steps, padding and what sharing prompts saves; forecast memory and time",
    "precompute": "compute and store the reference log-probs that are not stored yet",
    "train": "train a model on preference pairs",
    "sweep": "train every combination of lists of values, and compare the runs on a page",
    "evaluate": "compute loss, rewards and accuracy on the evaluation split",
    "merge": "put an adapter into the weights of its base, as a model that stands alone",
    "push": "upload the model of a run, or a merged one, to the Hub",
    "report": "draw the curves of a run into an HTML page",
    "doctor": "say what is installed, what will run and why, and test it",
    "bench": "run the benchmarks; `dpo bench tune` finds the fastest tile shapes for this GPU",
}


_JOINT_COMMANDS = ("precompute", "train", "sweep", "evaluate")
"""What several processes that torchrun starts do together."""

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}

_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}

_SUMMARY = "\n".join(
    ["Direct preference optimisation: packed, prompt-shared, with stored reference log-probs.", "", "commands:"]
    + [f"  {name:<12}{text}" for name, text in _COMMANDS.items()]
)


class _Parser(argparse.ArgumentParser):
    """Reports through ``UserError``, and lists the configuration keys below its own options."""

    def __init__(self, *, takes_config: bool = False, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.takes_config = takes_config

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: CONFIG"):
            message = "CONFIG is missing; it comes first, before --section.key options"
        raise UserError(f"{message}; see `{self.prog} --help`")

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{config_help()}" if self.takes_config else text

    def own_flags(self) -> list[str]:
        """The options of this command, beside configuration keys."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (a check failed), 2 (a user error), 75 (a scheduler asked it
    to end: start it again), 130 (interrupted)."""
    _set_allocator()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        takes_requests = arguments[:1] and arguments[0] in _JOINT_COMMANDS
        with stop.listening() if takes_requests else nullcontext(), distributed.process_group():
            code = run(arguments)
        sys.stdout.flush()
        return code
    except distributed.PeerFailure as failure:
        # another process of the run prints why
        return failure.exit_code
    except Stopped as end:
        print(end, file=sys.stderr)
        return end.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output, such as `head`, is gone
        _discard_output()
        return FAILED
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        print("".join(f"error: {line}\n" for line in message.splitlines()), end="", file=sys.stderr)
        return USER_ERROR


def command() -> NoReturn:
    """What the shell runs: ``main``, and the end of the process."""
    from . import commands

    commands.is_whole_process = True
    distributed.leave(main())


def _set_allocator() -> None:
    """Let torch's CUDA allocator grow what it holds: packs differ in size, and blocks of fixed size would leave gaps.

    Read when the first CUDA tensor is made; whatever the user has set stands.
    """
    if not _ALLOCATOR_VARIABLES & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _discard_output() -> None:
    """Keep Python from complaining at exit about output that nothing can take."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str | None:
    """A line for each problem that the user can fix, or None for a fault of ours."""
    if isinstance(error, SeveralErrors):
        return "\n".join(filter(None, map(explain, error.errors)))
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return explain(cause)
        if (found := disk_fault(cause)) is not None:
            return f"{getattr(cause, 'filename', None) or 'output'}: {found.what}; {found.remedy()}"
        # by name, since importing torch to compare types is slow
        if type(cause).__name__ == "TileTableError":
            return str(cause)
    if (memory := out_of_memory(error)) is not None:
        return (
            f"out of {memory}: lower packing.tokens_per_pack, or set train.gradient_checkpointing to true "
            "(neither changes the result)"
        )
    return None


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, _Parser]]:
    """The parser of ``dpo`` and those of its commands."""
    parser = _Parser(
        prog="dpo",
        usage="dpo COMMAND ...",
        description=_SUMMARY,
        epilog="Every command has its own --help. --debug shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-kernels {_version()}")
    subparsers = parser.add_subparsers(dest="command", help=argparse.SUPPRESS, parser_class=_Parser)
    commands = {}
    for name, text in _COMMANDS.items():
        takes_config = name in ("check", "plan", "precompute", "train", "sweep", "evaluate")
        usage = f"dpo {name} CONFIG [options] [--section.key value ...]" if takes_config else None
        commands[name] = subparsers.add_parser(
            name, prog=f"dpo {name}", description=_sentence(text), usage=usage, takes_config=takes_config
        )
        if takes_config:
            commands[name].add_argument("config", metavar="CONFIG", help="configuration file, such as run.yaml")
    _add_options(commands)
    commands["demo"].set_defaults(dispatch=run)
    return parser, commands


def _add_options(commands: dict[str, _Parser]) -> None:
    commands["demo"].add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/demo"),
        help="folder to write to (default: %(default)s)",
    )
    init = commands["init"]
    init.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("run.yaml"),
        help="file to write; must not exist (default: %(default)s)",
    )
    init.add_argument(
        "--from",
        "--from-trl",
        dest="from_file",
        metavar="FILE",
        type=Path,
        help="convert the configuration, command or script of another trainer, which is recognised by what is in it",
    )
    init.add_argument(
        "--num-processes", metavar="N", type=_positive, help="processes of the other run, which multiply its batch"
    )
    _add_plan_options(commands["plan"])
    precompute = commands["precompute"]
    precompute.add_argument(
        "--export",
        metavar="FILE",
        type=Path,
        help="also write the training rows, with their reference columns, to a .jsonl, .jsonl.gz or .parquet file",
    )
    precompute.add_argument(
        "--import-columns",
        action="store_true",
        help="compute nothing, but check the columns ref_chosen_logps and ref_rejected_logps of the data against the "
        "reference model",
    )
    commands["train"].add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint in train.output_dir"
    )
    _add_result_options(commands["evaluate"], commands["report"])
    _add_model_options(commands["merge"], commands["push"])
    commands["bench"].add_argument(
        "pytest_args",
        metavar="ARG",
        nargs="*",
        help="passed to pytest, such as -k train; --publish writes to benchmarks/results, not to a scratch folder; or "
        "tune and its options, which `dpo bench tune --help` lists",
    )


def _add_result_options(evaluate: _Parser, report: _Parser) -> None:
    evaluate.add_argument(
        "--model", metavar="PATH", help="model or adapter to evaluate; the default is model.model_name_or_path"
    )
    evaluate.add_argument(
        "--samples",
        metavar="N",
        type=_positive,
        default=0,
        help="draw N answers of the model to each of train.sample_prompts prompts, and estimate from them how far it "
        "is from the reference (KL divergence)",
    )
    report.add_argument(
        "run_dirs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="output folder of a run; of several, one page compares them",
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="page of several runs, by default comparison.html beside the first",
    )


def _add_plan_options(plan: _Parser) -> None:
    plan.add_argument(
        "--memory",
        metavar="SIZE",
        type=_size,
        help="memory of a device, such as 80GiB: say the largest packing.tokens_per_pack that fits in it",
    )
    plan.add_argument(
        "--processes", metavar="N", type=_positive, default=1, help="devices that share the run (default: %(default)s)"
    )
    plan.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what kind of device to forecast for; the default is cuda with --memory, else what is here",
    )


def _add_model_options(merge: _Parser, push: _Parser) -> None:
    merge.add_argument(
        "source", metavar="RUN", help="output folder of a run, a checkpoint, or the folder of an adapter"
    )
    merge.add_argument(
        "--output", metavar="FOLDER", type=Path, help="folder to write; must not exist (default: RUN with -merged)"
    )
    merge.add_argument("--base", metavar="MODEL", help="the model to put it into; the default is what the run names")
    merge.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="what weights are stored in; auto is what the base is stored in",
    )
    push.add_argument("source", metavar="RUN", help="output folder of a finished run, or one that `dpo merge` wrote")
    push.add_argument("repo_id", metavar="REPO", help="owner/name on the Hub; it is created where it is absent")
    push.add_argument("--private", action="store_true", help="create it private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to upload to; the default is the main one")


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; its errors are raised."""
    arguments = list(arguments)
    parser, commands = build_parser()
    if not arguments:
        parser.print_help()
        return OK
    name = arguments[0]
    if not name.startswith("-") and name not in commands:
        close = nearest(name, commands)
        raise UserError(f"unknown command {name}; " + (f"did you mean {close}?" if close else "see `dpo --help`"))
    overrides: list[str] = []
    if name == "bench" and not {"-h", "--help"} & set(arguments[1:2]):
        arguments = [name, "--", *arguments[1:]]
    elif name in commands:
        arguments, overrides = _split_overrides(arguments, commands[name])
    try:
        options = parser.parse_args(arguments)
    except SystemExit as done:
        # --help and --version print and leave
        return int(done.code or OK)
    if options.command is None:
        parser.print_help()
        return OK
    if distributed.size() > 1 and options.command not in _JOINT_COMMANDS:
        raise UserError(f"dpo {options.command} runs in one process: start it without torchrun")
    # peft imports it where it is installed, and it warns of kernels for the CPU that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # torch.compile imports it, and it warns of a CUDA toolkit without a GPU, which nothing here is built with
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # deprecations inside other packages are nothing that a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.command in ("train", "sweep", "evaluate", "precompute", "demo", "merge"):
        _configure_logging()
    from . import commands as bodies

    return getattr(bodies, options.command)(options, overrides)


def _split_overrides(arguments: list[str], command: _Parser) -> tuple[list[str], list[str]]:
    """The arguments of the command itself, and the configuration overrides among them."""
    flags, keys = command.own_flags(), [f"--{key}" for key, _ in iter_keys()]
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for argument in arguments:
        # argparse would take it for an option of its own
        if re.match(r"-[\d.]", argument) and target is own and own[-1:] and own[-1] in flags:
            own[-1] += f"={argument}"
            continue
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            target = own if flag in flags else overrides
            if target is overrides and "." not in flag:
                known = flags + (keys if command.takes_config else [])
                if key := next((k for k in known if k.startswith(f"{flag}.")), None):
                    raise UserError(f"unknown option {flag}, which is a section: name a key of it, such as {key}")
                close = nearest(flag[2:].replace("-", "_"), [k[2:].replace("-", "_") for k in known])
                match = next((k for k in known if k[2:].replace("-", "_") == close), None)
                raise UserError(
                    f"unknown option {flag}; " + (f"did you mean {match}?" if match else f"see `{command.prog} --help`")
                )
        target.append(argument)
    if overrides and not command.takes_config:
        raise UserError(f"unknown option {overrides[0]}; `{command.prog}` takes no configuration keys")
    return own, overrides


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _configure_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for ours in (__package__, "dpo_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO if distributed.is_main() else logging.WARNING)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _size(text: str) -> int:
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(_UNITS)})", text.strip())
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2]])):
        units = ", ".join(_UNITS)
        raise argparse.ArgumentTypeError(f"must be a number above 0 and a unit ({units}), such as 80GiB, got {text}")
    return size


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _version() -> str:
    try:
        return metadata.version("dpo-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"
