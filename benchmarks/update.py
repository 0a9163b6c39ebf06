"""What one MAC update costs, and where its time goes.

    python benchmarks/update.py --preset small --json
    python benchmarks/update.py --preset paper --precision bf16 --compile --repeats 5
    python benchmarks/update.py --method qc --preset cpu --settings task=cube-single

All seven losses, backward, Adam and the target network, on random data of cube-single's widths
(observation 28, chunks of 10 x 5). ``small``: networks of 4 x 256, batch 256, 4 candidates;
``paper``: 4 x 1024, 1024, 8. Reported are the median time of an update, its floating-point
operations (matrix products, forward and backward), the share this is of the peak that a plain
matrix product reaches in the same process and precision, and what its parts take: drawing the
batch, imagination, losses (without it), backward, optimizer and target.

With ``--method`` it is the updates of a script's own phases, on a dataset in ``--data-dir``: some
hundreds of each, made by the script, and what the whole phase would take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import bare  # noqa: F401  (before all that it stands in for)
import torch
from assembly import Size, make_mac
from tensordict import TensorDict
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
from torchrl_mac.trainers import LossUpdate, make_adam

SIZES = {
    "small": Size((256,) * 4, 256, 4),
    "paper": Size((1024,) * 4, 1024, 8),
    "tiny": Size((32,) * 2, 16, 2, horizon=2, flow_steps=1),
    "least": Size((32,), 16, 2, horizon=2, flow_steps=1),
}


def make_update(size: Size, device: torch.device, **switches) -> LossUpdate:
    """An update with Adam and a target network."""
    losses = make_mac(size, device)
    optimizer = make_adam(losses, 3e-4, capturable=bool(switches.get("cudagraphs")))
    return LossUpdate(losses, optimizer, SoftUpdate(losses["values"], tau=0.005), **switches)


def make_buffer(size: Size, device: torch.device, rows: int = 20_000) -> TensorDictReplayBuffer:
    """Random episodes of 100 rows, held on the device."""
    flag = torch.zeros(rows, 1, dtype=torch.bool)
    columns = TensorDict(
        observation=torch.randn(rows, size.observation),
        action=torch.rand(rows, size.action) * 2 - 1,
        episode=torch.arange(rows) // 100,
        next=TensorDict(reward=torch.randn(rows, 1), terminated=flag),
    )
    columns.auto_batch_size_(1)
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(columns, gamma=0.999, device=device),
        sampler=ActionChunkSampler(size.chunk),
        batch_size=size.batch,
    )


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products.

    PyTorch's ``FlopCounterMode`` also follows modules, and stumbles over ``TensorDictParams``.
    """

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "_linear_pointwise" in str(func):  # a product and its activation
            self.flop += 2 * args[0].shape[-1] * out.numel()
        elif func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def median_ms(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call, in milliseconds."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP per second of a large matrix product in the precision that imagination has."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind()
    F.linear(a, b)
    return 2 * n**3 / median_ms(lambda: F.linear(a, b), 9, device) * 1e3


def breakdown(update: LossUpdate, buffer, repeats: int, device: torch.device) -> dict[str, float]:
    """Medians of an update's parts, each timed alone."""
    batch, values = buffer.sample(), update.losses["values"]
    imagine = torch.compile(values.imagine) if update.is_compiled else values.imagine
    graph: list[torch.Tensor] = []

    def backward() -> None:
        update.optimizer.zero_grad(set_to_none=True)
        graph.pop().backward()

    def step() -> None:
        for updater in update.target_updaters:
            updater.step()
        update.optimizer.step()

    parts = {
        "sample": buffer.sample,
        "imagine": lambda: imagine(batch),
        "losses": lambda: graph.append(update.total(batch)[0]),
        "backward": backward,
        "optimizer": step,
    }
    for call in parts.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, call in parts.items():
            times[name].append(median_ms(call, 1, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["losses"] -= medians["imagine"]
    return medians


def measure(
    preset: str, device: torch.device, *, repeats: int, parts: bool = True, **switches
) -> dict:
    """All figures of one variant."""
    torch.manual_seed(0)
    size = SIZES[preset]
    buffer = make_buffer(size, device)
    with FlopCounter() as counter:
        make_update(size, device)(buffer.sample())
    flop = counter.flop
    update = make_update(size, device, **switches)
    start = time.perf_counter()
    for _ in range(4 if switches.get("cudagraphs") else 2):
        update(buffer.sample())
    warmup = time.perf_counter() - start
    ms = median_ms(lambda: update(buffer.sample()), repeats, device)
    peak = matmul_peak(device, switches.get("precision", "fp32"))
    figures = {
        "preset": preset,
        "device": device.type,
        **switches,
        "compiled": update.is_compiled,
        "threads": torch.get_num_threads(),
        "ms": ms,
        "warmup_seconds": warmup,
        "tflop": flop / 1e12,
        "tflop_per_second": flop / ms / 1e9,
        "matmul_peak_tflop_per_second": peak / 1e12,
        "share_of_peak": flop / ms * 1e3 / peak,
    }
    if parts:
        switches.pop("cudagraphs", None)
        update = make_update(size, device, **switches)
        figures["parts_ms"] = breakdown(update, buffer, repeats, device)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help=f"{[*SIZES]}, or one of --method's")
    parser.add_argument("--method", help="a script of examples/, such as qc")
    parser.add_argument("--data-dir", default="data", help="of --method: holds its dataset")
    parser.add_argument("--settings", nargs="*", default=[], help="of --method: task=cube-single")
    parser.add_argument("--updates", type=int, default=300, help="of --method: in each phase")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "tf32", "bf16", "bf16-mixed"]
    )
    parser.add_argument("--compile", nargs="?", const=True, default=False, help="or: networks")
    parser.add_argument("--cudagraphs", action="store_true")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.method:
        from phases import phase_times

        switches = [f"precision={args.precision}", f"compile={args.compile}"]
        settings = [f"preset={args.preset}", f"num_threads={torch.get_num_threads()}", *switches]
        settings += args.settings
        report(phase_times(args.method, args.data_dir, args.updates, settings), args.json)
        return
    if args.preset not in SIZES:
        parser.error(f"--preset must be one of {[*SIZES]}.")
    figures = measure(
        args.preset,
        args.device,
        repeats=args.repeats,
        compile=args.compile,
        cudagraphs=args.cudagraphs,
        precision=args.precision,
    )
    report(figures, args.json)


def report(figures: dict, as_json: bool) -> None:
    """Prints figures, and what made them."""
    figures |= {"torch": torch.__version__, "machine": platform.machine()}
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
