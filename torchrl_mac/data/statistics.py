"""Per-dimension statistics of a dataset's observations and the normalisations they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["ObservationStatistics"]


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
        >>> from torchrl_mac.data import ObservationStatistics
        >>> statistics = ObservationStatistics.from_rows(np.float32([[0.0], [1.0], [4.0]]))
        >>> statistics.loc_scale("min_max")
        (tensor([2.]), tensor([2.0010]))
    """

    min: Tensor
    max: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def from_rows(cls, rows: np.ndarray, block: int = 1 << 16) -> ObservationStatistics:
        """Statistics of ``rows`` ``[N, O]``, in float64 and in blocks that bound the memory."""
        blocks = [rows[start : start + block] for start in range(0, len(rows), block)]
        mean = sum(part.sum(0, dtype=np.float64) for part in blocks) / len(rows)
        variance = sum(((part - mean) ** 2).sum(0) for part in blocks) / len(rows)
        return cls.from_dict(
            {"min": rows.min(0), "max": rows.max(0), "mean": mean, "std": np.sqrt(variance)}
        )

    @classmethod
    def from_dict(cls, values: dict) -> ObservationStatistics:
        """The inverse of :meth:`to_dict`."""
        return cls(**{key: torch.as_tensor(v, dtype=torch.float32) for key, v in values.items()})

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
