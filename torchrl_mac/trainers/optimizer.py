"""The optimizer of a phase: every parameter once, with the settings of its module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrl.objectives import LossModule

__all__ = ["make_adam", "parameter_groups", "parameter_names"]


def parameter_names(losses: Mapping[str, LossModule]) -> dict[str, nn.Parameter]:
    """The parameters of losses, each once, by ``"{loss}.{module}.{...}"``.

    One that several losses share has the name it has in the first. Target networks are not among
    them.

    Args:
        losses (dict of LossModule): the losses, by name.

    Examples:
        >>> from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.objectives import FlowBCLoss
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 6 + 1, 6, num_cells=()), action_dim=6)
        >>> student = OneStepPolicy(NormedMLP(4 + 6, 6, num_cells=()), action_dim=6)
        >>> list(parameter_names({"behaviour": FlowBCLoss(flow, student)}))[0]
        'behaviour.flow_policy.module.velocity_network.layers.0.weight'
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for name, loss in losses.items():
        for path, parameter in loss.named_parameters():
            module, dot, rest = path.partition(".")
            full = f"{name}.{module.removesuffix('_params')}{dot}{rest}"
            if parameter not in seen:
                seen.add(parameter)
                found[full] = parameter
    return found


def parameter_groups(
    losses: Mapping[str, LossModule], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Parameters in groups for an optimizer, with settings for some of the modules.

    Args:
        losses (dict of LossModule): the losses, by name.
        settings (dict): options of the optimizer, by what they are for: a loss (``"sac"``), a
            module of a loss (``"qvalue_network"``, or ``"sac.qvalue_network"``), a part of it
            (``"world_model.reward_network"``) or a single parameter (``"log_alpha"``). The most
            specific one counts.

    Returns:
        one group for each entry that has parameters, and one for all the others.

    Raises:
        ValueError: if an entry names nothing.

    Examples:
        >>> from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.objectives import FlowBCLoss
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 6 + 1, 6, num_cells=()), action_dim=6)
        >>> student = OneStepPolicy(NormedMLP(4 + 6, 6, num_cells=()), action_dim=6)
        >>> losses = {"behaviour": FlowBCLoss(flow, student)}
        >>> groups = parameter_groups(losses, {"onestep_policy": {"lr": 1e-3}})
        >>> [(len(group["params"]), group.get("lr")) for group in groups]
        [(2, None), (2, 0.001)]
    """
    groups: dict[str | None, list[nn.Parameter]] = {None: [], **{key: [] for key in settings}}
    named = set()
    for full, parameter in parameter_names(losses).items():
        matching = [key for key in settings if _is_of(full, key)]
        named.update(matching)
        groups[max(matching, key=len, default=None)].append(parameter)
    if unknown := [key for key in settings if key not in named]:
        modules = sorted({".".join(full.split(".")[:2]) for full in parameter_names(losses)})
        raise ValueError(f"There is nothing to optimize named {unknown}; choose among {modules}.")
    return [
        {"params": parameters, **(settings[key] if key is not None else {})}
        for key, parameters in groups.items()
        if parameters
    ]


def _is_of(full: str, key: str) -> bool:
    return any(f"{name}.".startswith(f"{key}.") for name in (full, full.partition(".")[2]))


def make_adam(
    losses: Mapping[str, LossModule],
    lr: float,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    capturable: bool = False,
) -> torch.optim.Adam:
    """Adam over all parameters of some losses, in the form that every kind of update can use.

    Args:
        losses (dict of LossModule): the losses, by name.
        lr (float): the learning rate.
        settings (dict, optional): options of :class:`~torch.optim.Adam` for modules, see
            :func:`parameter_groups`; ``lr`` is one of them. Defaults to none.

    Keyword Args:
        capturable (bool, optional): whether it is captured in a CUDA graph. Defaults to ``False``.

    Raises:
        ValueError: if an entry of ``settings`` names nothing, or an option does not exist.
    """
    groups = parameter_groups(losses, settings or {})
    known = torch.optim.Adam([torch.zeros(1)]).defaults
    for group in groups:
        if unknown := group.keys() - known.keys() - {"params"}:
            raise ValueError(f"Adam has no option {sorted(unknown)}; choose among {sorted(known)}.")
        rate = float(group.get("lr", lr))
        if not rate > 0:
            raise ValueError(f"A learning rate must be positive, got {rate}.")
        device = group["params"][0].device
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate
    return torch.optim.Adam(groups, fused=True, capturable=capturable)
