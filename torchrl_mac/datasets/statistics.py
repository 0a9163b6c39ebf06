"""Per-dimension statistics of a dataset's observations and the normalisations they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["ObservationStatistics", "RunningStatistics"]

_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class ObservationStatistics:
    """Minimum, maximum, mean and standard deviation of each observation dimension.

    Args:
        min (Tensor): ``[O]`` float32, and so are the others.
        max (Tensor): the largest values.
        mean (Tensor): the means.
        std (Tensor): the standard deviations (of the population: no Bessel correction).

    Examples:
        >>> import numpy as np
        >>> from torchrl_mac.datasets import ObservationStatistics
        >>> statistics = ObservationStatistics.from_rows(np.float32([[0.0], [1.0], [4.0]]))
        >>> statistics.loc_scale("min_max")
        (tensor([2.]), tensor([2.0010]))
    """

    min: Tensor
    max: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> ObservationStatistics:
        """Statistics of ``rows`` ``[N, O]``, in float64."""
        running = RunningStatistics()
        running.update(rows)
        return cls.from_running([running.to_dict()])

    @classmethod
    def from_running(cls, parts: Sequence[dict]) -> ObservationStatistics:
        """Statistics of all rows behind several :meth:`RunningStatistics.to_dict`."""
        total = RunningStatistics()
        for part in parts:
            total.merge(**part)
        std = np.sqrt(total.square / total.count)
        return cls.from_dict({"min": total.min, "max": total.max, "mean": total.mean, "std": std})

    @classmethod
    def from_dict(cls, values: Any) -> ObservationStatistics:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if they are not finite numbers that can be the statistics of some rows.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or values.keys() != set(names):
            raise ValueError(f"statistics must have {names}, got {values!r:.60}")
        try:
            tensors = [torch.as_tensor(values[name], dtype=torch.float32) for name in names]
            stacked = torch.stack(tensors).double()
        except (TypeError, ValueError, RuntimeError) as err:
            raise ValueError(f"statistics must be lists of as many numbers each ({err})") from err
        if stacked.ndim != 2 or not stacked.isfinite().all():
            raise ValueError("statistics must be lists of finite numbers")
        low, high, mean, std = stacked
        slack = 1e-6 * torch.maximum(low.abs(), high.abs())  # they are rounded to float32
        fits = (low <= high) & (low - slack <= mean) & (mean <= high + slack)
        fits &= (std >= 0) & (std <= (high - low) * (0.5 + 1e-6) + slack)
        if not fits.all():
            raise ValueError(
                "statistics: 'min', 'max', 'mean' and 'std' are not those of any numbers in "
                f"dimension {int(fits.int().argmin())}"
            )
        return cls(*tensors)

    def to_dict(self) -> dict[str, list[float]]:
        """The four statistics as lists of numbers, which JSON keeps exactly."""
        return {key: value.tolist() for key, value in vars(self).items()}

    def loc_scale(
        self, kind: Literal["min_max", "mean_std"] = "min_max", eps: float = 1e-3
    ) -> tuple[Tensor, Tensor]:
        """The centre and half-width (or mean and deviation) of each dimension.

        ``(x - loc) / scale`` maps the data into [-1, 1] for ``"min_max"``, which is MAC's
        normalisation.

        Args:
            kind (str, optional): ``"min_max"`` or ``"mean_std"``. Defaults to ``"min_max"``.
            eps (float, optional): added to the scale, so that constant dimensions stay finite.
                Defaults to ``1e-3``.

        Returns:
            loc and scale, ``[O]`` each.
        """
        if kind == "min_max":
            return (self.max + self.min) / 2, (self.max - self.min) / 2 + eps
        if kind == "mean_std":
            return self.mean, self.std + eps
        raise ValueError(f"kind must be 'min_max' or 'mean_std', got {kind!r}.")


class RunningStatistics:
    """What statistics are computed from, gathered block by block in bounded memory.

    Examples:
        >>> running = RunningStatistics()
        >>> running.update(np.float32([[0.0], [1.0]]))
        >>> running.update(np.float32([[5.0]]))
        >>> running.mean, running.square  # the mean and the sum of squared deviations from it
        (array([2.]), array([14.]))
    """

    def __init__(self) -> None:
        self.count = 0
        self.min = self.max = self.mean = self.square = np.zeros(0)

    def update(self, rows: np.ndarray) -> None:
        """Adds rows ``[N, O]``."""
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            mean = block.mean(0, dtype=np.float64)
            square = ((block - mean) ** 2).sum(0)
            self.merge(len(block), block.min(0), block.max(0), mean, square)

    def merge(
        self,
        count: int,
        min: Sequence[float] | np.ndarray,
        max: Sequence[float] | np.ndarray,
        mean: Sequence[float] | np.ndarray,
        square: Sequence[float] | np.ndarray,
    ) -> None:
        """Adds rows of which these statistics are known."""
        low, high, centre, spread = (np.asarray(x, np.float64) for x in (min, max, mean, square))
        if self.count:
            total = self.count + count
            shift = centre - self.mean
            low, high = np.minimum(self.min, low), np.maximum(self.max, high)
            centre = self.mean + shift * (count / total)
            spread = self.square + spread + shift**2 * (self.count * count / total)
        self.min, self.max, self.mean, self.square = low, high, centre, spread
        self.count += count

    def to_dict(self) -> dict[str, Any]:
        """The arguments of :meth:`merge`, for JSON."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in vars(self).items()
        }
