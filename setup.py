"""Packaging of torchrl_mac."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "hdf5": ["h5py>=3.8"],
    "train": ["hydra-core>=1.3,<1.4", "matplotlib>=3.8", "wandb>=0.18"],
    "ray": ["ray>=2.10"],
    "video": ["av>=12"],
    "sweep": ["hydra-joblib-launcher>=1.2", "hydra-submitit-launcher>=1.2"],
    "test": ["hypothesis>=6.100", "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5"],
    "lint": ["codespell>=2.3", "mypy>=1.11", "ruff>=0.6"],
}
extras["dev"] = sorted({dep for group in extras.values() for dep in group})

setup(
    name="torchrl_mac",
    version="0.1.0",
    description="Model-based RL with action chunks (MAC) as native TorchRL parts.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["torchrl_mac", "torchrl_mac.*"]),
    package_data={"torchrl_mac": ["py.typed"]},
    install_requires=[
        "filelock>=3.12",
        "gymnasium>=1.0",
        "mujoco>=3.1.6",
        "numpy>=1.26",
        "ogbench>=1.2,<1.3",
        "safetensors>=0.4.5",
        "tensordict>=0.14.3,<0.15",
        "torch>=2.8",
        "torchrl>=0.14.1,<0.15",
        "tqdm>=4.60",
    ],
    extras_require=extras,
    entry_points={
        "console_scripts": [
            "torchrl-mac-data=torchrl_mac.datasets.cli:main",
            "torchrl-mac-eval=torchrl_mac.evaluate:main",
        ]
    },
)
