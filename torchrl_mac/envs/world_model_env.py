"""An environment whose dynamics are a chunked world model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, ModelBasedEnvBase

from torchrl_mac.modules import WorldModelBase

__all__ = ["ChunkedWorldModelEnv"]


class ChunkedWorldModelEnv(ModelBasedEnvBase):
    """Answers action chunks from a world model, such as a ``ChunkedWorldModel``.

    One step is one chunk of ``h`` actions. The environment accepts tensordicts of any batch size,
    tracks gradients unless told otherwise, and shares the world model's parameters rather than
    copying them, so it can be built once and used while the model trains.

    Args:
        world_model (WorldModelBase): predicts what a chunk leads to. All entries are named by
            its ``in_keys`` and ``out_keys``.
        observation_spec (TensorSpec): the observation ``[O]``, or a
            :class:`~torchrl.data.Composite` with the observation and further entries. Entries
            that the model does not predict, such as a goal, are carried over from step to step.
            The environment's own spec puts no bounds on the observation: predictions leave them.
        action_spec (TensorSpec): one action ``[A]``; the environment's own is ``[h, A]``.

    Keyword Args:
        chunk_size (int): the number of actions ``h`` in a chunk.
        reset_from (TensorDictBase or callable, optional): where :meth:`reset` takes start states
            from: a tensordict ``[N]`` of states to draw from, or a function of ``n`` that returns
            a tensordict ``[n]``, such as ``replay_buffer.sample``. Defaults to random entries of
            ``observation_spec``, within its bounds.
        success_key (NestedKey, optional): the entry of ``observation_spec``, if it is there, that
            repeats ``terminated``. Defaults to ``"success"``.
        device (torch.device, optional): where the model is moved to and the data expected.
            ``None`` (default) moves nothing.
        batch_size (sequence of int, optional): if not empty, the only batch size accepted.
            Defaults to ``()``.

    After :meth:`set_seed` resets repeat, whatever else draws random numbers; before, they draw from
    PyTorch's global generator. A function in ``reset_from`` cannot be seeded from here: it repeats
    if it draws from a generator that you have seeded, as a replay buffer's ``generator``.

    A step writes the observation ``[*, O]``, the reward ``[*, 1]``, of the observation's type, and
    ``terminated`` and ``done`` (bool ``[*, 1]``). It writes all of them even if the model's
    ``out_keys`` are fewer (``select_out_keys``).

    To imagine from given states, pass ``set_state=True``; mind that TorchRL's ``reset`` and
    ``rollout`` write into the tensordict they are given.

    Raises:
        ValueError: if ``chunk_size`` is smaller than 1.
        KeyError: if ``observation_spec`` lacks the observation that the model reads.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl_mac.envs import ChunkedWorldModelEnv
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> sizes = {"in_features": 4 + 10 * 2, "num_cells": (32,)}
        >>> world_model = ChunkedWorldModel(
        ...     *(NormedMLP(out_features=features, **sizes) for features in (4, 1, 1))
        ... )
        >>> env = ChunkedWorldModelEnv(
        ...     world_model, Unbounded(4), Bounded(-1, 1, shape=(2,)), chunk_size=10
        ... )
        >>> start = TensorDict({"observation": torch.randn(3, 4)}, [3])
        >>> imagined = env.rollout(
        ...     5, tensordict=start, set_state=True, break_when_any_done=False
        ... )
        >>> imagined["action"].shape, imagined["next", "reward"].shape
        (torch.Size([3, 5, 10, 2]), torch.Size([3, 5, 1]))
    """

    # Tells TorchRL that reset(start, set_state=True) starts from the entries of ``start``.
    _supports_set_state = True

    def __init__(
        self,
        world_model: WorldModelBase,
        observation_spec: TensorSpec,
        action_spec: TensorSpec,
        *,
        chunk_size: int,
        reset_from: TensorDictBase | Callable[[int], TensorDictBase] | None = None,
        success_key: NestedKey = "success",
        device: torch.device | str | None = None,
        batch_size: Sequence[int] = (),
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        super().__init__(world_model, device=device, batch_size=torch.Size(batch_size))
        observation_key, reward_key = world_model.observation_key, world_model.reward_key
        done_key, terminated_key = world_model.done_key, world_model.terminated_key
        if not isinstance(observation_spec, Composite):
            observation_spec = Composite({observation_key: observation_spec})
        entries = list(observation_spec.keys(True, True))
        if observation_key not in entries:
            raise KeyError(
                f"The world model reads {observation_key!r}, but observation_spec has {entries}."
            )
        self._generator: torch.Generator | None = None  # the global one
        self._reset_from = reset_from
        self._predicted_keys = [observation_key, reward_key, done_key, terminated_key]
        self._success_key = unravel_key(success_key)
        self._has_success = self._success_key in entries
        self._state_keys = [key for key in entries if key != self._success_key]

        def batched(spec: TensorSpec) -> TensorSpec:
            spec = spec.expand(*self.batch_size, *spec.shape)
            return spec if device is None else spec.to(device)

        self._start_spec = batched(observation_spec)
        observation = observation_spec[observation_key]
        observation_spec = observation_spec.clone()
        observation_spec[observation_key] = unbounded(observation)
        dtype = observation.dtype
        self._reward_dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        reward = Unbounded(1, dtype=self._reward_dtype)
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.observation_spec = batched(observation_spec)
        self.state_spec = batched(
            Composite({key: observation_spec[key] for key in self._state_keys})
        )
        self.full_action_spec = batched(
            Composite({world_model.action_key: action_spec.expand(chunk_size, *action_spec.shape)})
        )
        self.full_reward_spec = batched(Composite({reward_key: reward}))
        self.full_done_spec = batched(
            Composite({done_key: flag}).update(Composite({terminated_key: flag.clone()}))
        )

    @classmethod
    def from_env(
        cls, world_model: WorldModelBase, env: EnvBase, **kwargs: Any
    ) -> ChunkedWorldModelEnv:
        """Takes the specs of one observation and one action from ``env``.

        Args:
            world_model (WorldModelBase): as in the constructor.
            env (EnvBase): an environment of single actions, batched or not.
            **kwargs: the constructor's keyword arguments.
        """
        action_spec = env.full_action_spec_unbatched[world_model.action_key]
        return cls(world_model, env.full_observation_spec_unbatched.clone(), action_spec, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = tensordict.select(*self.world_model.in_keys)
        # In its two parts the model says all it knows, whatever its out_keys select.
        outcome = self.world_model.predict_outcome(self.world_model.predict_state(inputs))
        prediction = outcome.get("next").select(*self._predicted_keys)
        reward_key = self._predicted_keys[1]
        prediction.set(reward_key, prediction.get(reward_key).to(self._reward_dtype))
        next_tensordict = tensordict.select(*self._state_keys).update(prediction)
        if self._has_success:
            terminated = prediction.get(self._predicted_keys[-1])
            next_tensordict.set(self._success_key, terminated.clone())
        return next_tensordict

    def _reset(
        self, tensordict: TensorDictBase | None = None, *, set_state: bool = False, **kwargs: Any
    ) -> TensorDictBase:
        shape = self.batch_size if tensordict is None else tensordict.shape
        if set_state and tensordict is not None:
            state = tensordict.select(*self._state_keys)
        else:
            state = self._start(shape).select(*self._state_keys)
        if self.device is not None:
            state = state.to(self.device)
        observation = state.get(self._predicted_keys[0])
        false = torch.zeros_like(observation[..., :1], dtype=torch.bool)
        for key in self.done_keys:
            state.set(key, false.clone())
        if self._has_success:
            state.set(self._success_key, false.clone())
        return state

    def _start(self, shape: torch.Size) -> TensorDictBase:
        if self._reset_from is None:
            return self._random_start(shape[: len(shape) - len(self.batch_size)])
        if callable(self._reset_from):
            return self._reset_from(shape.numel()).reshape(shape)
        return self._reset_from[
            torch.randint(len(self._reset_from), shape, generator=self._generator)
        ]

    def _random_start(self, shape: torch.Size) -> TensorDictBase:
        if self._generator is None:
            return self._start_spec.rand(shape)
        # Specs draw from the global generator of their device: lend them the CPU's.
        device = self._start_spec[self._predicted_keys[0]].device
        seed = int(torch.randint(2**62, (), generator=self._generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            start = self._start_spec.to("cpu").rand(shape)
        return start.to(device).clear_device_()

    def _set_seed(self, seed: int | None) -> None:
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)


def unbounded(spec: TensorSpec) -> TensorSpec:
    """A spec of the same shape, type and device, without bounds: those of reality do not hold."""
    return Unbounded(spec.shape, dtype=spec.dtype, device=spec.device)
