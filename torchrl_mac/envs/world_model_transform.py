"""From reality to imagination: a transform that answers for the simulator."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import Composite
from torchrl.envs import EnvBase, Transform, TransformedEnv

from torchrl_mac.envs.world_model_env import unbounded
from torchrl_mac.modules import WorldModelBase

__all__ = ["ChunkedWorldModelTransform"]

_PREDICTION = "_world_model_prediction"
_NO_PARENT = (
    "class {} cannot be executed without a parent environment: append it to a TransformedEnv. To "
    "imagine from stored data, use torchrl_mac.envs.imagine() or ChunkedWorldModelEnv."
)


class ChunkedWorldModelTransform(Transform):
    """Turns a real environment into its imagination: chunks in, a world model's answers out.

    ``TransformedEnv(env, ChunkedWorldModelTransform(world_model, chunk_size=h))`` has the
    specs, reset states and keys of ``env``, but its actions are chunks ``[h, A]`` and its steps
    come from ``world_model``; the simulator is reset and never stepped. Observation and reward lose
    their bounds, if they have any: predictions leave them. It takes the place of
    ``MultiAction(stack_rewards=False)``, which plays the same chunks in reality.

    Args:
        world_model (WorldModelBase): predicts what a chunk leads to, from the observation that
            ``env`` and the transforms before this one put out. It is neither copied nor moved to
            the environment's device. Put the transform around a
            :class:`~torchrl.envs.ParallelEnv`, not inside: workers have copies of the model,
            which do not learn.

    Keyword Args:
        chunk_size (int): the number of actions ``h`` in a chunk.
        success_key (NestedKey, optional): the observation entry, if there is one, that repeats
            ``terminated`` in imagination. Defaults to ``"success"``.

    The model writes the observation, the reward (cast to the environment's type) and
    ``terminated``, even if its ``out_keys`` are fewer (``select_out_keys``); ``done`` is
    ``terminated`` or ``truncated``. The environment's time limit does not run in imagination
    (``truncated`` is ``False``, unless another transform, such as
    :class:`~torchrl.envs.StepCounter`, sets it), and its other observation entries, such as a goal,
    keep their values.

    Transforms may stand on both sides in a :class:`~torchrl.envs.Compose`. Those before this one,
    such as :class:`~torchrl.envs.ObservationNorm`, shape what the model sees and are shown zeros
    in place of the simulator's step; those after it, such as :class:`~torchrl.envs.RewardSum`,
    see the model's answer. A transform after it must not replace the observation that the model
    reads: the next step starts from it.

    Raises:
        ValueError: if ``chunk_size`` is smaller than 1.
        KeyError: when the specs are read, if the environment lacks entries that the model reads or
            writes.
        RuntimeError: when used without an environment, such as in a replay buffer.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_mac.envs import ChunkedWorldModelTransform, OGBenchEnv
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> sizes = {"in_features": 2 + 10 * 2, "num_cells": (32,)}
        >>> world_model = ChunkedWorldModel(
        ...     *(NormedMLP(out_features=features, **sizes) for features in (2, 1, 1))
        ... )
        >>> env = TransformedEnv(
        ...     OGBenchEnv("pointmaze-medium-navigate-v0"),
        ...     ChunkedWorldModelTransform(world_model, chunk_size=10),
        ... )
        >>> env.rollout(3, break_when_any_done=False)["action"].shape
        torch.Size([3, 10, 2])
    """

    def __init__(
        self,
        world_model: WorldModelBase,
        *,
        chunk_size: int,
        success_key: NestedKey = "success",
    ) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        # Out of nn.Module's sight: TransformedEnv moves its transforms to the environment's
        # device and puts them in evaluation mode, which is not for it to do to a shared model.
        self.__dict__["world_model"] = world_model
        self.chunk_size = chunk_size
        self.observation_key, self.action_key = world_model.observation_key, world_model.action_key
        self.reward_key, self.done_key = world_model.reward_key, world_model.done_key
        self.terminated_key = world_model.terminated_key
        group = self.done_key[:-1] if isinstance(self.done_key, tuple) else ()
        self.truncated_key = unravel_key((*group, "truncated"))
        self.success_key = unravel_key(success_key)

    def set_container(self, container: Transform | EnvBase) -> None:
        """Attaches the transform and puts the container's simulator to rest."""
        super().set_container(container)
        env = self._environment  # a Compose may have none yet; it will attach us again
        if env is not None and not isinstance(env.base_env, _RestingEnv):
            env.base_env = _RestingEnv(env.base_env)
            self.empty_cache()

    @property
    def _environment(self) -> EnvBase | None:
        try:
            return self.container
        except ValueError:  # a Compose without an environment
            return None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Is refused: outside an environment there are no steps to answer."""
        raise RuntimeError(_NO_PARENT.format(type(self)))

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # Predict on the way in: here the action is what the policy gave, before the transforms
        # that stand before this one turn it into the simulator's. TransformedEnv works on a
        # shallow copy, so the entry does not outlive the step.
        if self._environment is None:
            raise RuntimeError(_NO_PARENT.format(type(self)))
        inputs = tensordict.select(*self.world_model.in_keys)
        # In its two parts the model says all it knows, whatever its out_keys select.
        outcome = self.world_model.predict_outcome(self.world_model.predict_state(inputs))
        return tensordict.set(_PREDICTION, outcome.get("next"))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        unchanged = tensordict.select(*self.container.base_env.observation_keys, strict=False)
        prediction = tensordict.get(_PREDICTION).select(
            self.observation_key, self.reward_key, self.terminated_key
        )
        reward = prediction.get(self.reward_key).to(next_tensordict.get(self.reward_key).dtype)
        next_tensordict.update(unchanged).update(prediction).set(self.reward_key, reward)
        terminated = next_tensordict.get(self.terminated_key)
        truncated = next_tensordict.get(self.truncated_key, None)
        done = terminated.clone() if truncated is None else terminated | truncated
        next_tensordict.set(self.done_key, done)
        if next_tensordict.get(self.success_key, None) is not None:
            next_tensordict.set(self.success_key, terminated.clone())
        return next_tensordict

    def transform_action_spec(self, action_spec: Composite) -> Composite:
        """Makes the action a chunk: ``[*batch_size, A]`` to ``[*batch_size, h, A]``."""
        self._check(action_spec, [self.action_key])
        spec, dim = action_spec[self.action_key], action_spec.ndim
        shape = (*spec.shape[:dim], self.chunk_size, *spec.shape[dim:])
        action_spec[self.action_key] = spec.unsqueeze(dim).expand(shape)
        return action_spec

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Takes the bounds off the observation that is predicted."""
        self._check(observation_spec, [self.observation_key])
        observation_spec[self.observation_key] = unbounded(observation_spec[self.observation_key])
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Takes the bounds off the reward."""
        self._check(reward_spec, [self.reward_key])
        reward_spec[self.reward_key] = unbounded(reward_spec[self.reward_key])
        return reward_spec

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        """Leaves the end-of-episode entries as they are."""
        self._check(done_spec, [self.done_key, self.terminated_key])
        return done_spec

    def _check(self, spec: Composite, keys: list[NestedKey]) -> None:
        there = list(spec.keys(True, True))
        if missing := [key for key in keys if key not in there]:
            raise KeyError(
                f"The world model reads or writes {missing}, which the environment does not have "
                f"(it has {there}). Build the model with the environment's keys, or rename them."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(chunk_size={self.chunk_size})"


class _RestingEnv(TransformedEnv):
    """An environment that is only reset: a step with a prediction at hand returns zeros.

    A step without one, because the transform has left the chain, is the environment's own.
    """

    # TransformedEnv refuses to let its base environment draw actions once their spec has changed.
    rand_action = EnvBase.rand_action

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if tensordict.get(_PREDICTION, None) is None:
            return self.base_env._step(tensordict)
        leading = tensordict.shape[: tensordict.ndim - len(self.batch_size)]
        zeros = self.full_observation_spec.zero(leading)
        zeros.update(self.full_reward_spec.zero(leading))
        return zeros.update(self.full_done_spec.zero(leading))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_env})"
