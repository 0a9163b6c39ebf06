"""Ensembles that predict a distribution and know their best members."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_mac.modules.config import Configurable
from torchrl_mac.modules.stacked import StackedMLP

__all__ = ["GaussianEnsemble"]


class GaussianEnsemble(nn.Module, Configurable):
    r"""Several networks, each of which predicts the mean and the deviation of its output.

    .. math::

        \hat y \sim \mathcal N(\mu_e(x), \sigma_e(x)^2), \qquad
        \log \sigma_e = l + (u - l)\,\mathrm{sigmoid}(\cdot)

    for members :math:`e = 1 \dots E` and bounds :math:`l, u`, as the dynamics of MOPO
    (https://arxiv.org/abs/2005.13239) and its successors. All members are computed in one pass.

    Args:
        network (StackedMLP): E networks that ``broadcast`` their inputs, with outputs of twice the
            size of what is predicted.

    Keyword Args:
        num_elites (int, optional): how many of the members :meth:`sample` draws from, the best ones
            once :meth:`choose_elites` was called. Defaults to all.
        log_std_bounds (tuple of float, optional): the bounds of the deviation's logarithm. Defaults
            to ``(-5.0, 1.0)``.

    Raises:
        ValueError: if the network does not broadcast, has an odd output size, or has fewer members
            than ``num_elites``.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import GaussianEnsemble, StackedMLP
        >>> network = StackedMLP(7, 4 + 2, 2 * 4, num_cells=(32,), broadcast=True)
        >>> ensemble = GaussianEnsemble(network, num_elites=5)
        >>> observation, action = torch.randn(3, 4), torch.randn(3, 2)
        >>> mean, std = ensemble(observation, action)
        >>> mean.shape, std.shape
        (torch.Size([7, 3, 4]), torch.Size([7, 3, 4]))
        >>> ensemble.choose_elites(torch.rand(7))  # each member's loss on validation data
        >>> ensemble.sample(observation, action).shape
        torch.Size([3, 4])
    """

    elites: Tensor

    def __init__(
        self,
        network: StackedMLP,
        *,
        num_elites: int | None = None,
        log_std_bounds: tuple[float, float] = (-5.0, 1.0),
    ) -> None:
        super().__init__()
        members = network.num_networks
        num_elites = members if num_elites is None else num_elites
        if not network.broadcast or network.out_features % 2:
            raise ValueError(
                "An ensemble's network has broadcast=True and an even number of outputs, means and "
                f"deviations; got broadcast={network.broadcast} and {network.out_features}."
            )
        if not 1 <= num_elites <= members:
            raise ValueError(f"num_elites must be between 1 and {members}, got {num_elites}.")
        self.network = network
        self.log_std_bounds = (float(log_std_bounds[0]), float(log_std_bounds[1]))
        self.register_buffer("elites", torch.arange(num_elites))

    @property
    def num_members(self) -> int:
        """The number of networks E."""
        return self.network.num_networks

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "network": self.network,
            "num_elites": len(self.elites),
            "log_std_bounds": self.log_std_bounds,
        }

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Maps inputs ``[*, ...]`` to each member's mean and deviation, ``[E, *, O]``."""
        mean, raw = self.network(*inputs).chunk(2, -1)
        low, high = self.log_std_bounds
        return mean, (low + (high - low) * raw.sigmoid()).exp()

    def log_prob(self, target: Tensor, *inputs: Tensor) -> Tensor:
        """The log-likelihood of ``target`` ``[*, O]`` under each member, ``[E, *]``."""
        mean, std = self(*inputs)
        return torch.distributions.Normal(mean, std, validate_args=False).log_prob(target).sum(-1)

    @torch.no_grad()
    def choose_elites(self, losses: Tensor) -> None:
        """Makes the members with the smallest ``losses`` ``[E]`` the elites, best first."""
        self.elites.copy_(losses.argsort()[: len(self.elites)])

    def sample(
        self, *inputs: Tensor, noise: Tensor | None = None, member: Tensor | None = None
    ) -> Tensor:
        """Draws an output ``[*, O]``, each row from an elite of its own.

        Args:
            *inputs (Tensor): as in :meth:`forward`.

        Keyword Args:
            noise (Tensor, optional): standard normal ``[*, O]``. Default: drawn.
            member (Tensor, optional): the number of the member for each row, int64 ``[*]``.
                Default: drawn among the elites.
        """
        mean, std = self(*inputs)
        if member is None:
            choice = torch.randint(len(self.elites), mean.shape[1:-1], device=mean.device)
            member = self.elites[choice]
        index = member[None, ..., None].expand(1, *mean.shape[1:])
        mean, std = mean.gather(0, index)[0], std.gather(0, index)[0]
        return mean + std * (torch.randn_like(mean) if noise is None else noise)
