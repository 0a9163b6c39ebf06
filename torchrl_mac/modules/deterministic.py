"""Deterministic policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key_list
from torch import nn

from torchrl_mac.modules.config import Configurable, as_keys

__all__ = ["TanhPolicy"]


class TanhPolicy(TensorDictModuleBase, Configurable):
    r"""A policy that always does the same in a state, :math:`a = \tanh(f(s))`.

    Args:
        network (nn.Module): maps what is read, such as an observation ``[*, O]``, to ``[*, D]``;
            ``D = h * A`` for a chunk.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what the network reads, in this order. Defaults
            to ``["observation"]``.
        out_keys (sequence of NestedKey, optional): where the flat action ``[*, D]`` is written.
            Defaults to ``["action"]``.

    Raises:
        ValueError: if it reads nothing, or does not write one action.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import NormedMLP, TanhPolicy
        >>> policy = TanhPolicy(NormedMLP(4, 6, num_cells=(32,)))
        >>> policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))["action"].shape
        torch.Size([3, 6])
        >>> policy(observation=torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        super().__init__()
        if not in_keys or len(out_keys) != 1:
            raise ValueError(
                "A policy reads one or more conditions and writes one action; got "
                f"in_keys={list(in_keys)} and out_keys={list(out_keys)}."
            )
        self.network = network
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "in_keys": self.in_keys, "out_keys": self.out_keys}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another policy from what :meth:`config` returned."""
        keys = {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
        return cls(**{**config, **keys})

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action."""
        action = self.network(*(tensordict.get(key) for key in self.in_keys)).tanh()
        return tensordict.set(self.out_keys[0], action)
