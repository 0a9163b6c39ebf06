"""The losses of MAC, of its baselines and of the Q-chunking family, as TorchRL loss modules."""

from torchrl_mac.objectives.critics import QValueLossBase
from torchrl_mac.objectives.ddpg_bc import DDPGBCLoss
from torchrl_mac.objectives.dqc import DQCLoss
from torchrl_mac.objectives.dreamer import DreamerLoss
from torchrl_mac.objectives.flow_bc import FlowBCLoss
from torchrl_mac.objectives.fql import FQLLoss
from torchrl_mac.objectives.fql_expansion import FQLExpansionLoss
from torchrl_mac.objectives.future_model import FutureModelLoss
from torchrl_mac.objectives.future_value import FutureValueLoss
from torchrl_mac.objectives.gaussian_bc import GaussianBCLoss
from torchrl_mac.objectives.imagination import ImaginationLossBase
from torchrl_mac.objectives.in_sample import InSampleValueLoss
from torchrl_mac.objectives.leq import LEQLoss
from torchrl_mac.objectives.penalties import RewardPenalty, deviation_penalty, value_penalty
from torchrl_mac.objectives.qvalue import ChunkedQValueLoss
from torchrl_mac.objectives.sac import ChunkedSACLoss
from torchrl_mac.objectives.value_expansion import ValueExpansionLoss
from torchrl_mac.objectives.world_model import ChunkedWorldModelLoss

__all__ = [
    "ChunkedQValueLoss",
    "ChunkedSACLoss",
    "ChunkedWorldModelLoss",
    "DDPGBCLoss",
    "DQCLoss",
    "DreamerLoss",
    "FQLExpansionLoss",
    "FQLLoss",
    "FlowBCLoss",
    "FutureModelLoss",
    "FutureValueLoss",
    "GaussianBCLoss",
    "ImaginationLossBase",
    "InSampleValueLoss",
    "LEQLoss",
    "QValueLossBase",
    "RewardPenalty",
    "ValueExpansionLoss",
    "deviation_penalty",
    "value_penalty",
]
