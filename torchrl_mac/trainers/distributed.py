"""Several processes that train together."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

__all__ = ["join_group", "mean_of_processes"]


def join_group(device: str | None = None) -> tuple[int, torch.device]:
    """Joins the processes that ``torchrun`` has started; alone, does nothing.

    Args:
        device (str, optional): ``"cuda"`` or ``"cpu"``, or one of them by number. Defaults to CUDA,
            if there is one, and to the CPU otherwise.

    Returns:
        the number of this process, 0 for the first or only one, and its device: of several GPUs
        the one with its number on this machine.

    Examples:
        >>> from torchrl_mac.trainers import join_group
        >>> join_group("cpu")
        (0, device(type='cpu'))
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, chosen
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return dist.get_rank(), chosen


def mean_of_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean over all processes of what each has measured; alone, ``value`` itself."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
