"""Everything that turns hidden states and a head into log-probs or a DPO loss, ours and the others', in one form.

Legend: N rows, D features, V vocabulary, S responses, P pairs, L rows of a response.

A contender is prepared once (layouts that its interface asks for, compilation wrappers) and then run any number of
times; a run is one forward, and one backward where the task has gradients. What cannot run here raises
``UnavailableError``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_table import first_line
from benchmarks.inputs import HeadInputs
from benchmarks.tasks import FROZEN, GRADIENTS, LOGPS, LOSS
from dpo_kernels import linear_dpo_loss, linear_logps, native, preference_loss

BETA = 0.1
FILTER_MASS = 1e-3
"""Budget of the filtered contender."""


class UnavailableError(Exception):
    """Why a contender cannot run here."""


class Outcome(NamedTuple):
    """What one run returns, in the order of ``HeadInputs``."""

    logps_N: Tensor | None = None
    """Per token."""
    logps_S: Tensor | None = None
    """Per response, from contenders that return no more."""
    dX_ND: Tensor | None = None
    dW_VD: Tensor | None = None


class Task(NamedTuple):
    """Inputs, and what is asked of a contender."""

    name: str
    inputs: HeadInputs
    ref_logps_S: Tensor
    """fp32, in the order of the responses."""
    upstream_N: Tensor
    """fp32: the upstream gradient of ``GRADIENTS``."""

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight, requiring the gradients that the task asks for; they share the inputs' memory."""
        hidden = self.inputs.hidden_ND.detach().requires_grad_(self.name != LOGPS)
        weight = self.inputs.weight_VD.detach().requires_grad_(self.name in (LOSS, GRADIENTS))
        return hidden, weight

    def backward(self, logps_N: Tensor, hidden: Tensor, weight: Tensor) -> Outcome:
        """From per-token log-probs to the task's gradients."""
        if self.name == LOGPS:
            return Outcome(logps_N)
        if self.name == GRADIENTS:
            return Outcome(logps_N.detach(), None, *_gradients(logps_N, hidden, weight, self.upstream_N))
        logps_S = logps_N.view(-1, self.inputs.length).sum(dim=1)
        return Outcome(logps_N.detach(), None, *_gradients(dpo_loss(logps_S, self.ref_logps_S), hidden, weight))


def dpo_loss(logps_S: Tensor, ref_logps_S: Tensor) -> Tensor:
    """Mean sigmoid loss of interleaved responses."""
    return preference_loss(logps_S[0::2], logps_S[1::2], ref_logps_S[0::2], ref_logps_S[1::2], beta=BETA).loss.mean()


