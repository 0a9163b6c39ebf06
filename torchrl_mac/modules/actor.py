"""What acts in chunks: the contract that evaluation, checkpoints and exports rely on."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs.transforms import Transform

from torchrl_mac.modules.config import Configurable, as_key

__all__ = ["ChunkActor", "PolicyActor"]


class ChunkActor(TensorDictModuleBase, Configurable):
    """An actor whose every action is a chunk of ``chunk_size`` actions.

    A subclass writes ``action_key`` in its ``forward``, lists ``in_keys`` and ``out_keys``, and
    returns its own arguments, beside those here, from :meth:`config`.

    An actor takes a tensordict, or tensors by the names of its ``in_keys`` and the noise's:
    ``actor(observation=..., goal=...)`` returns the tensors of its ``out_keys``.

    Keyword Args:
        chunk_size (int, optional): the number of actions h in a chunk: a policy's ``[*, h * A]`` is
            then written as ``[*, h, A]``. ``None`` (default) writes actions ``[*, D]``.
        action_key (NestedKey, optional): where the action is written. Defaults to ``"action"``.
        noise_key (NestedKey, optional): where explicit noise is read, if it is there; the policy
            must read it from the same key. Defaults to ``"noise"``.
        transform (Transform, optional): applied to what the actor reads, and saved with it. With
            the dataset's ``observation_norm(["observation"])`` the actor takes raw observations
            and leaves them as they are. Defaults to none.

    Raises:
        ValueError: if ``chunk_size`` is smaller than 1.
    """

    def __init__(
        self,
        *,
        chunk_size: int | None = None,
        action_key: NestedKey = "action",
        noise_key: NestedKey = "noise",
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 (or None), got {chunk_size}.")
        self.chunk_size = chunk_size
        self.action_key = unravel_key(action_key)
        self.noise_key = unravel_key(noise_key)
        self.transform = transform

    def config(self) -> dict[str, Any]:
        """The arguments of every chunk actor."""
        return {
            "chunk_size": self.chunk_size,
            "action_key": self.action_key,
            "noise_key": self.noise_key,
            "transform": self.transform,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another actor from what :meth:`config` returned."""
        names = [name for name in config if name.endswith("_key")]
        return cls(**{**config, **{name: as_key(config[name]) for name in names}})

    @property
    def _read_keys(self) -> list[NestedKey]:
        # What dispatch takes as tensors: noise is read, but need not be there.
        return [*self.in_keys, self.noise_key]

    def _read(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the actor reads, transformed."""
        inputs = tensordict.select(*self.in_keys)
        # A tensordict made by dispatch has no batch size: the observation tells it.
        inputs.batch_size = inputs.get(self.in_keys[0]).shape[:-1]
        return inputs if self.transform is None else self.transform(inputs)

    def _chunk(self, action: Tensor) -> Tensor:
        """The flat action ``[*, h * A]`` of a policy as a chunk ``[*, h, A]``."""
        if self.chunk_size is None:
            return action
        return action.unflatten(-1, (self.chunk_size, -1))


class PolicyActor(ChunkActor):
    """Acts as a policy says: any policy, as an actor that can be evaluated, saved and exported.

    Args:
        policy (TensorDictModule): writes an action ``[*, D]`` as the first of its ``out_keys``.

    Keyword Args:
        deterministic (bool, optional): whether noise that is not given is zero, which makes the
            mode of a squashed Gaussian. Defaults to ``False``: the policy draws it.
        **kwargs: those of :class:`ChunkActor`: ``chunk_size``, ``action_key``, ``noise_key`` (of
            noise ``[*, D]``) and ``transform``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import NormedMLP, OneStepPolicy, PolicyActor
        >>> policy = OneStepPolicy(NormedMLP(4 + 10 * 2, 10 * 2, num_cells=(32,)), action_dim=20)
        >>> actor = PolicyActor(policy, chunk_size=10)
        >>> actor(TensorDict({"observation": torch.randn(3, 4)}, [3]))["action"].shape
        torch.Size([3, 10, 2])
    """

    def __init__(
        self, policy: TensorDictModuleBase, *, deterministic: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.policy = policy
        self.deterministic = deterministic
        self.in_keys = [key for key in policy.in_keys if key != self.noise_key]
        self.out_keys = [self.action_key]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"policy": self.policy, "deterministic": self.deterministic}
        return {**own, **super().config()}

    @dispatch(source="_read_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the policy's action."""
        inputs, noise = self._read(tensordict), tensordict.get(self.noise_key, None)
        if noise is None and self.deterministic:
            state = inputs.get(self.in_keys[0])
            noise = state.new_zeros(*state.shape[:-1], self.policy.action_dim)
        if noise is not None:
            inputs.set(self.noise_key, noise)
        action = self.policy(inputs).get(self.policy.out_keys[0])
        return tensordict.set(self.action_key, self._chunk(action))
