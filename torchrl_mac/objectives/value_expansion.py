"""Learning values from imagined rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import step_mdp
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator
from torchrl.objectives.value import TDLambdaEstimator, ValueEstimatorBase

from torchrl_mac.envs import imagine
from torchrl_mac.modules import ChunkActor
from torchrl_mac.objectives.common import GoalKeys, autocast_to, ranking_with, same_shape

__all__ = ["ValueExpansionLoss"]


class ValueExpansionLoss(LossModule):
    r"""Trains V on the :math:`\lambda`-returns of imagined rollouts and Q one chunk ahead.

    From each state of the batch the actor and the world model imagine ``imagination_horizon``
    chunks :math:`(s^k, A^k, r^k, m^k, s^{k+1})`, where :math:`m = 0` once the task has ended.
    With :math:`\Gamma = \gamma^h` for chunks of :math:`h` actions, a target network
    :math:`\bar V` and stopped gradients on all targets,

    .. math::

        G^k &= r^k + \Gamma m^k [ (1 - \lambda) \bar V(s^{k+1}) + \lambda G^{k+1} ],
        \qquad G^H = \bar V(s^H) \\
        \mathcal L_{value} &= \mathrm{mean}_k ( V(s^k) - G^k )^2 \\
        \mathcal L_{qvalue} &= ( Q(s^0, A^0) - [ r^0 + \Gamma m^0 V(s^1) ] )^2

    (https://arxiv.org/abs/2512.08108). Q bootstraps from the online V and is fitted only at the
    action the actor chose; V looks ahead as far as the rollout goes.

    Args:
        actor_network (ChunkActor): chooses chunks by ``qvalue_network``. It is not
            trained here: its policy's parameters are not this module's.
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (TensorDictModule): writes ``"state_action_value"`` ``[*, 1]``; the same
            module that ``actor_network`` ranks candidates with, if it does. In imagination it ranks
            them with this loss's parameters of it.
        world_model (TensorDictModule): writes under ``"next"`` the state after a chunk, its
            reward, ``done`` and ``terminated``, such as :class:`ChunkedWorldModel`. Not trained
            here.

    Keyword Args:
        imagination_horizon (int, optional): the number of chunks imagined, H. Defaults to 10.
        chunk_size (int, optional): the number of environment steps in a chunk, h. Defaults to
            the actor's, or 1.
        delay_value (bool, optional): whether V's targets come from a target network, to be
            updated with :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``True``.
        ignore_terminated (bool, optional): whether the rollout goes on where the world model says
            that the task has ended, :math:`m = 1` throughout. Defaults to ``False``.
        sampling_dtype (torch.dtype, optional): rollouts are imagined under autocast to this dtype.
            Defaults to none.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch; the rollout
            is averaged first. Defaults to ``"mean"``.

    The input holds what the actor reads (``"observation"`` ``[*, O]``; for a ``"goal"``, which
    stays the same in the rollout, ``"value_goal"`` ``[*, G]``). The rollout's noise
    ``[*, H, N, D]``, for N candidates of D coordinates, is drawn unless the input has it as
    ``"noise"``.

    Raises:
        ValueError: if ``imagination_horizon`` or ``chunk_size`` is smaller than 1, or if the actor
            ranks with another Q.

    The discount, per environment step, is set with
    ``make_value_estimator(gamma=0.999, lmbda=1.0)``; these are the defaults.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     ChunkedWorldModel, FlowRejectionActor, NormedMLP, OneStepPolicy
        ... )
        >>> from torchrl_mac.objectives import ValueExpansionLoss
        >>> cells = {"num_cells": (32,)}
        >>> policy = OneStepPolicy(NormedMLP(4 + 20, 20, **cells), action_dim=20)
        >>> value = ValueOperator(NormedMLP(4, 1, **cells))
        >>> qvalue = ValueOperator(NormedMLP(24, 1, **cells), in_keys=["observation", "action"])
        >>> actor = FlowRejectionActor(policy, qvalue, num_candidates=8, chunk_size=10)
        >>> model = ChunkedWorldModel(*(NormedMLP(24, size, **cells) for size in (4, 1, 1)))
        >>> loss = ValueExpansionLoss(actor, value, qvalue, model)
        >>> loss.make_value_estimator(gamma=0.99, lmbda=1.0)
        >>> loss_value, loss_qvalue = loss(observation=torch.randn(8, 4))
        >>> (loss_value + loss_qvalue).backward()
        >>> loss.imagine(TensorDict(observation=torch.randn(8, 4))).shape
        torch.Size([8, 10])
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
            state_action_value (NestedKey): the value of a chunk. Defaults to what the actor ranks
                by, or ``"state_action_value"``.
            reward (NestedKey): the imagined reward. Defaults to ``"reward"``.
            done (NestedKey): the imagined done. Defaults to ``"done"``.
            terminated (NestedKey): the imagined termination. Defaults to ``"terminated"``.
            noise (NestedKey): optional noise of the rollout. Defaults to ``"noise"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        goal: NestedKey = "goal"
        value_goal: NestedKey = "value_goal"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        noise: NestedKey = "noise"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )
    out_keys = ["loss_value", "loss_qvalue"]  # noqa: RUF012

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ChunkActor,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        world_model: TensorDictModuleBase,
        *,
        imagination_horizon: int = 10,
        chunk_size: int | None = None,
        delay_value: bool = True,
        ignore_terminated: bool = False,
        sampling_dtype: torch.dtype | None = None,
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
        if getattr(actor_network, "qvalue_network", qvalue_network) is not qvalue_network:
            raise ValueError(
                "actor_network ranks candidates with another network than qvalue_network; give "
                "both the same, so that chunks are chosen by the Q that is trained."
            )
        self.imagination_horizon = imagination_horizon
        self.chunk_size = chunk_size
        self.delay_value = delay_value
        self.ignore_terminated = ignore_terminated
        self.sampling_dtype = sampling_dtype
        self.reduction = reduction
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)
        self.convert_to_functional(qvalue_network, "qvalue_network")
        if (ranked := getattr(actor_network, "qvalue_key", None)) is not None:
            self.set_keys(state_action_value=ranked)  # what is trained is what chunks are ranked by
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

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Imagines from the batch and returns the terms in ``out_keys``."""
        # Q looks at the first imagined chunk only.
        horizon = self.imagination_horizon if "loss_value" in self.out_keys else 1
        rollout = self.imagine(tensordict, horizon)
        terms = {"loss_value": self.value_loss, "loss_qvalue": self.qvalue_loss}
        out = TensorDict({key: terms[key](rollout) for key in self.out_keys})
        self._clear_weakrefs(
            tensordict,
            out,
            "value_network_params",
            "qvalue_network_params",
        )
        return out

    @torch.no_grad()
    def imagine(
        self, tensordict: TensorDictBase, imagination_horizon: int | None = None
    ) -> TensorDictBase:
        """Imagines a rollout from each state, a tensordict of shape ``[*, H]``.

        ``H`` is ``imagination_horizon``, by default this module's. The rollout has the layout of
        :meth:`~torchrl.envs.EnvBase.rollout`: what was seen and done at its root, what followed
        under ``"next"``. All H steps are imagined, whether or not the task has ended before; with
        ``ignore_terminated`` none is said to end it.
        """
        state = self._conditions.read(tensordict, self._state_keys)
        for key in (self.tensor_keys.priority_weight, *self._loss_mask_keys()):
            if (entry := tensordict.get(key, None)) is not None:
                state[key] = entry
        # A tensordict made by dispatch has no batch size: the observation tells it.
        observation = state[self._state_keys[0]]
        start = TensorDict(state, batch_size=observation.shape[:-1])
        horizon = imagination_horizon or self.imagination_horizon
        noise = tensordict.get(self.tensor_keys.noise, None)
        if noise is not None:
            steps = (*start.shape, self.imagination_horizon, *noise.shape[start.ndim + 1 :])
            same_shape(self.tensor_keys.noise, noise, steps)
        ranking = ranking_with(self.actor_network, self.qvalue_network_params)
        with autocast_to(self.sampling_dtype, observation.device), ranking:
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

    def value_loss(self, rollout: TensorDictBase) -> Tensor:
        """The regression of V on the returns of a rollout ``[*, H]``."""
        target = self.value_target(rollout)
        with self.value_network_params.to_module(self.value_network):
            value = self._value(rollout)
        same_shape(self.tensor_keys.value, value, target.shape)
        error = (value - target).square().mean((-2, -1))
        return self._reduced(error, rollout[..., 0])

    def qvalue_loss(self, rollout: TensorDictBase) -> Tensor:
        """The regression of Q on one imagined chunk, the first of a rollout ``[*, H]``."""
        first = rollout[..., 0]
        keys = self.tensor_keys
        with torch.no_grad(), self.value_network_params.to_module(self.value_network):
            next_value = self._value(step_mdp(first))
        reward = first.get(("next", keys.reward))
        alive = first.get(("next", keys.terminated)).logical_not()
        target = reward + self.value_estimator.gamma * alive * next_value
        with self.qvalue_network_params.to_module(self.qvalue_network):
            qvalue = self.qvalue_network(first.select(*self.qvalue_network.in_keys))
        chosen = same_shape(
            keys.state_action_value, qvalue.get(keys.state_action_value), target.shape
        )
        error = (chosen - target).square().mean(-1)
        return self._reduced(error, first)

    @torch.no_grad()
    def value_target(self, rollout: TensorDictBase) -> Tensor:
        """The returns ``[*, H, 1]`` that V is regressed on."""
        following = step_mdp(rollout)
        device = rollout.get(self.value_network.in_keys[0]).device
        with (
            autocast_to(self.sampling_dtype, device),
            self.target_value_network_params.to_module(self.value_network),
        ):
            next_value = self._value(following)
        return self.value_estimator.value_estimate(rollout, next_value=next_value)

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
