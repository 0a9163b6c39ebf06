"""Rollouts in a world model, inside losses and hooks."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import step_mdp

from torchrl_mac.modules import WorldModelBase
from torchrl_mac.modules.fused import frozen_weights

__all__ = ["imagine"]


def imagine(
    actor: TensorDictModuleBase,
    world_model: TensorDictModuleBase,
    start: TensorDictBase,
    horizon: int,
    *,
    noise: Tensor | TensorDictBase | None = None,
    noise_key: NestedKey = "noise",
) -> TensorDictBase:
    r"""Imagines what an actor would do and what would come of it.

    The same numbers as ``ChunkedWorldModelEnv.rollout``, in the loop that compiles and costs half
    as much: for an environment with specs, resets and collectors take that one.

    Gradients flow through actions and states, wherever they are not switched off
    (:func:`torch.no_grad`). A loss that only reads the world model keeps its parameters out of them
    with ``hold_out_net`` of :mod:`torchrl.objectives`.

    Args:
        actor (TensorDictModule): writes the action that ``world_model`` reads.
        world_model (TensorDictModule): writes under ``"next"`` what follows; the reward and the end
            of a :class:`~torchrl_mac.modules.WorldModelBase` are predicted once, for all steps.
        start (TensorDictBase): start states ``[*]``. All of its entries, such as a goal, are there
            at each step; those that the model writes under ``"next"`` are carried on.
        horizon (int): the number of steps ``H``, each a chunk of actions if the actor's are.

    Keyword Args:
        noise (Tensor or TensorDictBase, optional): the actor's noise, ``[*, H, ...]``; or, as a
            tensordict ``[*, H]``, all that is drawn at a step, of the world model as well. Default:
            what is not given is drawn.
        noise_key (NestedKey, optional): where the actor reads it. Defaults to ``"noise"``.

    Returns:
        the rollout ``[*, H]``, in the layout of :meth:`~torchrl.envs.EnvBase.rollout`. All steps
        are imagined, whether or not one before them has ended the task. What ``select_out_keys``
        of the model has left out is left out.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.envs import imagine
        >>> from torchrl_mac.modules import (
        ...     ChunkedWorldModel, NormedMLP, OneStepPolicy, PolicyActor
        ... )
        >>> policy = OneStepPolicy(NormedMLP(4 + 20, 20, num_cells=(32,)), action_dim=20)
        >>> model = ChunkedWorldModel(*(NormedMLP(24, n, num_cells=(32,)) for n in (4, 1, 1)))
        >>> start = TensorDict(observation=torch.randn(3, 4), batch_size=[3])
        >>> rollout = imagine(PolicyActor(policy, chunk_size=10), model, start, 5)
        >>> rollout["next", "reward"].shape
        torch.Size([3, 5, 1])
    """
    kept = list(start.keys(True, True))
    in_parts = isinstance(world_model, WorldModelBase)

    def predict(step: TensorDictBase) -> TensorDictBase:
        if in_parts:
            return world_model.predict_state(step)
        # A module with selected out_keys drops all entries that it does not know.
        return step.update(world_model(step.copy()))

    state, dim, steps = start.copy(), start.ndim, []
    with frozen_weights():
        for k in range(horizon):
            if isinstance(noise, Tensor):
                state.set(noise_key, noise.select(dim, k))
            elif noise is not None:
                state.update(noise[..., k])
            step = predict(actor(state))
            steps.append(step)
            state = step_mdp(step).select(*kept)
    rollout: TensorDictBase = torch.stack(steps, -1)
    if not in_parts:
        return rollout
    rollout = world_model.predict_outcome(rollout)
    left_out = [key for key in world_model.out_keys_source if key not in world_model.out_keys]
    return rollout.exclude(*left_out) if left_out else rollout
