"""What losses with an ensemble of critics share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import _vmap_func, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_mac.modules import QAggregation, QValueEnsemble
from torchrl_mac.modules.qvalues import aggregate
from torchrl_mac.objectives.common import (
    GoalKeys,
    autocast_to,
    required,
    same_shape,
)
from torchrl_mac.objectives.regression import ValueLoss, difference, expectation

__all__ = ["QValueLossBase"]


CriticReduction = Literal["mean", "sum"]


class QValueLossBase(LossModule):
    r"""What losses with an ensemble of critics share: their members, their target, their term.

    A subclass has an ``actor_network`` that chooses the actions of the next state: a policy that is
    trained by the same loss, unless ``_next_action`` says otherwise.

    Args:
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics: an ensemble
            as one module; one critic, of which ``num_qvalue_nets`` are made with parameters of
            their own; or a list of critics. They write ``"state_action_value"`` ``[*, 1]``.

    Keyword Args:
        num_qvalue_nets (int, optional): the number of critics made of a single one. Defaults to 2.
        q_aggregation (str, optional): ``"mean"`` or ``"min"`` of the critics in the target.
            Defaults to an ensemble's own, or else ``"mean"``.
        chunk_size (int, optional): the number of environment steps from a state to the next, where
            the input does not say it as ``"steps_to_next_obs"``. Defaults to 1.
        loss_function (str, optional): ``"l2"`` (default), or ``"bce"`` where values are
            probabilities, such as that of reaching a goal: critics then write logits, which are
            aggregated as probabilities.
        target_range (tuple of float, optional): what the target is clipped to, such as the values
            that are possible. Defaults to (0, 1) with ``"bce"``, else to none.
        sampling_dtype (torch.dtype, optional): the next state's actions and values, and a teacher's
            samples, are computed under autocast to this dtype. Defaults to none.
        critic_reduction (str, optional): ``"mean"`` (default) or ``"sum"`` of the critics' errors.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch, after that
            over the critics. Defaults to ``"mean"``.

    Raises:
        ValueError: if a number or a name is out of range, or the ensemble aggregates otherwise.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            action (NestedKey): the action taken. Defaults to ``"action"``.
            goal (NestedKey): the goal's entry for the networks, if they read one. Defaults to
                ``"goal"``.
            value_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"value_goal"``.
            state_action_value (NestedKey): the output of a critic. Defaults to
                ``"state_action_value"``.
            reward (NestedKey): the reward until the next state, under ``"next"``, discounted within
                the chunk. Defaults to ``"reward"``.
            done (NestedKey): under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): whether the task ends on the way, under ``"next"``. Defaults to
                ``"terminated"``.
            steps_to_next_obs (NestedKey): optionally, the number of steps on the way, by which the
                target is discounted. Defaults to ``"steps_to_next_obs"``.
            whole (NestedKey): optionally, whether the way stays within an episode, under
                ``"next"``: samples where it does not count with an error of 0. Defaults to
                ``"whole"``.
            next_noise (NestedKey): optional noise of the next action.
            priority (NestedKey): where the largest squared error of a critic is written, ``[*]``.
                Defaults to ``"td_error"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        action: NestedKey = "action"
        goal: NestedKey = "goal"
        value_goal: NestedKey = "value_goal"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        whole: NestedKey = "whole"
        next_noise: NestedKey = "next_noise"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0

    actor_network: Any
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModuleBase
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        num_qvalue_nets: int = 2,
        q_aggregation: QAggregation | None = None,
        chunk_size: int = 1,
        loss_function: ValueLoss = "l2",
        target_range: tuple[float, float] | None = None,
        sampling_dtype: torch.dtype | None = None,
        critic_reduction: CriticReduction = "mean",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(qvalue_network, list) and len(qvalue_network) == 1:
            (qvalue_network,), num_qvalue_nets = qvalue_network, 1  # TorchRL would not train it
        ensemble = qvalue_network if isinstance(qvalue_network, QValueEnsemble) else None
        own = None if ensemble is None else ensemble.q_aggregation
        q_aggregation = q_aggregation or own or "mean"
        if q_aggregation not in get_args(QAggregation):
            raise ValueError(
                f"q_aggregation must be one of {get_args(QAggregation)}, got {q_aggregation!r}."
            )
        if own not in (None, q_aggregation):
            raise ValueError(
                f"q_aggregation={q_aggregation!r} is not that of qvalue_network, {own!r}."
            )
        for name, value, allowed in (
            ("loss_function", loss_function, get_args(ValueLoss)),
            ("critic_reduction", critic_reduction, get_args(CriticReduction)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.q_aggregation: QAggregation = q_aggregation
        self.chunk_size = chunk_size
        self.loss_function: ValueLoss = loss_function
        if target_range is None and loss_function == "bce":
            target_range = (0.0, 1.0)
        self.target_range = target_range
        self.sampling_dtype = sampling_dtype
        self.critic_reduction: CriticReduction = critic_reduction
        self.reduction = reduction
        self._is_ensemble = ensemble is not None
        self.convert_to_functional(
            qvalue_network,
            "qvalue_network",
            expand_dim=None if self._is_ensemble else num_qvalue_nets,
            create_target_params=True,
        )
        if ensemble is not None:
            self.set_keys(state_action_value=ensemble.out_keys[0])
        else:
            self._vmap_qvalue = _vmap_func(self.qvalue_network, in_dims=(None, 0))
        self.make_value_estimator()

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.value_goal)

    @property
    def _critic_keys(self) -> list[NestedKey]:
        """What the critics read beside the action."""
        action = unravel_key(self.tensor_keys.action)
        return [key for key in self.qvalue_network.in_keys if key != action]

    def _transition_keys(self, next_keys: list[NestedKey]) -> list[NestedKey]:
        """What the critics' term reads, with ``next_keys`` of the next state."""
        keys = self.tensor_keys
        read = [*self._critic_keys, *next_keys]
        following = [key for key in read if key != keys.goal]
        following += [keys.reward, keys.done, keys.terminated]
        return list(
            dict.fromkeys(
                [
                    *self._conditions.sources(self._critic_keys),
                    keys.action,
                    *(unravel_key(("next", key)) for key in following),
                ]
            )
        )

    def members(self, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """The values ``[E, *]`` of what critics with these parameters read."""
        if self._is_ensemble:
            with params.to_module(self.qvalue_network, preserve_module_state=False):
                values = self.qvalue_network(tensordict).get(self.qvalue_network.out_keys[1])
            return values.movedim(-1, 0)
        values = self._vmap_qvalue(tensordict, params)
        return values.get(self.tensor_keys.state_action_value).squeeze(-1)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression of all critics on one target, and what it was computed from."""
        keys = self.tensor_keys
        target = self.target(tensordict)
        inputs = self._conditions.read(tensordict, self._critic_keys)
        size = tensordict.get(("next", keys.reward)).shape[:-1]
        inputs[keys.action] = required(tensordict, keys.action)
        taken = TensorDict(inputs, batch_size=size)
        members = self.members(taken, self.qvalue_network_params)
        same_shape("the critics' values", members, (members.shape[0], *target.shape))
        errors = self._errors(members, target, taken)
        whole = tensordict.get(("next", keys.whole), None)
        if whole is not None:
            errors = errors * same_shape(("next", keys.whole), whole, (*size, 1)).squeeze(-1)
        if not torch.compiler.is_compiling():
            tensordict.set(keys.priority, errors.detach().max(0).values)
        error = errors.mean(0) if self.critic_reduction == "mean" else errors.sum(0)
        values = {"pred_value": self.expected(members.detach()), "target_value": target}
        return self._reduced(error, tensordict), values

    def expected(self, members: Tensor) -> Tensor:
        """The one value ``[*]`` that critics ``[E, *]`` expect together."""
        return aggregate(expectation(members, self.loss_function), self.q_aggregation)

    def _errors(self, members: Tensor, target: Tensor, taken: TensorDictBase) -> Tensor:
        """What each critic is to lower, ``[E, *]``, at what ``taken`` holds."""
        return difference(members, target.expand_as(members), self.loss_function)

    @property
    def _bootstrap_params(self) -> TensorDictParams:
        """The critics that the next state is valued by."""
        return self.target_qvalue_network_params

    @torch.no_grad()
    def target(self, tensordict: TensorDictBase) -> Tensor:
        """The targets ``[*]`` of all critics."""
        keys = self.tensor_keys
        reward = required(tensordict, ("next", keys.reward))
        with autocast_to(self.sampling_dtype, reward.device):
            next_value = self._next_value(tensordict)
        same_shape("the next state's value", next_value, reward.shape)
        outcome = TensorDict(batch_size=reward.shape[:-1])
        for key in (keys.reward, keys.done, keys.terminated):
            outcome.set(unravel_key(("next", key)), required(tensordict, ("next", key)))
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is None:
            steps = torch.full_like(reward, self.chunk_size)
        outcome.set(keys.steps_to_next_obs, steps)
        target = self.value_estimator.value_estimate(outcome, next_value=next_value).squeeze(-1)
        return target if self.target_range is None else target.clamp(*self.target_range)

    def _next_value(self, tensordict: TensorDictBase) -> Tensor:
        """What is expected from the next state on, ``[*, 1]``: there the actor goes on."""
        keys = self.tensor_keys
        following = self._conditions.read(tensordict, self._critic_keys, following=True)
        taken = required(tensordict, keys.action)
        action, size = self._next_action(tensordict), tensordict.get(("next", keys.reward)).shape
        following[keys.action] = action.flatten(len(size) - 1).reshape(taken.shape)
        inputs = TensorDict(following, batch_size=size[:-1])
        return self.expected(self.members(inputs, self._bootstrap_params)).unsqueeze(-1)

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        read = self.actor_network.in_keys[:-1]
        values = self._conditions.read(tensordict, read, following=True).values()
        noise = tensordict.get(self.tensor_keys.next_noise, None)
        with self.actor_network_params.to_module(self.actor_network):
            return self.actor_network(torch.cat([*values], -1), noise)

    def _reduced(self, error: Tensor, tensordict: TensorDictBase) -> Tensor:
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error, tensordict, weights=weights)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            names = ("reward", "done", "terminated", "steps_to_next_obs")
            keys = {name: getattr(self.tensor_keys, name) for name in names}
            self._value_estimator.set_keys(value=self.tensor_keys.state_action_value, **keys)

    def make_value_estimator(
        self,
        value_type: ValueEstimators | type[ValueEstimatorBase] | ValueEstimatorBase | None = None,
        **hyperparams: Any,
    ) -> None:
        """Sets the discount.

        Args:
            value_type (ValueEstimators, class or instance, optional): ``TD0`` (default), or an
                estimator of one's own.
            **hyperparams: ``gamma``, per environment step, defaults to 0.99.

        Raises:
            ValueError: if ``gamma`` is out of range.
        """
        if not 0 < hyperparams.get("gamma", 0.99) <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {hyperparams['gamma']}.")
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self,
                value_type,
                supported=(ValueEstimators.TD0,),
                value_network=None,
                **hyperparams,
            )
        self._forward_value_estimator_keys()
