"""The suites: which methods run on which environments, with which settings and seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from reproduction.cell import ROOT, Cell

from torchrl_mac.datasets import OGBenchName

__all__ = ["SUITES", "cells"]

SUITES: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
    OmegaConf.load(Path(__file__).with_name("suites.yaml")), resolve=True
)


def cells(
    suite: str,
    methods: Collection[str] = (),
    environments: Collection[str] = (),
    seeds: Collection[int] = (),
) -> list[Cell]:
    """The cells of a suite, or those of them that are chosen.

    Raises:
        ValueError: if something chosen is not in the suite.
    """
    found = list(_cells(suite))
    for kind, chosen in {"method": methods, "environment": environments, "seed": seeds}.items():
        there = list(dict.fromkeys(getattr(cell, kind) for cell in found))
        if unknown := [one for one in chosen if one not in there]:
            raise ValueError(
                f"--{kind}s {unknown[0]!r}: the suite {suite} has {', '.join(map(str, there))}."
            )
        if chosen:
            found = [cell for cell in found if getattr(cell, kind) in chosen]
    return found


def _cells(suite: str) -> Iterator[Cell]:
    of = SUITES[suite]
    for method, settings in of["methods"].items():
        for environment in settings["environments"]:
            overrides, name = _overrides(of, settings, environment)
            recipe = tuple(sorted(of["data"].get(name.dataset, {}).items()))
            for seed in settings.get("seeds", of["seeds"]):
                parts = (settings["script"], overrides, name.dataset, recipe)
                yield Cell(method, environment, seed, *parts)


def _overrides(
    of: dict[str, Any], settings: dict[str, Any], environment: str
) -> tuple[tuple[str, ...], OGBenchName]:
    """The settings of a script, and the dataset that it reads with them."""
    found = [f"preset={settings['preset']}", f"task={environment}"]
    found += [*of["overrides"], *settings.get("overrides", [])]
    folder = ROOT / "configs" / settings.get("configs", settings["script"])
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = compose(settings["script"], found)
    if updates := of.get("updates"):  # of each phase
        for phases in ("phases", "online.phases")[
            : 2 if cfg.get("online", {}).get("frames") else 1
        ]:
            for k in range(len(OmegaConf.select(cfg, phases))):
                found += [f"++{phases}.{k}.{key}={value}" for key, value in updates.items()]
    return tuple(found), OGBenchName.parse(cfg.dataset)
