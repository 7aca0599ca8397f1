"""Where networks compute: the one place that chooses a device, and which of torchrun's processes this is."""

import os

import torch
from torch import Tensor, distributed, nn

from cardiac_ldm.errors import ParameterError


def compute_device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are, and its inputs must be; the CPU for one without weights."""
    return next((weight.device for weight in network.parameters()), torch.device("cpu"))


def is_first_process() -> bool:
    """Whether this process writes files: the only one, or rank 0 of torchrun's."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def shared_decision(wanted: bool = False) -> bool:
    """What the first process wants; the others wait for it."""
    if not distributed.is_initialized():
        return wanted
    decision = torch.tensor([wanted], device=compute_device())
    distributed.broadcast(decision, 0)
    return bool(decision)


def own_share(size: int) -> slice:
    """Which rows of a batch of this size, which all processes draw alike, are this process's.

    Raises:
        ParameterError: there are more processes than rows.
    """
    if not distributed.is_initialized():
        return slice(None)
    if size < (processes := distributed.get_world_size()):
        raise ParameterError(f"batch: {size} rows can't be shared by {processes} processes; start fewer of them")
    return slice(distributed.get_rank(), None, processes)


def wait_for_all() -> None:
    """Return once every process has come here."""
    average_over_processes([arrived := torch.zeros(1, device=compute_device())])
    arrived.item()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each of these tensors by its mean over all processes."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
