"""Ensembles of critics as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor

from torchrl_mac.modules.config import Configurable, as_keys
from torchrl_mac.modules.stacked import StackedMLP

__all__ = ["QAggregation", "QValueEnsemble", "aggregate"]

QAggregation = Literal["mean", "min"]


class QValueEnsemble(TensorDictModuleBase, Configurable):
    r"""Several critics :math:`Q_e(s, A)`, and the one value that actions are ranked by.

    Args:
        network (StackedMLP): the critics, with ``broadcast`` inputs and one output.

    Keyword Args:
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` of the critics.
        in_keys (sequence of NestedKey, optional): what the critics read, concatenated. Defaults to
            ``["observation", "action"]``.
        out_keys (sequence of NestedKey, optional): where the aggregated value ``[*, 1]`` and those
            of the critics ``[*, E]`` are written. Defaults to
            ``["state_action_value", "member_values"]``.

    Raises:
        ValueError: if the network does not broadcast or has several outputs, or if
            ``q_aggregation`` is unknown.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import QValueEnsemble, StackedMLP
        >>> network = StackedMLP(2, 4 + 10 * 2, 1, num_cells=(32,), broadcast=True)
        >>> qvalue = QValueEnsemble(network, q_aggregation="min")
        >>> td = TensorDict(observation=torch.randn(3, 4), action=torch.rand(3, 10, 2))
        >>> td = qvalue(td.auto_batch_size_(1))
        >>> td["state_action_value"].shape, td["member_values"].shape
        (torch.Size([3, 1]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        network: StackedMLP,
        *,
        q_aggregation: QAggregation = "mean",
        in_keys: Sequence[NestedKey] = ("observation", "action"),
        out_keys: Sequence[NestedKey] = ("state_action_value", "member_values"),
    ) -> None:
        super().__init__()
        if not network.broadcast or network.out_features != 1:
            raise ValueError(
                "An ensemble of critics has a network with broadcast=True and one output; got "
                f"broadcast={network.broadcast} and {network.out_features}."
            )
        if q_aggregation not in get_args(QAggregation):
            raise ValueError(
                f"q_aggregation must be one of {get_args(QAggregation)}, got {q_aggregation!r}."
            )
        self.network = network
        self.q_aggregation: QAggregation = q_aggregation
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    @property
    def num_members(self) -> int:
        """The number of critics E."""
        return self.network.num_networks

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("network", "q_aggregation", "in_keys", "out_keys")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another ensemble from what :meth:`config` returned."""
        keys = {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
        return cls(**{**config, **keys})

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the aggregated value and those of the critics."""
        members = self.network(*(tensordict.get(key) for key in self.in_keys))
        value_key, members_key = self.out_keys
        tensordict.set(value_key, aggregate(members, self.q_aggregation))
        return tensordict.set(members_key, members.squeeze(-1).movedim(0, -1))


def aggregate(members: Tensor, q_aggregation: QAggregation) -> Tensor:
    """One value of those of all critics, over the first dimension."""
    return members.mean(0) if q_aggregation == "mean" else members.min(0).values
