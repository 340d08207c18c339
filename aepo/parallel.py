"""Several workers on one run: each takes its share of every batch, and gradients are averaged.

All workers draw the whole batch and all noise from the same generators and then keep their part of it, so that the
weights are those of one worker, but for the order in which floating-point numbers are added. Alone, nothing of this
happens: the functions return what they are given.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aepo.config import RunConfig
from aepo.errors import ConfigError

Part = TypeVar("Part")


def num_workers() -> int:
    """Return how many workers share this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_batches(config: RunConfig, workers: int) -> None:
    """Raise a ConfigError unless every batch can be cut into equal parts."""
    for name, stage in config.stages.items():
        if stage.num_units % workers or stage.num_units < workers:
            raise ConfigError(f"{name}.batch_size {stage.batch_size} cannot be shared by {workers} workers equally")


def share(whole: Part, dim: int = 0) -> Part:
    """Return this worker's part of a tensor, or of every tensor of a named tuple, along a dimension."""
    if num_workers() == 1:
        return whole
    if isinstance(whole, Tensor):
        return torch.chunk(whole, num_workers(), dim=dim)[dist.get_rank()]  # type: ignore[return-value]
    return type(whole)(*(share(part, dim) for part in whole))  # type: ignore[attr-defined]


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the workers, without gradient."""
    if num_workers() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / num_workers()


def average(gradients: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the workers, in one exchange."""
    if num_workers() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= num_workers()
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast_flag(flag: bool) -> bool:
    """Return the flag of the leader, the worker of rank 0, on every worker."""
    if num_workers() == 1:
        return flag
    said = torch.tensor(flag, dtype=torch.uint8, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(said, src=0)
    return bool(said)
