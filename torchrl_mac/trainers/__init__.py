"""Training loops: updates, phases, evaluation and what a run leaves behind."""

from torchrl_mac.trainers.distributed import join_group
from torchrl_mac.trainers.evaluation import Evaluation, Evaluator
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.report import plot_curves, versions, write_summary, write_video
from torchrl_mac.trainers.trainer import OfflineTrainer
from torchrl_mac.trainers.update import LossUpdate, Precision

__all__ = [
    "Evaluation",
    "Evaluator",
    "LossUpdate",
    "OfflineTrainer",
    "Phase",
    "Precision",
    "join_group",
    "plot_curves",
    "versions",
    "write_summary",
    "write_video",
]
