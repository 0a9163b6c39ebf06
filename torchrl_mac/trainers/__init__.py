"""Training loops: updates, phases, evaluation and what a run leaves behind."""

from torchrl_mac.trainers.checkpoint import SealedCheckpoint
from torchrl_mac.trainers.distributed import join_group
from torchrl_mac.trainers.evaluation import Evaluation, Evaluator
from torchrl_mac.trainers.guard import NonFiniteError
from torchrl_mac.trainers.logs import JSONLinesLogger, rewind
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.report import plot_curves, versions, write_summary, write_video
from torchrl_mac.trainers.rotation import RunCheckpoints
from torchrl_mac.trainers.run import RunFolder
from torchrl_mac.trainers.trainer import OfflineTrainer
from torchrl_mac.trainers.update import LossUpdate, Precision

__all__ = [
    "Evaluation",
    "Evaluator",
    "JSONLinesLogger",
    "LossUpdate",
    "NonFiniteError",
    "OfflineTrainer",
    "Phase",
    "Precision",
    "RunCheckpoints",
    "RunFolder",
    "SealedCheckpoint",
    "join_group",
    "plot_curves",
    "rewind",
    "versions",
    "write_summary",
    "write_video",
]
