"""Training loops: updates, phases, evaluation and what a run leaves behind."""

from torchrl_mac.trainers.update import LossUpdate

__all__ = ["LossUpdate"]
