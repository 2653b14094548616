"""Several processes that train one student: each runs the models on its share of every batch.

The first process leads. It keeps the optimizer, the schedule and the books, and asks the others to
help with each step. A step of the group is the step of one process on the whole batch:

    1. The leader sends its weights. Each process runs teacher and student on its share.
    2. Outputs are gathered, so that every process takes the loss of the whole batch. Losses that
       compare the pairs of a batch (CLIP, affinity) see all of them.
    3. Gradients flow into the own share alone; their sum over the processes is the gradient of the
       whole batch.
    4. The leader does the step.

Where the memory of one process runs out, all of them take the step again in smaller parts.

Step 3 is the gathering of OpenCLIP (`gather_features` without `gather_with_grad`), which needs no
collective in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmcompress.kinds.base import Batch, Outputs

Key = TypeVar("Key", str, tuple[str, str])
"""What tensors are gathered under."""

LEADER = 0
"""Rank of the process that leads."""


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """What the leader asks the others to do."""

    step: int = 0
    """The step, counted from the one that takes the first draw."""
    distinct_draws: int = 0
    """Draws after which pairs come again; 0: they never do."""
    first_draw: int = 0
    """Number of the first draw."""
    loss_scale: float = 1.0
    """Factor on the loss before its gradients are taken (fp16)."""
    is_report: bool = False
    """A report is due in place of a step: all processes take part in it."""
    is_end: bool = False
    """The training has ended."""


class WorkerGroup:
    """The processes of a training, joined by `torch.distributed`.

    Args:
        device: Where the models of this process are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        # Requests and shapes are no tensors of a GPU.
        control = dist.new_group(backend="gloo")
        assert isinstance(control, dist.ProcessGroup), "every process belongs to it"
        self._control = control

    @property
    def is_leader(self) -> bool:
        """Whether this process leads."""
        return self.rank == LEADER

    def list_own_places(self, batch_size: int) -> range:
        """Return the places of a batch that are this process's share."""
        start = batch_size * self.rank // self.count
        return range(start, batch_size * (self.rank + 1) // self.count)

    def send(self, request: StepRequest) -> None:
        """Send a request of the leader to the others."""
        dist.broadcast_object_list([asdict(request)], src=LEADER, group=self._control)

    def receive(self) -> StepRequest:
        """Wait for the next request of the leader."""
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=LEADER, group=self._control)
        return StepRequest(**received[0])

    def spread_weights_(self, weights: Sequence[Tensor]) -> None:
        """Overwrite the weights of all processes with those of the leader."""
        with torch.no_grad():
            flat = torch.cat([weight.flatten() for weight in weights])
            dist.broadcast(flat, src=LEADER)
            if not self.is_leader:
                _fill_(weights, flat)

    def add_gradients_(self, weights: Sequence[Tensor]) -> None:
        """Add the gradients of all processes up in those of the leader.

        A weight that a share has no use for counts as one whose gradient is zero.
        """
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.reduce(flat, dst=LEADER)
        if self.is_leader:
            _fill_(gradients, flat)

    def is_every_process_well(self, is_well: bool) -> bool:
        """Return whether every process is well. All of them ask at the same place of a step.

        Args:
            is_well: Whether this process is.
        """
        votes = torch.tensor([int(is_well)])
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self._control)
        return bool(votes.item())

    def add_counts(self, counts: Sequence[int]) -> list[int]:
        """Add whole numbers up over the processes, each at its own place in the list."""
        sums = torch.tensor(list(counts))
        dist.all_reduce(sums, group=self._control)
        added: list[int] = sums.tolist()
        return added

    def gather_outputs(self, outputs: Outputs) -> Outputs:
        """Return the outputs on the whole batch. Gradients flow into the own share alone."""
        by_place: dict[tuple[str, str], Tensor] = {}
        for node_name, tensors in outputs.items():
            for name, tensor in tensors.items():
                by_place[node_name, name] = tensor
        gathered: Outputs = {node_name: {} for node_name in outputs}
        for (node_name, name), tensor in self.gather(by_place).items():
            gathered[node_name][name] = tensor
        return gathered

    def gather_batch(self, batch: Batch) -> Batch:
        """Return the whole batch, as far as losses read it: token ids, and what counts of them."""
        token_ids: dict[str, Tensor] = {}
        for node_name, values in batch.inputs.items():
            if not values.is_floating_point():
                token_ids[node_name] = values
        return Batch(inputs=self.gather(token_ids), keep=self.gather(batch.keep))

    def average(self, loss: Tensor) -> Tensor:
        """Return the mean of a loss over the processes. Its gradient is that of the own share."""
        return self.gather({"loss": loss[None]})["loss"].mean()

    def gather(self, own_rows: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Join the rows of all processes, in the order of their ranks.

        Args:
            own_rows: Tensors [rows, ...] by the same keys in every process. Their other axes may be
                longer in another process (texts). They are filled up with zeros.

        Returns:
            [all rows, ...] by key. The gradient is that of the own rows.
        """
        # All processes must gather in the same order, whatever the order of their outputs is.
        keys = sorted(own_rows)
        shapes: list[Any] = [None] * self.count
        own_shapes = [tuple(own_rows[key].shape) for key in keys]
        dist.all_gather_object(shapes, own_shapes, group=self._control)
        gathered: dict[Key, Tensor] = {}
        for i, key in enumerate(keys):
            shapes_of_key = [shapes_of_rank[i] for shapes_of_rank in shapes]
            gathered[key] = self._gather_one(own_rows[key], shapes=shapes_of_key)
        return gathered

    def _gather_one(self, own_rows: Tensor, *, shapes: Sequence[Sequence[int]]) -> Tensor:
        """Join the rows of one tensor; `shapes` are its shapes by rank."""
        longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        own_padded = _pad(own_rows, longest)
        # Not every backend sends booleans.
        is_boolean = own_padded.dtype == torch.bool
        sent = own_padded.detach().to(torch.uint8) if is_boolean else own_padded.detach()
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(parts, sent.contiguous())
        joined = [part.to(own_padded.dtype) for part in parts]
        joined[self.rank] = own_padded
        row_counts = [shape[0] for shape in shapes]
        return torch.cat([part[:count] for part, count in zip(joined, row_counts, strict=True)])


@contextmanager
def fail_together(group: WorkerGroup | None) -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` in every process of a group where one of them raises it.

    A process that went on alone would wait for the outputs of the one that failed. So no process
    may wait for another inside.

    Args:
        group: The processes; None: this one is alone.
    """
    if group is None:
        yield
        return
    is_well = True
    try:
        yield
    except torch.OutOfMemoryError:
        is_well = False
    if not group.is_every_process_well(is_well):
        raise torch.OutOfMemoryError("the memory of a process of the training ran out")


def _fill_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Overwrite tensors with the values of a flat one, in its order."""
    values = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, values, strict=True):
        tensor.copy_(part.view_as(tensor))


def _pad(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Fill a tensor up with zeros behind its values, to a shape."""
    if list(tensor.shape) == list(shape):
        return tensor
    padded = tensor.new_zeros(tuple(shape))
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded
