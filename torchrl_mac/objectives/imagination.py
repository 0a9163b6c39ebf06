"""What losses on imagined rollouts share: V, the discount of chunks, and the rollout itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator
from torchrl.objectives.value import TDLambdaEstimator, ValueEstimatorBase

from torchrl_mac.envs import imagine
from torchrl_mac.modules import ChunkActor
from torchrl_mac.objectives.common import GoalKeys, same_shape

__all__ = ["ImaginationLossBase"]


class ImaginationLossBase(LossModule):
    """A loss that imagines rollouts and trains V on them.

    A subclass computes its terms from :meth:`_imagine`, which tracks gradients unless told
    otherwise.

    Args:
        actor_network (ChunkActor): chooses chunks.
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        world_model (TensorDictModule): writes under ``"next"`` the state after a chunk, its
            reward, ``done`` and ``terminated``, such as
            :class:`~torchrl_mac.modules.ChunkedWorldModel`. Not trained here.

    Keyword Args:
        imagination_horizon (int, optional): the number of chunks imagined, H. Defaults to 10.
        chunk_size (int, optional): the number of environment steps in a chunk, h. Defaults to
            the actor's, or 1.
        delay_value (bool, optional): whether V's targets come from a target network, to be
            updated with :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``True``.
        ignore_terminated (bool, optional): whether the rollout goes on where the world model says
            that the task has ended. Defaults to ``False``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch; the rollout
            is averaged first. Defaults to ``"mean"``.

    The input holds what the actor reads (``"observation"`` ``[*, O]``; for a ``"goal"``, which
    stays the same in the rollout, ``"value_goal"`` ``[*, G]``) and, optionally, its noise for the
    rollout, ``"noise"`` ``[*, H, ...]``.

    Raises:
        ValueError: if ``imagination_horizon`` or ``chunk_size`` is smaller than 1.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            goal (NestedKey): the goal's entry for the networks, if they read one. Defaults to
                ``"goal"``.
            value_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"value_goal"``.
            value (NestedKey): the state value. Defaults to ``"state_value"``.
            reward (NestedKey): the imagined reward. Defaults to ``"reward"``.
            done (NestedKey): the imagined done. Defaults to ``"done"``.
            terminated (NestedKey): the imagined termination. Defaults to ``"terminated"``.
            noise (NestedKey): optional noise of the rollout. Defaults to ``"noise"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        goal: NestedKey = "goal"
        value_goal: NestedKey = "value_goal"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        noise: NestedKey = "noise"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ChunkActor,
        value_network: TensorDictModule,
        world_model: TensorDictModuleBase,
        *,
        imagination_horizon: int = 10,
        chunk_size: int | None = None,
        delay_value: bool = True,
        ignore_terminated: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if chunk_size is None:
            chunk_size = getattr(actor_network, "chunk_size", None) or 1
        for name, number in (
            ("imagination_horizon", imagination_horizon),
            ("chunk_size", chunk_size),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        self.imagination_horizon = imagination_horizon
        self.chunk_size = chunk_size
        self.delay_value = delay_value
        self.ignore_terminated = ignore_terminated
        self.reduction = reduction
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)
        # Imagination only reads these: their parameters belong to other losses.
        self.__dict__["actor_network"] = actor_network
        self.__dict__["world_model"] = world_model
        self.make_value_estimator()

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the actor, the value networks and the world model read."""
        return self._conditions.sources(self._state_keys)

    @property
    def _state_keys(self) -> list[NestedKey]:
        model = [key for key in self.world_model.in_keys if key not in self.actor_network.out_keys]
        keys = [*self.actor_network.in_keys, *self.value_network.in_keys, *model]
        return list(dict.fromkeys(keys))

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.value_goal)

    def _imagine(self, tensordict: TensorDictBase, horizon: int | None = None) -> TensorDictBase:
        """A rollout from each state of the input, of shape ``[*, H]``."""
        state = self._conditions.read(tensordict, self._state_keys)
        for key in (self.tensor_keys.priority_weight, *self._loss_mask_keys()):
            if (entry := tensordict.get(key, None)) is not None:
                state[key] = entry
        # A tensordict made by dispatch has no batch size: the observation tells it.
        observation = state[self._state_keys[0]]
        start = TensorDict(state, batch_size=observation.shape[:-1])
        horizon = horizon or self.imagination_horizon
        noise = tensordict.get(self.tensor_keys.noise, None)
        if noise is not None:
            steps = (*start.shape, self.imagination_horizon, *noise.shape[start.ndim + 1 :])
            same_shape(self.tensor_keys.noise, noise, steps)
        rollout = imagine(
            self.actor_network,
            self.world_model,
            start,
            horizon,
            noise=noise,
            noise_key=getattr(self.actor_network, "noise_key", "noise"),
        )
        if self.ignore_terminated:
            for key in (self.tensor_keys.done, self.tensor_keys.terminated):
                rollout.get(("next", key)).zero_()
        return rollout

    def _value(self, tensordict: TensorDictBase) -> Tensor:
        value = self.value_network(tensordict.select(*self.value_network.in_keys))
        return value.get(self.tensor_keys.value)

    def _reduced(self, error: Tensor, tensordict: TensorDictBase) -> Tensor:
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error, tensordict, weights=weights)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            keys = self.tensor_keys
            self._value_estimator.set_keys(
                value=keys.value, reward=keys.reward, done=keys.done, terminated=keys.terminated
            )

    def make_value_estimator(
        self,
        value_type: ValueEstimators
        | str
        | type[ValueEstimatorBase]
        | ValueEstimatorBase
        | None = None,
        **hyperparams: Any,
    ) -> None:
        """Chooses the return that V is trained on.

        Args:
            value_type (ValueEstimators, str, class or instance, optional): ``TD0``, ``TD1`` or
                ``TDLambda`` (default), by any of the names it has in TorchRL; or an estimator of
                one's own, whose discount is that of a whole chunk.
            **hyperparams: the estimator's; ``gamma`` is per environment step and defaults to
                0.999, ``lmbda`` defaults to 1.

        Raises:
            ValueError: if ``gamma`` or ``lmbda`` is out of range, or comes with an instance.
        """
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, ValueEstimatorBase):
            if hyperparams:
                raise ValueError(f"An estimator that is there has its own {sorted(hyperparams)}.")
            self.value_type, self._value_estimator = type(value_type), value_type
            self._forward_value_estimator_keys()
            return
        if isinstance(value_type, str):
            names = {kind.name.lower(): kind for kind in self.SUPPORTED_VALUE_ESTIMATORS}
            value_type = names.get(value_type.lower().replace("_", ""), value_type)
        hyperparams.setdefault("gamma", 0.999)
        if value_type in (ValueEstimators.TDLambda, TDLambdaEstimator):
            hyperparams.setdefault("lmbda", 1.0)
        if not 0 < hyperparams["gamma"] <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {hyperparams['gamma']}.")
        if not 0 <= hyperparams.get("lmbda", 1.0) <= 1:
            raise ValueError(f"lmbda must be between 0 and 1, got {hyperparams['lmbda']}.")
        hyperparams["gamma"] = hyperparams["gamma"] ** self.chunk_size
        hyperparams.setdefault("device", self._default_device)
        if isinstance(value_type, type):
            self.value_type = value_type
            self._value_estimator = value_type(value_network=None, **hyperparams)
        else:
            dispatch_value_estimator(
                self,
                value_type,
                supported=self.SUPPORTED_VALUE_ESTIMATORS,
                value_network=None,
                **hyperparams,
            )
        self._forward_value_estimator_keys()
