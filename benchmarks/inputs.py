"""What the benchmarks of the head run on: hidden states and a weight, real ones or random ones.

Legend: N rows, D features, V vocabulary, S responses, d and v the sizes of the model that real ones come from.

The softmax decides how much of a gradient is left after filtering and how much power a product draws, so real hidden
states come first: of the model in ``DPO_BENCH_MODEL``, of the one beside a development checkout, or of one that is
trained here for some seconds. A model smaller than the benchmark's shape is placed in it without changing a logit:
states and weight go through one isometry into D features, and the vocabulary is filled up with rare tokens.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import HeadShape

KINDS = ("real", "random")
MODEL_BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "models" / "tiny-chat-llama"


class States(NamedTuple):
    """fp32: hidden states [N, d] that predict labels [N] under a weight [v, d], and where they are from."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    source: str


@dataclass(frozen=True)
class HeadInputs:
    """Completion rows of whole pairs: chosen_0, rejected_0, chosen_1, ..., every response ``length`` rows long.

    One length for all, so that peers which take padded batches get no padding.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    ref_hidden_ND: Tensor
    """Hidden states of the reference, which shares the weight."""
    length: int
    source: str

    @property
    def shape(self) -> HeadShape:
        N, D = self.hidden_ND.shape
        return HeadShape(N, D, self.weight_VD.shape[0])

    @property
    def cu_responses(self) -> Tensor:
        """int32 on the CPU."""
        return torch.arange(0, self.shape.T + 1, self.length, dtype=torch.int32)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> HeadInputs:
        moved = {name: getattr(self, name).to(device, dtype) for name in ("hidden_ND", "weight_VD", "ref_hidden_ND")}
        return replace(self, labels_N=self.labels_N.to(device), **moved)


def make_inputs(kind: str, shape: HeadShape, *, length: int, seed: int = 0, device="cpu") -> HeadInputs:
    """Inputs of a shape in fp32: ``real``, or ``random`` with a softmax that is nearly uniform."""
    assert shape.T % (2 * length) == 0, f"{shape.T} rows are no whole pairs of responses of {length}"
    generator = torch.Generator(device).manual_seed(seed)
    states = fit(model_states(shape.T), shape, generator) if kind == "real" else random_states(shape, generator)
    noise = _normal(*states.hidden.shape, generator) * states.hidden.std()
    # Near enough that no pair saturates: the reference is what the policy started from.
    reference = states.hidden + 0.01 * noise
    return HeadInputs(states.hidden, states.weight, states.labels, reference, length, states.source)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=generator, device=generator.device)


def random_states(shape: HeadShape, generator: torch.Generator) -> States:
    """Normal states and weights with logits of unit variance, as at initialisation."""
    N, D, V = shape
    weight = _normal(V, D, generator) / math.sqrt(D)
    source = "random: normal, logits of unit variance, labels uniform"
    return States(_normal(N, D, generator), weight, _integers(V, N, generator), source)


def fit(states: States, shape: HeadShape, generator: torch.Generator) -> States:
    """Place a model's states in another shape; in a larger one the logits of its own vocabulary stay as they are.

    Tokens that fill up the vocabulary are drawn from the model's, with logits lowered so far that together they weigh
    about a third of what the model's own tokens do. What is larger than the shape is cut off.
    """
    N, D, V = shape
    # Where the generator draws, the rest is computed.
    hidden, weight, labels = (t.to(generator.device) for t in states[:3])
    hidden, weight, labels = hidden[:N, :D], weight[:V, :D], labels[:N] % V
    v, d = weight.shape
    if v < V:
        drawn = weight[_integers(v, V - v, generator)]
        drawn = drawn + 0.3 * weight.std() * _normal(*drawn.shape, generator)
        mean = hidden.mean(dim=0)
        lowered = math.log((V - v) / v) + 1.0
        weight = torch.cat([weight, drawn - lowered * mean / mean.square().sum()])
    if d < D:
        isometry = torch.linalg.qr(_normal(D, d, generator)).Q.T
        hidden, weight = hidden @ isometry, weight @ isometry
    own = tuple(reversed(states.weight.shape))
    placed = "" if own == (D, V) else f" (D={own[0]} V={own[1]}) placed in D={D} V={V}"
    return States(hidden.contiguous(), weight.contiguous(), labels, states.source + placed)


def model_states(count: int) -> States:
    """At least ``count`` hidden states of the best model at hand, on text that it may have been trained on."""
    chosen = os.environ.get("DPO_BENCH_MODEL")
    if chosen:
        return read_states(Path(chosen), count)
    if MODEL_BESIDE_CHECKOUT.is_dir():
        return read_states(MODEL_BESIDE_CHECKOUT, count)
    with tempfile.TemporaryDirectory() as folder:
        texts = train_model(Path(folder))
        states = read_states(Path(folder), count, texts)
    return states._replace(source="a Llama trained here for some seconds on synthetic dialogues")


def train_model(folder: Path) -> list[str]:
    """Train the demo's starting model, briefly; returns its texts."""
    from engine.demo.base_model import pretrain
    from engine.demo.corpus import dialogues
    from engine.demo.size import ModelSize

    corpus = list(dialogues(600, seed=0))
    pretrain(corpus, ModelSize(steps=60, batch=16), seed=0, folder=folder)
    return [message["content"] for dialogue in corpus for message in dialogue]


