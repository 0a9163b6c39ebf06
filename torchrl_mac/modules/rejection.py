"""Acting by rejection sampling: the best of N samples of a behaviour policy."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_mac.modules.actor import ChunkActor
from torchrl_mac.modules.shapes import shaped

__all__ = ["FlowRejectionActor"]


class FlowRejectionActor(ChunkActor):
    r"""Draws N candidates from a behaviour policy and acts with the one of highest value.

    .. math::

        a = \arg\max_{a_i} Q(s, a_i), \qquad a_i \sim \pi(\cdot \mid s), \; i = 1 \dots N

    No action leaves the behaviour policy's support, so the value is never asked about actions
    unlike the data (https://arxiv.org/abs/2512.08108; with chunks as in Q-chunking,
    https://arxiv.org/abs/2507.07969).

    Args:
        policy (TensorDictModule): writes an action ``[*, D]``, such as :class:`OneStepPolicy` or
            :class:`FlowMatchingPolicy`. It is sampled under every exploration type.
        qvalue_network (TensorDictModule): reads the action and writes its value ``[*, 1]``.

    Keyword Args:
        num_candidates (int, optional): the number of candidates N. May be changed at any time
            (MAC trains with 8 and acts with 32). Defaults to 32.
        qvalue_key (NestedKey, optional): the output of ``qvalue_network`` that candidates are
            ranked by, such as the minimum of two critics. Defaults to ``"state_action_value"`` if
            it is among the outputs, or else to the only one.
        value_key (NestedKey, optional): where the chosen action's value ``[*, 1]`` is written.
            Defaults to ``"chosen_action_value"``.
        **kwargs: those of :class:`ChunkActor`: ``chunk_size``, ``action_key``, where
            ``qvalue_network`` reads a candidate as well, ``noise_key`` (``[*, N, D]``) and
            ``transform``.

    Everything else that ``policy`` and ``qvalue_network`` read, such as the observation or a
    goal, is repeated for each candidate.

    Raises:
        ValueError: if ``num_candidates`` or ``chunk_size`` is smaller than 1, or if
            ``qvalue_network`` has several outputs and none of them is the one to rank by; when
            called, if a value is not ``[*, N, 1]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy
        >>> policy = OneStepPolicy(NormedMLP(4 + 10 * 2, 10 * 2, num_cells=(32,)), action_dim=20)
        >>> qvalue = ValueOperator(
        ...     NormedMLP(4 + 10 * 2, 1, num_cells=(32,)), in_keys=["observation", "action"]
        ... )
        >>> actor = FlowRejectionActor(policy, qvalue, num_candidates=8, chunk_size=10)
        >>> td = actor(TensorDict({"observation": torch.randn(3, 4)}, [3]))
        >>> td["action"].shape, td["chosen_action_value"].shape
        (torch.Size([3, 10, 2]), torch.Size([3, 1]))
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        qvalue_network: TensorDictModuleBase,
        *,
        num_candidates: int = 32,
        qvalue_key: NestedKey | None = None,
        value_key: NestedKey = "chosen_action_value",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.policy = policy
        self.qvalue_network = qvalue_network
        self.num_candidates = num_candidates
        self.qvalue_key = _ranked_by(qvalue_network, qvalue_key)
        self.value_key = unravel_key(value_key)
        self._set_keys(policy, qvalue_network)

    def _set_keys(self, *modules: TensorDictModuleBase) -> None:
        """Reads what modules that are called one after the other need from outside."""
        made_here = {self.action_key, *self._noise_keys}
        made_here.update(key for module in modules[:-1] for key in module.out_keys)
        read = dict.fromkeys(key for module in modules for key in module.in_keys)
        self.in_keys = [key for key in read if key not in made_here]
        self.out_keys = [self.action_key, self.value_key]

    @property
    def _noise_keys(self) -> list[NestedKey]:
        """What is drawn for each candidate, unless it is there."""
        return [self.noise_key]

    @property
    def _read_keys(self) -> list[NestedKey]:
        return [*self.in_keys, *self._noise_keys]

    @property
    def num_candidates(self) -> int:
        """The number of candidates an action is chosen from."""
        return self._num_candidates

    @num_candidates.setter
    def num_candidates(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"num_candidates must be at least 1, got {value}.")
        self._num_candidates = value

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "policy": self.policy,
            "qvalue_network": self.qvalue_network,
            "num_candidates": self.num_candidates,
            "qvalue_key": self.qvalue_key,
            "value_key": self.value_key,
            **super().config(),
        }

    @dispatch(source="_read_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the best candidate and its value."""
        candidates = self.candidates(tensordict)
        value = candidates.get(self.qvalue_key)
        shaped(value, (*candidates.batch_size, 1), f"The value {self.qvalue_key!r} of candidates")
        best = value.argmax(-2, keepdim=True)
        tensordict.set(self.value_key, value.gather(-2, best).squeeze(-2))
        action = candidates.get(self.action_key)
        flat = action.flatten(value.ndim - 1)
        chosen = flat.gather(-2, best.expand(*best.shape[:-1], flat.shape[-1])).squeeze(-2)
        return tensordict.set(self.action_key, self._chunk(chosen))

    def candidates(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The candidates and their values, a tensordict of shape ``[*, N]``."""
        inputs = self._read(tensordict)
        candidates = inputs.unsqueeze(-1).expand(*inputs.batch_size, self.num_candidates)
        for key in self._noise_keys:
            noise = tensordict.get(key, None)
            if noise is None:
                continue
            if noise.shape[-2] != self.num_candidates:
                raise ValueError(
                    f"{key!r} has shape {tuple(noise.shape)}: its second last dimension "
                    f"must be num_candidates={self.num_candidates}."
                )
            candidates.set(key, noise)
        with set_exploration_type(ExplorationType.RANDOM):
            candidates = self.policy(candidates)
        action = self._chunk(candidates.get(self.policy.out_keys[0]))
        return self._valued(candidates.set(self.action_key, action))

    def _valued(self, candidates: TensorDictBase) -> TensorDictBase:
        """Writes the values of actions ``[*, N, D]``."""
        return self.qvalue_network(candidates)


def _ranked_by(qvalue_network: TensorDictModuleBase, key: NestedKey | None) -> NestedKey:
    outputs = list(qvalue_network.out_keys)
    if key is not None:
        key = unravel_key(key)
        if key not in outputs:
            raise ValueError(
                f"qvalue_key={key!r} is not among the out_keys of qvalue_network, {outputs}."
            )
        return key
    if "state_action_value" in outputs:
        return "state_action_value"
    if len(outputs) != 1:
        raise ValueError(
            f"qvalue_network writes {outputs}: say which of them ranks candidates with qvalue_key."
        )
    return outputs[0]
