"""Every variant of the MAC update on a GPU, checked against each other and timed.

    python benchmarks/gpu.py                       # H100: under 8 minutes
    python benchmarks/gpu.py --device cpu --quick  # the same on a CPU, in small, without capture

Three updates of each variant, with the same noise, must leave the parameters of the eager float32
ones (within the tolerance of their precision). Then all are timed at the sizes of
``benchmarks/update.py``. Writes ``gpu.json`` and ``gpu.md`` into ``--out``. Needs torch, torchrl,
tensordict and numpy; no simulator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path

import bare  # noqa: F401  (before all that it stands in for)
import torch
from assembly import Size, make_batch
from update import SIZES, make_update, measure

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-mixed")
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 5e-2, "bf16-mixed": 5e-2}


def variants(device: torch.device, quick: bool) -> list[dict]:
    """All combinations of the switches that the device has; quick ones generate no code."""
    compiled = {"backend": "eager"} if quick else True
    captured = (False, True) if device.type == "cuda" else (False,)
    precisions = PRECISIONS if device.type == "cuda" else ("fp32",) if quick else ("fp32", "bf16")
    return [
        {"compile": compile, "cudagraphs": cudagraphs, "precision": precision}
        for precision, compile, cudagraphs in itertools.product(
            precisions, (False, compiled), captured
        )
    ]


def parameters_after(size: Size, device: torch.device, **switches) -> torch.Tensor:
    """All parameters after three updates."""
    torch.manual_seed(0)
    update = make_update(size, device, **switches)
    for seed in range(3):
        update(make_batch(size, seed=seed).to(device))
    parameters = [
        p.detach().flatten() for loss in update.losses.values() for p in loss.parameters()
    ]
    return torch.cat(parameters).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small size alone, few repetitions")
    parser.add_argument("--minutes", type=float, default=7.5, help="no variant is begun after that")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    presets = ["least"] if args.quick else ["paper", "small"]
    check = SIZES["least"] if args.quick else Size()
    reference = parameters_after(check, args.device)
    rows, skipped = [], []
    for preset, switches in itertools.product(presets, variants(args.device, args.quick)):
        if time.monotonic() > end:
            skipped.append({"preset": preset, **switches})
            continue
        row = measure(preset, args.device, repeats=3 if args.quick else 20, parts=False, **switches)
        if preset == presets[0]:
            parameters = parameters_after(check, args.device, **switches)
            error = (parameters - reference).abs().max().item()
            row |= {"error": error, "agrees": error <= TOLERANCE[switches["precision"]]}
        rows.append(row)
        torch._dynamo.reset()
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor()
    report = {"device": name, "torch": torch.__version__, "variants": rows, "skipped": skipped}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (args.out / "gpu.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    if not all(row.get("agrees", True) for row in rows):
        raise SystemExit("A variant computes something else: see 'agrees' in gpu.json.")


def table(report: dict) -> str:
    """The report in Markdown."""
    lines = [
        f"{report['device']}, torch {report['torch']}",
        "",
        "| size | precision | compiled | captured | ms | speed-up | TFLOP/s | of peak | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    eager = {
        row["preset"]: row["ms"]
        for row in report["variants"]
        if (row["precision"], row["compile"], row["cudagraphs"]) == ("fp32", False, False)
    }
    for row in report["variants"]:
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(
            f"| {row['preset']} | {row['precision']} | {'yes' if row['compiled'] else 'no'} "
            f"| {'yes' if row['cudagraphs'] else 'no'} | {row['ms']:.2f} "
            f"| {eager[row['preset']] / row['ms']:.2f} | {row['tflop_per_second']:.2f} "
            f"| {row['share_of_peak']:.0%} | {error} |"
        )
    lines += [f"Not begun: {skipped}" for skipped in report["skipped"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
