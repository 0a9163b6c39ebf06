"""Networks, policies and world models: TensorDict modules without environments or losses."""

try:  # TorchRL has flow policies of its own from 0.15 on.
    from torchrl.modules import (
        FlowMatchingModel,
        FlowMatchingPolicy,
        OneStepModel,
        OneStepPolicy,
    )
except ImportError:
    from torchrl_mac.modules.flow import FlowMatchingModel, OneStepModel
    from torchrl_mac.modules.policies import FlowMatchingPolicy, OneStepPolicy
from torchrl_mac.modules.export import load_policy, policy_metadata, save_policy
from torchrl_mac.modules.mlp import NormedMLP, TanhGELU
from torchrl_mac.modules.rejection import FlowRejectionActor
from torchrl_mac.modules.stacked import StackedMLP
from torchrl_mac.modules.world_model import ChunkedWorldModel

__all__ = [
    "ChunkedWorldModel",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "FlowRejectionActor",
    "NormedMLP",
    "OneStepModel",
    "OneStepPolicy",
    "StackedMLP",
    "TanhGELU",
    "load_policy",
    "policy_metadata",
    "save_policy",
]
