"""Offline datasets: OGBench files as memory-mapped TorchRL replay buffers."""

from torchrl_mac.data.names import OGBenchName

__all__ = ["OGBenchName"]
