"""Losses compiled: as one graph, or network by network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torchrl._utils import logger as torchrl_logger
from torchrl.modules import MLP
from torchrl.objectives import LossModule

from torchrl_mac.modules import NormedMLP, StackedMLP

__all__ = ["CompiledFunction", "CompiledNetworks", "compiled", "networks_of"]

Total = tuple[torch.Tensor, TensorDictBase]


def compiled(
    function: Callable[[TensorDictBase], Total],
    losses: Iterable[LossModule],
    how: bool | str | Mapping[str, Any],
) -> CompiledFunction | None:
    """A function of losses, compiled as ``how`` says; ``None`` if not at all.

    Raises:
        ValueError: if ``how`` names no scope that there is.
    """
    if not how:
        return None
    options = {"scope": "losses"} if how is True else how
    options = {"scope": options} if isinstance(options, str) else {"scope": "losses", **options}
    scope = options.pop("scope")
    if scope == "losses":
        return CompiledFunction(function, **options)
    if scope == "networks":
        return CompiledNetworks(function, networks_of(losses), **options)
    raise ValueError(f"Compile 'losses', as one graph, or 'networks', one by one; got {scope!r}.")


class CompiledFunction:
    """A function compiled as one graph or, where that fails, as it is.

    Args:
        function (callable): maps a batch to the sum of its losses and to all of them.
        **kwargs: of :func:`torch.compile`.
    """

    def __init__(self, function: Callable[[TensorDictBase], Total], **kwargs: Any) -> None:
        self._plain = function
        self._function = torch.compile(function, **{"fullgraph": True, "dynamic": False, **kwargs})
        self._is_first = True
        self.is_active = True

    def __call__(self, tensordict: TensorDictBase) -> Total:
        """Calls the function."""
        if self._is_first:
            # Errors of the batch show as they are, and TensorDict settles of which kind target
            # parameters are: both would otherwise cost a second compilation.
            self._is_first = False
            with torch.no_grad(), torch.random.fork_rng():
                self._plain(tensordict)
        if self.is_active:
            try:
                return self._function(tensordict)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split("\n")[:2])
                torchrl_logger.warning(f"The update cannot be compiled, goes on without: {reason}")
                self.is_active = False
        return self._plain(tensordict)


class CompiledNetworks(CompiledFunction):
    """A function whose networks are compiled, each as a graph of its own, while it is called.

    That takes seconds, where the one graph of a rollout takes minutes, and leaves what lies between
    the networks as it is. Elsewhere, as in evaluation, the same networks stay eager.

    Args:
        function (callable): see :class:`CompiledFunction`.
        networks (sequence of nn.Module): the networks in it.
        **kwargs: of :func:`torch.compile`.
    """

    def __init__(
        self,
        function: Callable[[TensorDictBase], Total],
        networks: Iterable[nn.Module],
        **kwargs: Any,
    ) -> None:
        super().__init__(function, **kwargs)
        self._networks = {
            network: torch.compile(network._call_impl, **{"dynamic": False, **kwargs})
            for network in networks
        }
        self._function = self._with_networks

    def _with_networks(self, tensordict: TensorDictBase) -> Total:
        with self._installed():
            return self._plain(tensordict)

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        # All networks of a class share its code, and each counts as a compilation of it.
        limit = 8 * (1 + len(self._networks))
        for network, call in self._networks.items():
            network._compiled_call_impl = call
        try:
            with torch._dynamo.config.patch(recompile_limit=limit):
                yield
        finally:
            for network in self._networks:
                network._compiled_call_impl = None


def networks_of(losses: Iterable[LossModule]) -> list[nn.Module]:
    """The networks that losses call, each once: those that they train and those they only read."""
    held = [module for loss in losses for module in (loss, *vars(loss).values())]
    modules = [m for module in held if isinstance(module, nn.Module) for m in module.modules()]
    return list(dict.fromkeys(m for m in modules if isinstance(m, (NormedMLP, StackedMLP, MLP))))
