"""Makes a dataset of Gymnasium's pendulum: all that TorchRL's SAC sees while it learns the task.

    python benchmarks/pendulum.py --out data           # a minute or two, one thread
    python examples/mopo.py preset=cpu task=pendulum

A task that takes minutes and that every method should solve: an episode's return is about -1200 at
random and -150 when the pendulum is swung up and held. The files are in D4RL's layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType
from torchrl.modules import (
    MLP,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import SACLoss, SoftUpdate

from torchrl_mac.envs import GymnasiumEnv

CELLS = [64, 64]
STEPS = 200  # of an episode
RANDOM = 1_000  # steps before the first update


def make_loss(env: EnvBase) -> tuple[SACLoss, ProbabilisticActor]:
    """SAC and its actor, on small networks."""
    O, A = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]  # noqa: E741
    network = nn.Sequential(MLP(O, 2 * A, num_cells=CELLS), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        spec=env.action_spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    qvalue = ValueOperator(MLP(O + A, 1, num_cells=CELLS), in_keys=["observation", "action"])
    loss = SACLoss(actor, qvalue, num_qvalue_nets=2)
    loss.make_value_estimator(gamma=0.99)
    return loss, actor


def collect(frames: int, seed: int) -> TensorDictBase:
    """The steps of a run of SAC, one update each, in order."""
    torch.manual_seed(seed)
    env = TransformedEnv(GymnasiumEnv("Pendulum-v1"), InitTracker())
    loss, actor = make_loss(env)
    env.set_seed(seed)
    optimizer, updater = torch.optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.005)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=128)
    collector = Collector(
        env,
        actor,
        frames_per_batch=STEPS,
        total_frames=frames,
        init_random_frames=RANDOM,
        exploration_type=ExplorationType.RANDOM,
    )
    for steps in collector:
        buffer.extend(steps)
        if len(buffer) > RANDOM:
            for _ in range(STEPS):
                out = loss(buffer.sample())
                optimizer.zero_grad()
                sum(term for key, term in out.items() if key.startswith("loss_")).backward()
                optimizer.step()
                updater.step()
        print(f"{len(buffer)} steps: return {steps['next', 'reward'].sum():.0f}", flush=True)
    collector.shutdown()
    return buffer[:]


def write(path: Path, steps: TensorDictBase) -> None:
    """Writes whole episodes in D4RL's layout."""
    following = steps["next"]
    np.savez(
        path,
        observations=steps["observation"].numpy(),
        actions=steps["action"].numpy(),
        next_observations=following["observation"].numpy(),
        rewards=following["reward"].squeeze(-1).numpy(),
        terminals=following["terminated"].squeeze(-1).numpy(),
        timeouts=following["truncated"].squeeze(-1).numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--episodes", type=int, default=40, help="of 200 steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = collect(args.episodes * STEPS, args.seed)
    episodes = steps.reshape(args.episodes, STEPS)
    validation = torch.arange(args.episodes) % 5 == 4
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "pendulum-replay.npz", episodes[~validation].reshape(-1))
    write(args.out / "pendulum-replay-val.npz", episodes[validation].reshape(-1))
    returns = episodes["next", "reward"].sum((1, 2))
    print(f"Returns of the data: mean {returns.mean():.0f}, best {returns.max():.0f}")


if __name__ == "__main__":
    main()
