"""Several replay buffers as one: in exact shares of each batch, or side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_mac.data.sampler import ActionChunkSampler
from torchrl_mac.data.states import buffer_state, load_buffer_state

__all__ = ["MixedReplayBuffer", "StackedReplayBuffer"]

_PLACES = ("index", "index_generation")  # where a row was in one of the buffers


class _BufferGroup:
    """What buffers that are sampled together have in common: names and a state.

    Args:
        buffers (sequence of ReplayBuffer or mapping of str to ReplayBuffer): the buffers. Without
            names they are called ``"0"``, ``"1"``, ...
        batch_size (int, optional): the default of :meth:`sample`.
    """

    def __init__(
        self, buffers: Sequence[Any] | Mapping[str, Any], batch_size: int | None = None
    ) -> None:
        if not isinstance(buffers, Mapping):
            buffers = {str(i): buffer for i, buffer in enumerate(buffers)}
        if not buffers:
            raise ValueError("There must be at least one buffer.")
        self.buffers: dict[str, Any] = dict(buffers)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(map(len, self.buffers.values()))

    def _size(self, batch_size: int | None) -> int:
        size = self.batch_size if batch_size is None else batch_size
        if size is None:
            raise ValueError("Give batch_size to sample(), or to the buffer.")
        return size

    def state_dict(self) -> dict[str, Any]:
        """The states of the buffers, see :func:`~torchrl_mac.data.buffer_state`."""
        return {"buffers": {name: buffer_state(buf) for name, buf in self.buffers.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: if the buffers have other names.
        """
        if state_dict["buffers"].keys() != self.buffers.keys():
            raise ValueError(
                f"The checkpoint is of the buffers {list(state_dict['buffers'])}, these are "
                f"{list(self.buffers)}."
            )
        for name, buffer in self.buffers.items():
            load_buffer_state(buffer, state_dict["buffers"][name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.buffers)}, batch_size={self.batch_size})"