@torch.no_grad()
def read_states(folder: Path, count: int, texts: list[str] | None = None) -> States:
    """Final hidden states of the model in ``folder`` and its head's weight; texts repeat when they are too few."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if texts is None:
        texts = default_texts()
    hidden, labels, found = [], [], 0
    while found < count:
        before = found
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
            if ids.shape[1] < 2:
                continue
            hidden.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1])
            labels.append(ids[0, 1:])
            found += ids.shape[1] - 1
            if found >= count:
                break
        assert found > before, "the texts have no tokens"
    weight = model.get_output_embeddings().weight.detach().clone()
    return States(torch.cat(hidden)[:count], weight, torch.cat(labels)[:count], f"hidden states of {folder.name}")


def default_texts() -> list[str]:
    """Prompts with their chosen answers: Anthropic HH where it is at hand, generated words otherwise."""
    from benchmarks.end_to_end import benchmark_rows

    _, rows, _ = benchmark_rows()
    return [row["prompt"] + row["chosen"] for row in rows]


class SoftmaxShape(NamedTuple):
    """How peaked the softmax of some inputs is."""

    entropy: float
    """Mean, in nats."""
    nll: float
    """Mean of -log p[label], in nats."""
    surviving: float
    """Share of 128 x 256 tiles in which a gradient of the logits is above 2^-12: what a threshold filter keeps."""

    def __str__(self) -> str:
        return (
            f"entropy {self.entropy:.2f} nats, NLL {self.nll:.2f} nats, "
            f"{self.surviving:.1%} of gradient tiles above 2^-12"
        )


@torch.no_grad()
def softmax_shape(inputs: HeadInputs) -> SoftmaxShape:
    """Measured in fp32 over all rows, 128 at a time."""
    weight_DV = inputs.weight_VD.float().T
    V = weight_DV.shape[1]
    entropy = nll = kept = tiles = 0.0
    for start in range(0, inputs.shape.T, 128):
        labels = inputs.labels_N[start : start + 128, None]
        logp = (inputs.hidden_ND[start : start + 128].float() @ weight_DV).log_softmax(-1)
        p = logp.exp()
        entropy -= (p * logp).sum().item()
        nll -= logp.gather(1, labels).sum().item()
        gradient = p.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=p.dtype)).abs_().amax(dim=0)
        largest = torch.nn.functional.pad(gradient, (0, -V % 256)).view(-1, 256).amax(dim=1)
        kept += (largest > 2.0**-12).sum().item()
        tiles += len(largest)
    return SoftmaxShape(entropy / inputs.shape.T, nll / inputs.shape.T, kept / tiles)
