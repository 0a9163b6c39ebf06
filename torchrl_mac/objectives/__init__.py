"""The three losses of MAC, as TorchRL loss modules."""

from torchrl_mac.objectives.flow_bc import FlowBCLoss
from torchrl_mac.objectives.value_expansion import ValueExpansionLoss
from torchrl_mac.objectives.world_model import ChunkedWorldModelLoss

__all__ = ["ChunkedWorldModelLoss", "FlowBCLoss", "ValueExpansionLoss"]
