"""MAC, model-based RL with action chunks (https://arxiv.org/abs/2512.08108), for TorchRL."""
