"""How the processes of a run divide its model and its packs.

``shards`` ranks in a row hold one copy of the model between them, and every such row a copy of its own: one row is
plain sharding, rows of one hold whole models. ``context`` ranks in a row work on one pack together, each on a part of
its tokens. In either case the gradient of a parameter is the sum over all ranks, each of which adds what its tokens
give.

One process has the whole model and whole packs, so nothing here asks for a process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from . import distributed
from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class _Division:
    """What ``divide`` was told last."""

    def __init__(self) -> None:
        self.shards: int | None = None
        self.context = 1
        self.gathered: dtype | None = None
        self.meshes: dict[tuple[str, int], DeviceMesh] = {}
        self.groups: dict[int, ProcessGroup] = {}
        self.imagined: tuple[int, int, Any] | None = None
        """Ranks of a pack, the number of this one, and their group, where they are not there."""


_division = _Division()


def check(size: int, *, shards: int | None, context: int, gathered: dtype | None = None) -> None:
    """Raise a ``UserError`` where so many processes cannot be divided as ``divide`` is asked to."""
    if size % context:
        raise UserError(
            f"train.context_parallel={context} divides every pack over {context} processes, and there "
            f"{'is' if size == 1 else 'are'} {size}: start a multiple of {context} with torchrun --nproc-per-node "
            "(dpo plan: --processes), or set it to 1"
        )
    if size > 1 and shards is not None and size % shards:
        raise UserError(
            f"train.shards_per_replica={shards} does not divide the {size} processes: set it to a divisor of {size}, "
            "or to null for all of them"
        )
    if gathered is not None and (size == 1 or shards == 1):
        have, several = "every process holds the whole model", ""
        if size == 1:
            have, several = "one process holds its parameters whole", ", or start several (dpo plan: --processes)"
        raise UserError(
            f"train.param_dtype={str(gathered).removeprefix('torch.')} is what shards of parameters are gathered in, "
            f"and {have}: set it to float32{several}"
        )


def divide(*, shards: int | None, context: int, gathered: dtype | None = None) -> None:
    """Say how the processes divide the work from now on. Every rank must call this with the same arguments.

    Args:
        shards: ranks that hold one copy of the model between them; None for all.
        context: ranks that work on one pack.
        gathered: the dtype that shards travel and compute in; None for the one that they are kept in.

    Raises:
        UserError: the processes cannot be divided so.
    """
    check(distributed.size(), shards=shards, context=context, gathered=gathered)
    _division.shards, _division.context, _division.gathered = shards, context, gathered
    if context > 1 and context not in _division.groups:
        from torch.distributed import new_subgroups

        _division.groups[context], _ = new_subgroups(context)


def shards() -> int:
    """Ranks that hold one copy of the model between them."""
    return _division.shards or distributed.size() if distributed.size() > 1 else 1


def gathered_dtype() -> dtype | None:
    """The dtype that shards travel and compute in; None for the one that they are kept in."""
    return _division.gathered if distributed.size() > 1 else None


@contextmanager
def imagine(context: int, rank: int, group: Any) -> Iterator[None]:
    """Inside, packs are divided as on the ``rank``-th of so many ranks that are not there: for shapes alone.

    Args:
        group: what collectives of these ranks are asked of.
    """
    before, _division.imagined = _division.imagined, (context, rank, group)
    try:
        yield
    finally:
        _division.imagined = before


def context_size() -> int:
    """Ranks that work on one pack."""
    if _division.imagined is not None:
        return _division.imagined[0]
    return _division.context if distributed.size() > 1 else 1


def context_rank() -> int:
    """0-based number of this process among those that work on its pack; the first one speaks for the pack."""
    if _division.imagined is not None:
        return _division.imagined[1]
    return distributed.rank() % context_size()


def context_group() -> ProcessGroup:
    """The ranks that work on this process's pack."""
    if _division.imagined is not None:
        return _division.imagined[2]  # type: ignore[no-any-return]
    return _division.groups[context_size()]


def data_size() -> int:
    """Packs that are worked on at a time."""
    return distributed.size() // context_size()


def data_rank() -> int:
    """0-based number of this process's pack among those."""
    return distributed.rank() // context_size()


def copies() -> int:
    """Copies of the model that the ranks hold between them."""
    return distributed.size() // shards()


def shard_mesh(device_type: str) -> DeviceMesh:
    """The ranks that hold one copy of the model with this one. Every rank must call this."""
    return _mesh(device_type)["shard"]


def copy_group(device_type: str) -> ProcessGroup | None:
    """The ranks that hold what this one does of each copy, in the order of the copies; None for all ranks.

    Every rank must call this.
    """
    return None if copies() == distributed.size() else _mesh(device_type).get_group("copy")


def _mesh(device_type: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    key = (device_type, shards())
    if key not in _division.meshes:
        shape, names = (shards(),), ("shard",)
        if copies() > 1:
            shape, names = (copies(), *shape), ("copy", *names)  # type: ignore[assignment]
        _division.meshes[key] = init_device_mesh(device_type, shape, mesh_dim_names=names)
    return _division.meshes[key]


def norm_over_shards(norm: Tensor) -> Tensor:
    """The 2-norm of a vector that lies in parts on the ranks of each copy of the model, from the norm of each part."""
    if shards() == 1:
        return norm
    return _sum(distributed.each_rank(norm.double().square())[: shards()]).sqrt().to(norm.dtype)


def gather(value: T) -> list[T]:
    """What the ranks pass, once for each pack that is worked on; pickled."""
    return distributed.gather(value)[:: context_size()]


def sum_over_packs(values: Tensor) -> Tensor:
    """Sum of a tensor of the same shape that the ranks of a pack have alike, each pack's once."""
    return values if data_size() == 1 else _sum(distributed.each_rank(values)[:: context_size()])


def concat_over_packs(rows: Tensor) -> list[Tensor]:
    """The rows of every pack that is worked on, in their order.

    Args:
        rows: [R, ...]; R may differ between packs.
    """
    return distributed.concat_over_ranks(rows)[:: context_size()]


def own_share(costs: Sequence[float]) -> list[int | None]:
    """Which of some packs this rank works on: about the same cost, and exactly the same number, on every rank.

    Args:
        costs: of each pack.

    Returns:
        Positions in ``costs``, the dearest first; None where the others still have one and this rank has not.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    share: list[int | None] = []
    for number, start in enumerate(range(0, len(order), data_size())):
        # Whoever has the dearer pack of one round has the cheaper one of the next.
        place = start + (data_rank() if number % 2 == 0 else data_size() - 1 - data_rank())
        share.append(order[place] if place < len(order) else None)
    return share


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In their order, so that all ranks get the same bits."""
    import torch

    return torch.stack(list(parts)).sum(0)