class MixedReplayBuffer(_BufferGroup):
    """Batches of which each buffer gives an exact share: a dataset and what was collected.

    The parts follow each other in the order of the buffers, with the entries that all of them
    have, on the device of the first. The sizes of the parts are the shares of the batch size,
    rounded down, and one more for those that lost the most by it, so that they sum up to the
    batch size: shares are met in each batch and not only on average. With ``"proportional"`` shares
    each row is of a buffer with a probability proportional to the number of samples it has to
    choose from, as if all were one buffer. ``"index"`` is left out: rows of different buffers have
    the same ones, so priorities cannot be updated here.

    Args:
        buffers (sequence of ReplayBuffer or mapping of str to ReplayBuffer): the buffers, made
            without a ``batch_size`` of their own. Names are used in messages and in the state.
        shares (sequence of float, mapping of str to float or "proportional"): the part of a batch
            for each buffer; they sum up to 1. The attribute can be changed between samples.

    Keyword Args:
        batch_size (int, optional): the default of :meth:`sample`.

    Raises:
        ValueError: if the shares are none or, when sampling, if a buffer with a share is empty or
            entries of one key do not fit together.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_mac.data import MixedReplayBuffer
        >>> real, model = (
        ...     TensorDictReplayBuffer(storage=LazyTensorStorage(100)) for _ in range(2)
        ... )
        >>> _ = real.extend(TensorDict(observation=torch.zeros(50, 2), batch_size=[50]))
        >>> _ = model.extend(TensorDict(observation=torch.ones(50, 2), batch_size=[50]))
        >>> buffer = MixedReplayBuffer({"real": real, "model": model}, [0.05, 0.95])
        >>> buffer.sizes(64), buffer.sample(64)["observation"][:, 0].sum()
        ({'real': 3, 'model': 61}, tensor(61.))
        >>> buffer.shares = {"real": 1.0, "model": 0.0}
        >>> buffer.sample(64)["observation"].sum()
        tensor(0.)
        >>> buffer.shares = "proportional"
        >>> buffer.sample(64).shape
        torch.Size([64])
    """

    def __init__(
        self,
        buffers: Sequence[Any] | Mapping[str, Any],
        shares: Sequence[float] | Mapping[str, float] | Literal["proportional"],
        *,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(buffers, batch_size)
        self.shares: Any = shares

    @property
    def shares(self) -> dict[str, float] | Literal["proportional"]:
        """The part of a batch for each buffer."""
        return "proportional" if self._shares is None else dict(self._shares)

    @shares.setter
    def shares(
        self, shares: Sequence[float] | Mapping[str, float] | Literal["proportional"]
    ) -> None:
        self._shares: dict[str, float] | None = None
        if isinstance(shares, str):
            if shares != "proportional":
                raise ValueError(f"Shares are numbers, or 'proportional', not {shares!r}.")
            return
        names = list(self.buffers)
        if not isinstance(shares, Mapping):
            shares = dict(zip(names, shares)) if len(shares) == len(names) else {}
        if shares.keys() != self.buffers.keys():
            raise ValueError(f"There must be one share for each of the buffers {names}.")
        shares = {name: float(shares[name]) for name in names}
        if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            raise ValueError(f"Shares must not be negative and sum up to 1, got {shares}.")
        self._shares = shares

    def sizes(self, batch_size: int | None = None) -> dict[str, int]:
        """How many rows of a batch are of which buffer; if proportional, drawn anew."""
        size = self._size(batch_size)
        if self._shares is None:
            return self._drawn_sizes(size)
        exact = {name: share * size for name, share in self._shares.items()}
        sizes = {name: math.floor(part) for name, part in exact.items()}
        # rounded: among equals the first one comes first, whatever the last digits of floats
        by_loss = sorted(exact, key=lambda name: round(sizes[name] - exact[name], 9))
        for name in by_loss[: size - sum(sizes.values())]:
            sizes[name] += 1
        return sizes

    def _drawn_sizes(self, size: int) -> dict[str, int]:
        choices = torch.tensor([_num_choices(buffer) for buffer in self.buffers.values()])
        if not choices.any():
            raise ValueError(f"All of the buffers {list(self.buffers)} are empty; write to one.")
        drawn = torch.multinomial(choices.double(), size, replacement=True)
        return dict(zip(self.buffers, drawn.bincount(minlength=len(choices)).tolist()))

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """Draws a batch.

        Args:
            batch_size (int, optional): the size ``B`` of the batch. Default: the buffer's.

        Returns:
            the parts after each other, ``[B]``.
        """
        sizes = self.sizes(batch_size)
        for name, share in (self._shares or {}).items():
            if share and not len(self.buffers[name]):
                raise ValueError(
                    f"The buffer {name!r} is empty but has a share of {share}; write to it, or "
                    "set its share to 0."
                )
        parts = {}
        for name, size in sizes.items():
            if size:
                parts[name] = self.buffers[name].sample(size)
                if parts[name].batch_size != (size,):
                    raise ValueError(
                        f"The buffer {name!r} gave a batch {list(parts[name].batch_size)} instead "
                        f"of [{size}]."
                    )
        return _concatenated(parts)

    def state_dict(self) -> dict[str, Any]:
        """The states of the buffers, and the shares."""
        return {**super().state_dict(), "shares": self.shares}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.shares = state_dict["shares"]


class StackedReplayBuffer(_BufferGroup):
    """Batches of all buffers side by side: one buffer for each task.

    Args:
        buffers (sequence of ReplayBuffer or mapping of str to ReplayBuffer): the buffers, whose
            batches must have the same entries.

    Keyword Args:
        batch_size (int, optional): the default of :meth:`sample`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_mac.data import StackedReplayBuffer
        >>> tasks = [TensorDictReplayBuffer(storage=LazyTensorStorage(100)) for _ in range(3)]
        >>> for task, buffer in enumerate(tasks):
        ...     rows = TensorDict(observation=torch.full((50, 2), task), batch_size=[50])
        ...     _ = buffer.extend(rows)
        >>> batch = StackedReplayBuffer(tasks).sample(64)
        >>> batch.shape, batch["observation"][:, 0, 0]
        (torch.Size([3, 64]), tensor([0, 1, 2]))
    """

    def __init__(
        self,
        buffers: Sequence[Any] | Mapping[str, Any],
        *,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(buffers, batch_size)

    def sample(self, batch_size: int | None = None) -> TensorDictBase:
        """Draws a batch of each buffer.

        Args:
            batch_size (int, optional): the size ``B`` of each. Default: the buffer's.

        Returns:
            the batches, ``[len(buffers), B]``.
        """
        size = self._size(batch_size)
        return torch.stack([buffer.sample(size) for buffer in self.buffers.values()])


def _num_choices(buffer: Any) -> int:
    """How many samples a buffer can give: its rows, or the windows of rows that there are."""
    sampler = getattr(buffer, "sampler", None)
    if len(buffer) and isinstance(sampler, ActionChunkSampler):
        return sampler.num_starts(buffer.storage)
    return len(buffer)


def _concatenated(parts: dict[str, TensorDictBase]) -> TensorDict:
    """The batches after each other, with the keys that all have, on the device of the first."""
    columns: dict[str, dict[Any, Tensor]] = {
        name: {
            key: value
            for key, value in part.items(True, True)
            if isinstance(value, Tensor) and key not in _PLACES
        }
        for name, part in parts.items()
    }
    first = next(iter(columns.values()))
    shared = [key for key in first if all(key in column for column in columns.values())]
    merged = {}
    for key in shared:
        values = {name: column[key] for name, column in columns.items()}
        kinds = {(value.dtype, value.shape[1:]) for value in values.values()}
        if len(kinds) > 1:
            found = ", ".join(
                f"{value.dtype} {list(value.shape[1:])} in {name!r}"
                for name, value in values.items()
            )
            raise ValueError(f"The rows of {key!r} do not fit together: {found}.")
        device = first[key].device
        merged[key] = torch.cat([value.to(device) for value in values.values()])
    size = sum(map(len, parts.values()))
    return TensorDict(merged, batch_size=[size], device=next(iter(parts.values())).device)
