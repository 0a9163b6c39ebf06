"""One gradient update over any number of losses."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_mac.trainers.compilation import compiled
from torchrl_mac.trainers.guard import FiniteGuard, undone_where

__all__ = ["LossUpdate", "Precision", "TargetOrder"]

Precision = Literal["fp32", "tf32", "bf16", "bf16-mixed"]
TargetOrder = Literal["before", "after"]


class LossUpdate:
    """Turns a batch into one optimizer step on the sum of several losses.

    All losses are computed with the same parameters. Then the target networks move and the
    optimizer steps, in the order of ``target_order``.

    An update whose loss or gradient is not finite changes nothing: no parameter, no target, no
    state of the optimizer. :attr:`guard` counts those, without a word to the host.

    Args:
        losses (dict or sequence of LossModule): every output whose name starts with ``"loss_"`` is
            added; all others are metrics. Where two losses have an output of the same name, it is
            returned as ``"{loss}/{output}"``, by the loss's name in the dict.
        optimizer (torch.optim.Optimizer): holds the parameters to train. Groups of parameters have
            learning rates and settings of their own, see :func:`parameter_groups`.
        target_updaters (TargetNetUpdater or sequence of them, optional): such as
            :class:`~torchrl.objectives.SoftUpdate`, one for each loss with target networks.

    Keyword Args:
        target_order (str, optional): ``"before"`` (default): targets move towards the parameters
            *as they were in the losses*, then the optimizer steps; they lag one step behind, as in
            the reference implementation of MAC (https://arxiv.org/abs/2512.08108) and its
            relatives. ``"after"``: towards those that the optimizer has made, the usual order.
        compile (bool, str or dict, optional): whether the losses and their gradients are compiled,
            as one graph each (``True``, or ``"losses"``), or only their networks, one by one
            (``"networks"``), in a fraction of the time. A dict has keyword arguments of
            :func:`torch.compile`, and which of the two it is as ``"scope"``. Where that fails, a
            warning says why and the update goes on without. Defaults to ``False``.
        cudagraphs (bool, optional): whether the whole update is captured in a CUDA graph at its
            second call. The optimizer must be ``capturable`` and batches must keep their shapes.
            Defaults to ``False``.
        precision (str, optional): ``"fp32"``; ``"tf32"``, where matrix products are; ``"bf16"``,
            for what no gradient goes through (imagination and the samples of a teacher; losses
            with a ``sampling_dtype``); or ``"bf16-mixed"``, for all but the networks' last layers
            and the losses. Parameters, gradients and the optimizer's state are always float32.
            Defaults to ``"fp32"``.
        max_grad_norm (float, optional): gradients of a larger norm are scaled down to it. Defaults
            to ``None``, as they are.
        distributed (bool, optional): whether gradients are averaged over the processes of
            :mod:`torch.distributed`'s default group, each with a batch of its own
            (:class:`~torch.nn.parallel.DistributedDataParallel`, which also makes all processes
            begin with the first one's parameters). Defaults to ``False``.

    Raises:
        ValueError: if ``precision`` or ``target_order`` is unknown, ``max_grad_norm`` is not
            positive, or ``cudagraphs`` comes with ``distributed`` or with an optimizer that is not
            ``capturable`` and ``fused``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> from torchrl_mac.objectives import ChunkedWorldModelLoss
        >>> from torchrl_mac.trainers import LossUpdate
        >>> networks = (NormedMLP(4 + 20, size, num_cells=(32,)) for size in (4, 1, 1))
        >>> loss = ChunkedWorldModelLoss(ChunkedWorldModel(*networks))
        >>> update = LossUpdate([loss], torch.optim.Adam(loss.parameters(), lr=3e-4))
        >>> batch = TensorDict(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 10, 2),
        ...     next=TensorDict(
        ...         observation=torch.randn(8, 4),
        ...         reward=torch.randn(8, 1),
        ...         terminated=torch.zeros(8, 1, dtype=torch.bool),
        ...     ),
        ... )
        >>> sorted(update(batch).keys())
        ['grad_norm', 'loss_dynamics', 'loss_reward', 'loss_termination']
    """

    def __init__(
        self,
        losses: Mapping[str, LossModule] | Sequence[LossModule],
        optimizer: torch.optim.Optimizer,
        target_updaters: TargetNetUpdater | Sequence[TargetNetUpdater] = (),
        *,
        target_order: TargetOrder = "before",
        compile: bool | str | Mapping[str, Any] = False,
        cudagraphs: bool = False,
        precision: Precision = "fp32",
        max_grad_norm: float | None = None,
        distributed: bool = False,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}.")
        if target_order not in get_args(TargetOrder):
            raise ValueError(
                f"target_order must be one of {get_args(TargetOrder)}, got {target_order!r}."
            )
        if cudagraphs and distributed:
            raise ValueError("cudagraphs=True and distributed=True do not go together.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}.")
        # The protocol of torch.amp: an optimizer that leaves a step out when a tensor says so.
        self._masks = getattr(optimizer, "_step_supports_amp_scaling", False)
        if cudagraphs and not (optimizer.defaults.get("capturable") and self._masks):
            raise ValueError(
                "cudagraphs=True needs an optimizer that can be captured, such as "
                "torch.optim.Adam(..., lr=torch.tensor(3e-4), fused=True, capturable=True)."
            )
        self.losses = named(losses)
        self.optimizer = optimizer
        self.target_updaters = listed(target_updaters)
        self.target_order = target_order
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        device = optimizer.param_groups[0]["params"][0].device
        self.guard = FiniteGuard(device, distributed=distributed)
        self._targets = [
            target
            for updater in self.target_updaters
            for target in target_parameters(updater.loss_module)
        ]
        self._target_steps = [target_step(updater) for updater in self.target_updaters]
        outputs = Counter(key for loss in self.losses.values() for key in loss.out_keys)
        self._shared_names = {key for key, count in outputs.items() if count > 1}
        if precision.startswith("bf16"):
            for loss in self.losses.values():
                if hasattr(loss, "sampling_dtype"):
                    loss.sampling_dtype = torch.bfloat16
        self._compiled = compiled(self._total, self.losses.values(), compile)
        self._forward: Callable = self._compiled or self._total
        if distributed:
            self._forward = DistributedDataParallel(
                _Module(list(self.losses.values()), self._forward),
                broadcast_buffers=False,
                find_unused_parameters=True,  # those of terms that are not selected
            )
        self._update: Callable = self._step
        if cudagraphs:
            self._update = CudaGraphModule(self._step, in_keys=[], out_keys=[])

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Makes one update and returns the losses, detached."""
        with _matmul_precision("high" if self.precision == "tf32" else "highest"):
            return self._update(tensordict)

    @property
    def is_compiled(self) -> bool:
        """Whether the losses are compiled: asked for, and not failed."""
        return self._compiled is not None and self._compiled.is_active

    def total(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, TensorDictBase]:
        """The sum that an update minimises, with its graph, and the losses, detached."""
        return self._forward(tensordict)

    def compute(self, tensordict: TensorDictBase) -> tuple[list[torch.Tensor], TensorDictBase]:
        """The terms to add up, and all losses and metrics by name, without an update."""
        terms: list[torch.Tensor] = []
        metrics = TensorDict()
        mixed = self.precision == "bf16-mixed"
        for name, loss in self.losses.items():
            device = next(loss.parameters()).device.type
            with torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext():
                out = loss(tensordict)
            for key, value in out.items():
                if key.startswith("loss_"):
                    terms.append(value)
                is_shared = key in self._shared_names or key in metrics
                metrics.set(f"{name}/{key}" if is_shared else key, value)
        return terms, metrics

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer and of :attr:`guard`; losses have their own."""
        return {"optimizer": self.optimizer.state_dict(), "guard": self.guard.counts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, in place."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for rate, group in zip(rates, self.optimizer.param_groups, strict=True):
            if isinstance(rate, torch.Tensor):  # as a captured update knows it
                group["lr"] = rate.copy_(group["lr"])
        self.guard.counts.copy_(state_dict["guard"])

    def _total(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, TensorDictBase]:
        terms, metrics = self.compute(tensordict)
        return torch.stack(terms).sum(), metrics.detach()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        total, metrics = self._forward(tensordict)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = self.guard.check(total, norm)
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        if self.target_order == "before":
            self._step_targets(bad)
        if self._masks:
            vars(self.optimizer).update(grad_scale=None, found_inf=bad)
            self.optimizer.step()
        elif not bad:  # read on the host
            self.optimizer.step()
        if self.target_order == "after":
            self._step_targets(bad)
        return metrics.set("grad_norm", norm)

    def _step_targets(self, bad: torch.Tensor) -> None:
        with undone_where(bad, self._targets):
            for step in self._target_steps:
                step()


def listed(updaters: Any) -> list[TargetNetUpdater]:
    """One target updater, or several, as a list."""
    return [updaters] if isinstance(updaters, TargetNetUpdater) else list(updaters)


def named(losses: Mapping[str, LossModule] | Sequence[LossModule]) -> dict[str, LossModule]:
    """Losses by name; those without one have that of their class, numbered where it is shared."""
    if isinstance(losses, Mapping):
        return dict(losses)
    found: dict[str, LossModule] = {}
    for loss in losses:
        name = type(loss).__name__
        found[name if name not in found else f"{name}{len(found)}"] = loss
    return found


def target_parameters(loss: LossModule) -> list[torch.Tensor]:
    """The parameters of the target networks."""
    return [
        value
        for name, parameters in loss.named_children()
        if name.startswith("target_") and name.endswith("_params")
        for value in parameters.values(True, True)
    ]


def online_parameters(loss: LossModule) -> list[torch.Tensor]:
    """The parameters that those of the target networks follow, in the same order."""
    return [
        getattr(loss, name.removeprefix("target_")).get(key)
        for name, parameters in loss.named_children()
        if name.startswith("target_") and name.endswith("_params")
        for key in parameters.keys(True, True)
    ]


def target_step(updater: TargetNetUpdater) -> Callable[[], None]:
    """What does the same as ``updater.step``, without looking up parameters each time."""
    if type(updater) is not SoftUpdate:
        return updater.step
    loss = updater.loss_module
    pairs = [
        (target.data, source.data)
        for target, source in zip(target_parameters(loss), online_parameters(loss), strict=True)
        if target.data_ptr() != source.data_ptr()  # a network that has no target of its own
    ]
    targets, sources = map(list, zip(*pairs, strict=True))
    return lambda: torch._foreach_lerp_(targets, sources, 1 - updater.eps)


class _Module(nn.Module):
    """The losses as the one module that DistributedDataParallel wants."""

    def __init__(self, losses: Sequence[LossModule], function: Callable) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.function = function

    def forward(self, tensordict: TensorDictBase) -> tuple[torch.Tensor, TensorDictBase]:
        return self.function(tensordict)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
