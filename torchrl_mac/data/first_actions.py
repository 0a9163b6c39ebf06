"""The first actions of longer chunks, for a policy that proposes no more."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs.transforms import Transform

__all__ = ["FirstActions"]


class FirstActions(Transform):
    """Adds the first actions of chunks to samples, of windows that end with their episode.

    A policy may propose fewer actions than a critic reads, as in decoupled Q-chunking
    (https://arxiv.org/abs/2512.10926). Samples of a replay buffer with ``n_steps`` get

    ===========================  =============  ==============================================
    ``"policy_action"``          ``[B, k, A]``  the first k actions
    ``"policy_valid"``           ``[B, k, 1]``  which of them were taken
    ``("next", "whole")``        ``[B, 1]``     whether all were: critics learn from no others
    ===========================  =============  ==============================================

    or, of single actions, ``"action"`` and ``"valid"`` as they are.

    Args:
        num_actions (int): k.

    Keyword Args:
        action_key (NestedKey, optional): defaults to ``"action"``.
        valid_key (NestedKey, optional): defaults to ``"valid"``.

    Raises:
        ValueError: if ``num_actions`` is smaller than 1 or, when called, than there are.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.data import FirstActions
        >>> valid = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool).unsqueeze(-1)
        >>> td = TensorDict(action=torch.zeros(2, 3, 5), valid=valid, batch_size=[2])
        >>> td = FirstActions(2)(td)
        >>> td["policy_action"].shape, td["next", "whole"].flatten()
        (torch.Size([2, 2, 5]), tensor([ True, False]))
    """

    def __init__(
        self,
        num_actions: int,
        *,
        action_key: NestedKey = "action",
        valid_key: NestedKey = "valid",
    ) -> None:
        if num_actions < 1:
            raise ValueError(f"num_actions must be at least 1, got {num_actions}.")
        super().__init__(
            in_keys=[action_key, valid_key], out_keys=["policy_action", "policy_valid"]
        )
        self.num_actions = num_actions

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Adds the entries."""
        action, valid = (tensordict.get(key) for key in self.in_keys)
        dim = tensordict.ndim
        length = valid.shape[dim] if valid.ndim > dim + 1 else 1
        if length < self.num_actions:
            raise ValueError(f"A chunk of {length} actions has not the first {self.num_actions}.")
        if valid.ndim > dim + 1:
            action, valid = (x.narrow(dim, 0, self.num_actions) for x in (action, valid))
        for key, value in zip(self.out_keys, (action, valid), strict=True):
            tensordict.set(key, value)
        return tensordict.set(("next", "whole"), valid.flatten(dim).all(dim, keepdim=True))
