"""Modules as plain values, and back: what an exported actor is described by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.transforms import Compose, ObservationNorm
from torchrl.modules import ValueOperator

__all__ = ["Configurable", "as_key", "as_keys", "build", "describe", "register_config"]


class Configurable:
    """A module that can say what it was made with, as plain values and other such modules.

    A subclass returns the arguments of its constructor from :meth:`config`. Where these are not
    yet plain values, it overrides :meth:`from_config` as well. It is known under its name from
    then on: :func:`describe` and :func:`build` go to JSON and back; the weights are not part of it.

    Examples:
        >>> from torch import nn
        >>> from torchrl_mac.modules import Configurable, build, describe
        >>> class Scale(nn.Module, Configurable):
        ...     def __init__(self, factor):
        ...         super().__init__()
        ...         self.factor = factor
        ...
        ...     def config(self):
        ...         return {"factor": self.factor}
        >>> describe(Scale(3.0))
        {'class': 'Scale', 'factor': 3.0}
        >>> build(describe(Scale(3.0))).factor
        3.0
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            register_config(cls, cls.config, cls.from_config)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it was made with.")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another one from what :meth:`config` returned, its modules built again."""
        return cls(**config)


class _Registry:
    describe: ClassVar[dict[type, Callable[[Any], dict[str, Any]]]] = {}
    build: ClassVar[dict[str, Callable[[dict[str, Any]], Any]]] = {}


def register_config(
    cls: type, describe: Callable[[Any], dict[str, Any]], build: Callable[[dict[str, Any]], Any]
) -> None:
    """Makes a class known to :func:`describe` and :func:`build`; one that is not our own.

    Args:
        cls (type): the class, known by its name.
        describe (callable): returns plain values and modules, by name.
        build (callable): makes an object of these, the modules built again.
    """
    _Registry.describe[cls] = describe
    _Registry.build[cls.__name__] = build


def describe(value: Any) -> Any:
    """A module, or a container of modules and plain values, in JSON-compatible form.

    Raises:
        TypeError: if a part is of a class that is not known.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(part) for part in value]
    if (config := _Registry.describe.get(type(value))) is not None:
        parts = {key: describe(part) for key, part in config(value).items()}
        return {"class": type(value).__name__, **parts}
    raise TypeError(
        f"A {type(value).__name__} cannot be exported: derive it from Configurable, or make it "
        "known with register_config()."
    )


def build(config: Any) -> Any:
    """Makes what :func:`describe` has described.

    Raises:
        ValueError: if it names a class that is not known.
    """
    if isinstance(config, list):
        return [build(part) for part in config]
    if not isinstance(config, dict):
        return config
    parts = {key: build(part) for key, part in config.items() if key != "class"}
    if (make := _Registry.build.get(str(config.get("class")))) is None:
        raise ValueError(
            f"{config.get('class')!r} is not a known class; if it is one of your own, import it."
        )
    return make(parts)


def as_key(key: Any) -> NestedKey:
    """A key that has been through JSON, which has no tuples."""
    return tuple(key) if isinstance(key, list) else key


def as_keys(keys: list[Any]) -> list[NestedKey]:
    """Keys that have been through JSON."""
    return [as_key(key) for key in keys]


def placeholder(shape: list[int]) -> Tensor:
    """A tensor in the place of a buffer that the weights will fill."""
    return torch.zeros(shape)


register_config(
    ValueOperator,
    lambda it: {"module": it.module, "in_keys": it.in_keys, "out_keys": it.out_keys},
    lambda it: ValueOperator(
        it["module"], in_keys=as_keys(it["in_keys"]), out_keys=as_keys(it["out_keys"])
    ),
)
register_config(Compose, lambda it: {"transforms": list(it)}, lambda it: Compose(*it["transforms"]))
register_config(
    ObservationNorm,
    lambda it: {
        "in_keys": it.in_keys,
        "out_keys": it.out_keys,
        "standard_normal": bool(it.standard_normal),
        "shape": list(it.loc.shape),
    },
    lambda it: ObservationNorm(
        placeholder(it["shape"]),
        placeholder(it["shape"]) + 1,
        in_keys=as_keys(it["in_keys"]),
        out_keys=as_keys(it["out_keys"]),
        standard_normal=it["standard_normal"],
    ),
)
