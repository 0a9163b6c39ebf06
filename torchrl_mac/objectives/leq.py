"""Lower-expectile Q-learning on imagined rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import step_mdp

from torchrl_mac.envs import imagine
from torchrl_mac.modules import ChunkActor
from torchrl_mac.modules.qvalues import aggregate
from torchrl_mac.objectives.average_return import average_return, look_ahead_shares
from torchrl_mac.objectives.common import GoalKeys, autocast_to, required, same_shape
from torchrl_mac.objectives.critics import QValueLossBase

__all__ = ["LEQLoss"]


class LEQLoss(QValueLossBase):
    r"""Lower-expectile Q-learning: pessimistic :math:`\lambda`-returns of imagined rollouts.

    From each state a deterministic actor and the world model imagine H steps, each a chunk of h
    actions, so that :math:`\Gamma = \gamma^h`. With the critic's values :math:`q_i` on the way and
    :math:`M_i = 1` until the task has ended, the return of step i is the weighted average of those
    that look n steps ahead,

    .. math::

        G_i^n &= M_i r_i + M_{i+1} \Gamma G_{i+1}^{n-1}, \qquad G_i^0 = q_i \\
        G_i &= \sum_{n=0}^{H-i} \lambda^n G_i^n \Big/ \sum_{n=0}^{H-i} \lambda^n

    The critic learns from imagined states and, by one-step targets, from the transitions of the
    batch, and stays near its target network :math:`\bar Q`; with
    :math:`E_\tau(u) = |\tau - 1_{u < 0}| \, u^2` and the share :math:`\rho` of imagination,

    .. math::

        \mathcal L_{expansion} &= \rho \, \mathrm{mean}_{i<H} \, \Gamma^i M_i
        \bigl[ E_\tau ( G_i - Q(s_i, a_i) ) + ( Q - \bar Q )^2 (s_i, a_i) \bigr] \\
        \mathcal L_{qvalue} &= (1 - \rho) \bigl[ E_{1/2} ( r + \Gamma m Q(s', \pi(s')) - Q(s, a) )
        + ( Q - \bar Q )^2 (s, a) \bigr]

    Each action of another rollout follows the gradient of its own return, through the model, the
    critic and what the actor does in answer,

    .. math::

        \mathcal L_{actor} = - \sum_{i \le H} w_i \,
        \mathrm{sg} \Bigl[ \frac{\partial G_i}{\partial a_i} \Bigr]^\top \pi(s_i), \qquad
        w_i = |\tau - 1_{G_i \le q_i}|, \quad w_H = \tfrac12

    (https://arxiv.org/abs/2407.00699). All targets are of the online critic, without a gradient.

    Args:
        actor_network (ChunkActor): acts with a deterministic policy, which is trained here, such as
            :class:`~torchrl_mac.modules.PolicyActor` with a
            :class:`~torchrl_mac.modules.TanhPolicy`.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics, see
            :class:`~torchrl_mac.objectives.QValueLossBase`; in the paper there is one.
        world_model (WorldModelBase): writes under ``"next"`` what follows. Not trained here.

    Keyword Args:
        imagination_horizon (int, optional): the number of imagined steps, H. Defaults to 10.
        lmbda (float, optional): :math:`\lambda`. Defaults to 0.95.
        expectile (float, optional): :math:`\tau`, below one half to be pessimistic. Defaults to
            0.1.
        model_batch_ratio (float, optional): :math:`\rho`. Defaults to 0.25.
        num_qvalue_nets (int, optional): see there. Defaults to 1.
        chunk_size (int, optional): h. Defaults to the actor's, or 1.
        **kwargs: the others of :class:`~torchrl_mac.objectives.QValueLossBase`.

    The input is that of :class:`~torchrl_mac.objectives.ChunkedQValueLoss`. Networks that read a
    ``"goal"`` read ``"value_goal"`` in the critic's terms and ``"actor_goal"`` in the actor's. What
    a stochastic world model draws (``"model_noise"`` ``[*, H, O]`` and ``"member"`` ``[*, H]`` in
    the critic's rollouts, ``"actor_model_noise"`` and ``"actor_member"`` in the actor's) is drawn
    unless the input has it.

    Raises:
        ValueError: if a number is out of range.

    The discount, per environment step, is set with ``make_value_estimator(gamma=0.997)``.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import (
        ...     EnsembleWorldModel, GaussianEnsemble, NormedMLP, PolicyActor, QValueEnsemble,
        ...     StackedMLP, TanhPolicy
        ... )
        >>> from torchrl_mac.objectives import LEQLoss
        >>> sizes = {"in_features": 4 + 2, "num_cells": (32,)}
        >>> model = EnsembleWorldModel(
        ...     GaussianEnsemble(StackedMLP(7, out_features=2 * 4, broadcast=True, **sizes)),
        ...     NormedMLP(out_features=1, **sizes),
        ...     NormedMLP(out_features=1, **sizes),
        ... )
        >>> actor = PolicyActor(TanhPolicy(NormedMLP(4, 2, num_cells=(32,))))
        >>> qvalue = QValueEnsemble(StackedMLP(1, out_features=1, broadcast=True, **sizes))
        >>> loss = LEQLoss(actor, qvalue, model, imagination_horizon=3)
        >>> loss.make_value_estimator(gamma=0.997)
        >>> loss_actor, loss_qvalue, loss_expansion, *_ = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 2),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_actor + loss_qvalue + loss_expansion).backward()
    """

    @dataclass
    class _AcceptedKeys(QValueLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            actor_goal (NestedKey): the entry of the input that the goal is in the actor's term, if
                the networks read one. Defaults to ``"actor_goal"``.
            model_noise (NestedKey): optional noise of the critic's rollouts.
            member (NestedKey): optional members of the world model in the critic's rollouts.
            actor_model_noise (NestedKey): optional noise of the actor's rollouts.
            actor_member (NestedKey): optional members of the world model in the actor's rollouts.
        """

        actor_goal: NestedKey = "actor_goal"
        model_noise: NestedKey = "model_noise"
        member: NestedKey = "member"
        actor_model_noise: NestedKey = "actor_model_noise"
        actor_member: NestedKey = "actor_member"

    default_keys = _AcceptedKeys
    out_keys = ["loss_actor", "loss_qvalue", "loss_expansion", "pred_value", "target_value"]  # noqa: RUF012

    actor_network: ChunkActor

    def __init__(
        self,
        actor_network: ChunkActor,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        world_model: TensorDictModuleBase,
        *,
        imagination_horizon: int = 10,
        lmbda: float = 0.95,
        expectile: float = 0.1,
        model_batch_ratio: float = 0.25,
        num_qvalue_nets: int = 1,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if imagination_horizon < 1:
            raise ValueError(f"imagination_horizon must be at least 1, got {imagination_horizon}.")
        shares = {"lmbda": lmbda, "expectile": expectile, "model_batch_ratio": model_batch_ratio}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}.")
        if chunk_size is None:
            chunk_size = actor_network.chunk_size or 1
        super().__init__(
            qvalue_network, num_qvalue_nets=num_qvalue_nets, chunk_size=chunk_size, **kwargs
        )
        self.convert_to_functional(actor_network, "actor_network")
        self.__dict__["world_model"] = world_model  # read, not trained
        self.imagination_horizon = imagination_horizon
        self.lmbda = lmbda
        self.expectile = expectile
        self.model_batch_ratio = model_batch_ratio

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the networks and the world model read, and what becomes of it."""
        states = [goals.sources(self._state_keys) for goals in self._goals]
        following = self._transition_keys(list(self.actor_network.in_keys))
        return list(dict.fromkeys([*states[0], *states[1], *following]))

    @property
    def _state_keys(self) -> list[NestedKey]:
        """What a rollout begins with."""
        model = [key for key in self.world_model.in_keys if key != self.tensor_keys.action]
        return list(dict.fromkeys([*self.actor_network.in_keys, *self._critic_keys, *model]))

    @property
    def _goals(self) -> tuple[GoalKeys, GoalKeys]:
        """Which goal there is in the critic's rollouts and in the actor's."""
        return self._conditions, GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    @property
    def _bootstrap_params(self) -> TensorDictParams:
        return self.qvalue_network_params

    @property
    def _discount(self) -> Tensor:
        """The discount of a step of a rollout."""
        return self.value_estimator.gamma**self.chunk_size

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        out = TensorDict()
        if "loss_actor" in self.out_keys:
            out.set("loss_actor", self.actor_loss(tensordict))
        if "loss_qvalue" in self.out_keys:
            loss, values = self.qvalue_loss(tensordict)
            out.update({"loss_qvalue": loss, **values})
        if "loss_expansion" in self.out_keys:
            out.set("loss_expansion", self.expansion_loss(tensordict))
        self._clear_weakrefs(
            tensordict,
            out,
            "actor_network_params",
            "qvalue_network_params",
            "target_qvalue_network_params",
        )
        return out

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's term on transitions of the batch, and what it was computed from."""
        loss, values = super().qvalue_loss(tensordict)
        return (1 - self.model_batch_ratio) * loss, values

    def _errors(self, members: Tensor, target: Tensor, taken: TensorDictBase) -> Tensor:
        return 0.5 * (members - target).square() + self._drift(members, taken)

    def _drift(self, members: Tensor, taken: TensorDictBase) -> Tensor:
        """How far the critics ``[E, *]`` are from their target networks."""
        with torch.no_grad():
            delayed = self.members(taken, self.target_qvalue_network_params)
        return (members - delayed).square()

    def expansion_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The critic's term on imagined states."""
        rollout = self.imagine(tensordict)
        taken = rollout.select(*self.qvalue_network.in_keys)
        members = self.members(taken, self.qvalue_network_params)
        target = self.lambda_return(rollout, members.detach())[..., :-1]
        steps = torch.arange(rollout.shape[-1], device=target.device)
        weight = self._discount**steps * self._alive(rollout)[..., :-1]
        ahead = target - members
        asymmetry = (self.expectile - (ahead <= 0).to(ahead.dtype)).abs()
        errors = weight * (asymmetry * ahead.square() + self._drift(members, taken))
        loss = self._reduced(errors.mean(0).mean(-1), tensordict)
        return self.model_batch_ratio * loss

    @torch.no_grad()
    def imagine(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Imagines a rollout ``[*, H]`` from each state, as the critic learns from."""
        start, keys = self._start(tensordict, self._conditions), self.tensor_keys
        noise = self._model_noise(tensordict, start, keys.model_noise, keys.member)
        actor, horizon = self.actor_network, self.imagination_horizon
        with autocast_to(self.sampling_dtype, start.get(self._state_keys[0]).device):
            with self.actor_network_params.to_module(actor):
                return imagine(actor, self.world_model, start, horizon, noise=noise)

    @torch.no_grad()
    def lambda_return(self, rollout: TensorDictBase, members: Tensor) -> Tensor:
        """The returns :math:`G_i` ``[*, H + 1]`` of a rollout ``[*, H]``.

        Args:
            rollout (TensorDictBase): see :meth:`imagine`.
            members (Tensor): what the critics say of its steps, ``[E, *, H]``.
        """
        last = step_mdp(rollout[..., -1]).select(*self._state_keys)
        with autocast_to(self.sampling_dtype, members.device):
            with self.actor_network_params.to_module(self.actor_network):
                last = self.actor_network(last)
            final = self._value(last)
        value = aggregate(members, self.q_aggregation)
        value = torch.cat([value, final.unsqueeze(-1)], -1)
        reward = rollout.get(("next", self.tensor_keys.reward)).squeeze(-1)
        return average_return(value, reward, self._alive(rollout), self._discount, self._shares)

    def actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The actor's term on imagined states of its own."""
        steps = self.action_gradient(tensordict)
        with self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network(steps.select(*self.actor_network.in_keys))
        action = action.get(self.tensor_keys.action)
        gain = (steps.get("action_gradient") * action).flatten(steps.ndim).sum(-1)
        return self._reduced(-(steps.get("weight") * gain).sum(-1), tensordict)

    @torch.no_grad()
    def action_gradient(self, tensordict: TensorDictBase) -> TensorDictBase:
        r"""Imagines how each action should change, a tensordict ``[*, H + 1]``.

        Returns:
            what the actor has read, :math:`\partial G_i / \partial a_i` as ``"action_gradient"``,
            :math:`w_i` as ``"weight"``, :math:`G_i` as ``"lambda_return"`` and :math:`q_i` as
            ``"value"``, ``[*, H + 1]``.
        """
        keys = self.tensor_keys
        start = self._start(tensordict, self._goals[1])
        noise = self._model_noise(tensordict, start, keys.actor_model_noise, keys.actor_member)
        actor = self.actor_network
        with (
            autocast_to(self.sampling_dtype, start.get(self._state_keys[0]).device),
            self.actor_network_params.to_module(actor),
        ):
            first = actor(start.copy()).get(keys.action)
            shift = first.new_zeros(self.imagination_horizon + 1, *first.shape)
            gradient, steps = torch.func.grad(self._surrogate, has_aux=True)(shift, start, noise)
        read, value, reward, alive = steps
        returns = average_return(value, reward, alive, self._discount, self._shares)
        ahead = (returns > value)[..., :-1].to(value.dtype)
        weight = self.expectile * ahead + (1 - self.expectile) * (1 - ahead)
        weight = torch.cat([weight, torch.full_like(value[..., :1], 0.5)], -1)
        return TensorDict(
            {
                **read,
                "action_gradient": gradient.movedim(0, start.ndim),
                "weight": weight,
                "lambda_return": returns,
                "value": value,
            },
            batch_size=value.shape,
        )

    def _surrogate(
        self, shift: Tensor, start: TensorDictBase, noise: TensorDictBase | None
    ) -> tuple[Tensor, tuple[dict[NestedKey, Tensor], Tensor, Tensor, Tensor]]:
        r"""A number whose gradient by the shift of each action is that of the action's own return.

        It sums up what each step adds to its own return, and the gradient of what follows a step
        enters it by the weight that the next return has in this one,
        :math:`p_i M_{i+1} \Gamma`.
        """
        model, keys = self.world_model, self.tensor_keys
        read: dict[NestedKey, list[Tensor]] = {key: [] for key in self.actor_network.in_keys}
        state, total, values, rewards = start, shift.new_zeros(start.shape), [], []
        alive = [torch.ones_like(total)]
        for i in range(len(shift)):
            step = self.actor_network(state.copy())
            step.set(keys.action, step.get(keys.action) + shift[i])
            for key, entries in read.items():
                entries.append(state.get(key))
            values.append(self._value(step))
            if i == self.imagination_horizon:
                break
            share = self._shares[i]
            step = model(step if noise is None else step.update(noise[..., i]))
            rewards.append(step.get(("next", keys.reward)).squeeze(-1))
            terminated = step.get(("next", keys.terminated)).squeeze(-1)
            total = total + (1 - share) * values[i] + share * alive[i] * rewards[i]
            alive.append(alive[i] * terminated.logical_not())
            following = step.get(("next", model.observation_key))
            weight = (share * self._discount * alive[i + 1]).unsqueeze(-1)
            following = following.detach() + weight * (following - following.detach())
            state = start.copy().set(model.observation_key, following)
        stacked = {key: torch.stack(entries, start.ndim) for key, entries in read.items()}
        value, reward, goes_on = (torch.stack(part, -1) for part in (values, rewards, alive))
        return (total + values[-1]).sum(), (stacked, value, reward, goes_on)

    @property
    def _shares(self) -> list[float]:
        return look_ahead_shares(self.imagination_horizon, self.lmbda)

    def _value(self, tensordict: TensorDictBase) -> Tensor:
        """The online critics' value ``[*]`` of what ``tensordict`` holds."""
        inputs = tensordict.select(*self.qvalue_network.in_keys)
        return aggregate(self.members(inputs, self.qvalue_network_params), self.q_aggregation)

    def _alive(self, rollout: TensorDictBase) -> Tensor:
        """Whether the task goes on before each step and after the last, ``[*, H + 1]``."""
        terminated = rollout.get(("next", self.tensor_keys.terminated)).squeeze(-1)
        goes_on = terminated.logical_not().to(rollout.get(("next", self.tensor_keys.reward)).dtype)
        return torch.cat([torch.ones_like(goes_on[..., :1]), goes_on.cumprod(-1)], -1)

    def _start(self, tensordict: TensorDictBase, goals: GoalKeys) -> TensorDictBase:
        """Where rollouts begin, ``[*]``."""
        state = goals.read(tensordict, self._state_keys)
        return TensorDict(state, batch_size=state[self._state_keys[0]].shape[:-1])

    def _model_noise(
        self,
        tensordict: TensorDictBase,
        start: TensorDictBase,
        noise_key: NestedKey,
        member_key: NestedKey,
    ) -> TensorDictBase | None:
        """What the world model is not to draw itself, ``[*, H]``."""
        size = (*start.shape, self.imagination_horizon)
        found = {}
        for name, key in (("model_noise_key", noise_key), ("member_key", member_key)):
            entry, target = tensordict.get(key, None), getattr(self.world_model, name, None)
            if entry is not None and target is not None:
                found[target] = same_shape(key, entry, (*size, *entry.shape[len(size) :]))
        return TensorDict(found, batch_size=size) if found else None

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        actor = self.actor_network
        inputs = self._conditions.read(tensordict, actor.in_keys, following=True)
        size = required(tensordict, ("next", self.tensor_keys.reward)).shape[:-1]
        with self.actor_network_params.to_module(actor):
            return actor(TensorDict(inputs, batch_size=size)).get(actor.action_key)
