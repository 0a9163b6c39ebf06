"""Networks, policies and world models: TensorDict modules without environments or losses."""

from torchrl_mac.modules.actor import ChunkActor, PolicyActor
from torchrl_mac.modules.config import Configurable, build, describe, register_config
from torchrl_mac.modules.deterministic import TanhPolicy
from torchrl_mac.modules.ensemble import GaussianEnsemble
from torchrl_mac.modules.ensemble_model import EnsembleWorldModel
from torchrl_mac.modules.export import load_export, save_policy
from torchrl_mac.modules.flow import (
    FlowMatchingModel,
    FlowMatchingPolicy,
    FlowPolicyBase,
    OneStepModel,
    OneStepPolicy,
)
from torchrl_mac.modules.future import FlowFutureModel, FuturePlanningActor, MLPFutureModel
from torchrl_mac.modules.gaussian import (
    GaussianModel,
    GaussianPolicy,
    TanhGaussianModel,
    TanhGaussianPolicy,
)
from torchrl_mac.modules.mlp import ACTIVATIONS, NormedMLP, TanhGELU
from torchrl_mac.modules.qvalues import QAggregation, QValueEnsemble
from torchrl_mac.modules.rejection import FlowRejectionActor
from torchrl_mac.modules.stacked import StackedMLP
from torchrl_mac.modules.subgoal import SubgoalActor
from torchrl_mac.modules.world_model import ChunkedWorldModel, WorldModelBase

__all__ = [
    "ACTIVATIONS",
    "ChunkActor",
    "ChunkedWorldModel",
    "Configurable",
    "EnsembleWorldModel",
    "FlowFutureModel",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "FlowPolicyBase",
    "FlowRejectionActor",
    "FuturePlanningActor",
    "GaussianEnsemble",
    "GaussianModel",
    "GaussianPolicy",
    "MLPFutureModel",
    "NormedMLP",
    "OneStepModel",
    "OneStepPolicy",
    "PolicyActor",
    "QAggregation",
    "QValueEnsemble",
    "StackedMLP",
    "SubgoalActor",
    "TanhGELU",
    "TanhGaussianModel",
    "TanhGaussianPolicy",
    "TanhPolicy",
    "WorldModelBase",
    "build",
    "describe",
    "load_export",
    "register_config",
    "save_policy",
]