def _gradients(output: Tensor, hidden: Tensor, weight: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    return torch.autograd.grad(output, wanted, upstream)


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    products: int
    """Stated work, in products of 2 N D V operations."""
    prepare: Callable[[Task], Callable[[], Outcome]]
    note: str = ""
    has_reference: bool = True
    """False for a loss whose reference log-probs are all 0."""
    compiles: bool = False
    """Whether the first run compiles, and so takes memory that later runs do not."""
    ours: bool = False
    measure: Callable[[Task], str] | None = None
    """What its work depends on, of these inputs: goes before the note."""


def contenders(task: str) -> list[Contender]:
    """Everyone who can do a task, ours last. Forward is 1 product, and so is each gradient and each recomputation."""
    if task == LOGPS:
        return [
            Contender("naive logits", 1, _per_token(naive_logps)),
            Contender("torch.compile of naive", 1, _per_token(compiled_logps), compiles=True),
            Contender("F.linear_cross_entropy", 1, _per_token(core_logps), "reduction='none', chunked"),
            Contender("TRL ChunkedLogProbFunction", 1, _per_token(trl_logps)),
            Contender("CCE", 1, _per_token(cce_logps)),
            Contender("ours: linear_logps", 1, _per_token(our_logps), ours=True),
        ]
    frozen = task == FROZEN
    gradients = 1 if frozen else 2
    found = [
        Contender("naive logits", 1 + gradients, _per_token(naive_logps)),
        Contender("torch.compile of naive", 1 + gradients, _per_token(compiled_logps), compiles=True),
        Contender("F.linear_cross_entropy", 2 + gradients, _per_token(core_logps), "reduction='none', chunked"),
        Contender("TRL ChunkedLogProbFunction", 2 + gradients, _per_token(trl_logps)),
        Contender("CCE cce", 2 + gradients, _per_token(cce_logps), "skips gradient tiles below a threshold"),
        Contender("CCE cce_exact", 2 + gradients, _per_token(exact_cce_logps)),
    ]
    if task == LOSS:
        note = "with its reference head (1 product)"
        found.append(Contender("Liger DPO", 4, liger_with_reference, note, compiles=True))
    if task != GRADIENTS:
        options: dict[str, Any] = {"note": "reference log-probs all 0", "has_reference": False, "compiles": True}
        found.append(Contender("Liger DPO, no reference", 1 + gradients, liger_alone, **options))
    if task == LOSS:
        found.append(Contender("ours: linear_logps", 4, _per_token(our_logps), "any loss", ours=True))
    if task == GRADIENTS:
        filtered: dict[str, Any] = {"note": f"filter_mass={FILTER_MASS}; G at s=1", "ours": True}
        return [
            *found,
            Contender("ours: linear_logps", 4, _per_token(our_logps), ours=True),
            Contender(
                "ours: linear_logps, filtered", 4, _per_token(our_filtered_logps), measure=surviving_share, **filtered
            ),
        ]
    return [*found, Contender("ours: linear_dpo_loss", 1 + gradients, our_loss, ours=True)]


def contenders_on_cpu(task: str) -> list[Contender]:
    """As ``contenders``, and ours with native code by its name, whatever ``auto`` takes."""
    frozen = task == FROZEN
    if task in (LOSS, FROZEN):
        return [*contenders(task), Contender("ours: linear_dpo_loss, native", 3 - frozen, native_loss, ours=True)]
    products = 1 if task == LOGPS else 4
    return [*contenders(task), Contender("ours: linear_logps, native", products, _per_token(native_logps), ours=True)]


Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, D], weight [V, D], labels [N]) -> log-probs [N]."""


def _per_token(make: Callable[[Task], Logps]) -> Callable[[Task], Callable[[], Outcome]]:
    def prepare(task: Task) -> Callable[[], Outcome]:
        logps = make(task)

        def run() -> Outcome:
            hidden, weight = task.leaves()
            with torch.set_grad_enabled(task.name != LOGPS):
                return task.backward(logps(hidden, weight, task.inputs.labels_N), hidden, weight)

        return run

    return prepare


def _naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def naive_logps(task: Task) -> Logps:
    return _naive


def compiled_logps(task: Task) -> Logps:
    reason = no_compiler(task.inputs.hidden_ND.device.type)
    if reason:
        raise UnavailableError(reason)
    return torch.compile(_naive)


@functools.cache
def no_compiler(device_type: str) -> str | None:
    """Why torch.compile does not work here, or None."""
    try:
        torch.compile(lambda x: x.exp().sum())(torch.ones(4, device=device_type))
    except Exception as error:
        return f"torch.compile does not work here: {first_line(error)}"
    return None


def our_logps(task: Task) -> Logps:
    return linear_logps


def native_logps(task: Task) -> Logps:
    _check_native()
    return functools.partial(linear_logps, impl="native")


def _check_native() -> None:
    if obstacle := native.why_not():
        raise UnavailableError(obstacle)


def our_filtered_logps(task: Task) -> Logps:
    return functools.partial(linear_logps, filter_mass=FILTER_MASS)


def surviving_share(task: Task) -> str:
    """Stated work with the share s of tiles that the filter keeps here, and the largest mass that a row loses."""
    inputs = task.inputs
    names = ("kept_tiles", "dropped_mass")
    with torch.no_grad():
        out = linear_logps(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, filter_mass=FILTER_MASS, stats=names)
    kept, dropped = out.stats["kept_tiles"].mean().item(), out.stats["dropped_mass"].max().item()
    return f"1+3s G, s={kept:.3f}, at most {dropped:.1e} of a row dropped"


def core_logps(task: Task) -> Logps:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=options)


def trl_logps(task: Task) -> Logps:
    function = imported("trl.kernels", "trl").ChunkedLogProbFunction
    width = imported("trl.trainer.utils", "trl")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda h, w, y: function.apply(h, w, None, y, 1.0, width, None, 1.0, ())[0]


def cce_logps(task: Task) -> Logps:
    function = _cce(task)
    return lambda h, w, y: -function(h, w, y, reduction="none", impl="cce")


def exact_cce_logps(task: Task) -> Logps:
    function = _cce(task)
    presets = "filter_e_grad" in inspect.signature(function).parameters
    options: dict[str, Any] = {"impl": "cce_exact"} if presets else {"impl": "cce", "filter_eps": None}
    return lambda h, w, y: -function(h, w, y, reduction="none", **options)


def _cce(task: Task) -> Callable[..., Tensor]:
    if task.inputs.hidden_ND.device.type != "cuda":
        raise UnavailableError("CCE's kernels need CUDA")
    return imported("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy


def native_loss(task: Task) -> Callable[[], Outcome]:
    _check_native()
    return our_loss(task, "native")


def our_loss(task: Task, impl: str = "auto") -> Callable[[], Outcome]:
    cu_responses = task.inputs.cu_responses

    def run() -> Outcome:
        hidden, weight = task.leaves()
        options: dict[str, Any] = {"beta": BETA, "impl": impl}
        out = linear_dpo_loss(hidden, weight, task.inputs.labels_N, cu_responses, task.ref_logps_S, **options)
        return Outcome(None, out.logps, *_gradients(out.loss, hidden, weight))

    return run


def liger_with_reference(task: Task) -> Callable[[], Outcome]:
    return _liger(task, use_ref_model=True)


def liger_alone(task: Task) -> Callable[[], Outcome]:
    return _liger(task, use_ref_model=False)


def _liger(task: Task, *, use_ref_model: bool) -> Callable[[], Outcome]:
    module = imported("liger_kernel.chunked_loss", "liger-kernel")
    compiled = no_compiler(task.inputs.hidden_ND.device.type) is None
    loss_fn = module.LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=use_ref_model, compiled=compiled)
    length = task.inputs.length
    hidden_SLD = _chosen_first(task.inputs.hidden_ND, length)
    labels_SL = _chosen_first(task.inputs.labels_N[:, None], length)[..., 0].contiguous()
    reference = {}
    if use_ref_model:
        reference = {"ref_input": _chosen_first(task.inputs.ref_hidden_ND, length), "ref_weight": task.inputs.weight_VD}

    def run() -> Outcome:
        _, weight = task.leaves()
        hidden = hidden_SLD.detach().requires_grad_()
        loss, (chosen, rejected, *_) = loss_fn(weight, hidden, labels_SL, **reference)
        dX_SLD, *dW = _gradients(loss, hidden, weight)
        return Outcome(None, torch.stack([chosen, rejected], dim=1).flatten(), _interleaved(dX_SLD), *dW)

    return run


def _chosen_first(rows_ND: Tensor, length: int) -> Tensor:
    """[S, L, D], all chosen responses before all rejected ones."""
    return rows_ND.view(-1, 2, length, rows_ND.shape[1]).transpose(0, 1).flatten(0, 1).contiguous()


def _interleaved(rows_SLD: Tensor) -> Tensor:
    """Undo ``_chosen_first``. Only a view, so that no contender pays for it."""
    S, L, D = rows_SLD.shape
    return rows_SLD.view(2, S // 2, L, D).transpose(0, 1)


def imported(module: str, package: str) -> Any:
    """A peer's module, or ``UnavailableError`` with what import says."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} does not import: {first_line(error)}") from error


def versions() -> dict[str, str]:
    """Installed versions of torch and of every peer."""
    names = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
