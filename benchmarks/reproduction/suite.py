"""The suites: which methods run on which environments, with which settings and seeds."""

from __future__ import annotations

from collections.abc import Collection
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
    of = SUITES[suite]
    found = [
        (method, environment, seed)
        for method, settings in of["methods"].items()
        for environment in settings["environments"]
        for seed in settings.get("seeds", of["seeds"])
    ]
    chosen = {"methods": methods, "environments": environments, "seeds": seeds}
    for k, (kind, wanted) in enumerate(chosen.items()):
        there = dict.fromkeys(names[k] for names in found)
        if unknown := [one for one in wanted if one not in there]:
            raise ValueError(
                f"--{kind} {unknown[0]!r}: the suite {suite} has {', '.join(map(str, there))}."
            )
        found = [names for names in found if not wanted or names[k] in wanted]
    return [_cell(suite, *names) for names in found]


def _cell(suite: str, method: str, environment: str, seed: int) -> Cell:
    of = SUITES[suite]
    settings = of["methods"][method]
    overrides = [f"preset={settings['preset']}", f"task={environment}"]
    overrides += [*of["overrides"], *settings.get("overrides", [])]
    folder = ROOT / "configs" / settings.get("configs", settings["script"])
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = compose(settings["script"], overrides)
    if updates := of.get("updates"):  # of each phase
        online = OmegaConf.select(cfg, "online.frames")
        for phases in ("phases", "online.phases") if online else ("phases",):
            for k in range(len(OmegaConf.select(cfg, phases))):
                overrides += [f"++{phases}.{k}.{key}={value}" for key, value in updates.items()]
    dataset = OGBenchName.parse(cfg.dataset).dataset
    recipe = tuple(sorted(of["data"].get(dataset, {}).items()))
    return Cell(method, environment, seed, settings["script"], tuple(overrides), dataset, recipe)
