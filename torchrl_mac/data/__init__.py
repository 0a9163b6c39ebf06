"""What a training loop samples from: TorchRL replay buffers, samplers and storages of chunks."""

from torchrl.data.datasets import register_dataset

from torchrl_mac.data.first_actions import FirstActions
from torchrl_mac.data.goals import GoalDistribution
from torchrl_mac.data.mixed import MixedReplayBuffer, StackedReplayBuffer
from torchrl_mac.data.ogbench import OGBenchExperienceReplay
from torchrl_mac.data.replay import ActionChunkExperienceReplay
from torchrl_mac.data.sampler import ActionChunkSampler
from torchrl_mac.data.states import buffer_state, distinct_buffers, load_buffer_state
from torchrl_mac.data.storage import ActionChunkStorage

__all__ = [
    "ActionChunkExperienceReplay",
    "ActionChunkSampler",
    "ActionChunkStorage",
    "FirstActions",
    "GoalDistribution",
    "MixedReplayBuffer",
    "OGBenchExperienceReplay",
    "StackedReplayBuffer",
    "buffer_state",
    "distinct_buffers",
    "load_buffer_state",
]

# load_dataset("ogbench:cube-single-play-v0"); replace makes a second import harmless
register_dataset("ogbench", "torchrl_mac.data:OGBenchExperienceReplay", replace=True)
