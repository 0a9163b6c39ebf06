"""How far a value is from its target: squares, cross-entropy, and more weight on one side."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Asymmetry", "ValueLoss", "asymmetric_difference", "difference", "expectation"]

ValueLoss = Literal["l2", "bce"]
Asymmetry = Literal["expectile", "quantile"]

_EPS = 1e-6  # from the probabilities whose logits are infinite


def expectation(value: Tensor, loss_function: ValueLoss) -> Tensor:
    """What a network's output says: the number itself, or the probability that a logit is of."""
    return value.sigmoid() if loss_function == "bce" else value


def difference(value: Tensor, target: Tensor, loss_function: ValueLoss) -> Tensor:
    """The square of a difference or, between a logit and a probability, the cross-entropy."""
    if loss_function == "bce":
        return F.binary_cross_entropy_with_logits(value, target, reduction="none")
    return (value - target).square()


def asymmetric_difference(
    value: Tensor,
    target: Tensor,
    loss_function: ValueLoss,
    expectile: float | None,
    asymmetry: Asymmetry = "expectile",
) -> Tensor:
    r"""A difference that counts :math:`\kappa` below its target and :math:`1 - \kappa` above.

    Args:
        value (Tensor): numbers or logits.
        target (Tensor): numbers or probabilities, of the same shape.
        loss_function (str): ``"l2"`` or ``"bce"``.
        expectile (float or None): :math:`\kappa`; ``None`` weighs both sides by 1.
        asymmetry (str): ``"expectile"``, or ``"quantile"`` for the absolute difference, with
            ``"bce"`` of logits, in the place of the square or the cross-entropy.

    Examples:
        >>> import torch
        >>> value, target = torch.zeros(2), torch.tensor([-1.0, 2.0])
        >>> asymmetric_difference(value, target, "l2", expectile=0.75)
        tensor([0.2500, 3.0000])
        >>> asymmetric_difference(value, target, "l2", expectile=0.75, asymmetry="quantile")
        tensor([0.2500, 1.5000])
    """
    if asymmetry == "quantile":
        wanted = target.logit(_EPS) if loss_function == "bce" else target
        error = (value - wanted).abs()
    else:
        error = difference(value, target, loss_function)
    if expectile is None:
        return error
    below = target >= expectation(value.detach(), loss_function)
    return error * torch.where(below, expectile, 1 - expectile)
