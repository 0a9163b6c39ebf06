"""Training loops: updates, phases, hooks, evaluation and what a run leaves behind."""

from torchrl_mac.trainers.checkpoint import SealedCheckpoint
from torchrl_mac.trainers.collection import CollectionHook
from torchrl_mac.trainers.distributed import join_group
from torchrl_mac.trainers.early_stopping import EarlyStopping
from torchrl_mac.trainers.elites import EliteHook
from torchrl_mac.trainers.evaluation import EpisodeEvaluator, Evaluation
from torchrl_mac.trainers.hooks import ModelRolloutHook, TrainerHook
from torchrl_mac.trainers.logs import JSONLinesLogger, rewind
from torchrl_mac.trainers.optimizer import make_adam, parameter_groups
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.policies import load_policy, load_policy_and_metadata
from torchrl_mac.trainers.postmortem import NonFiniteError
from torchrl_mac.trainers.report import plot_curves, versions, write_summary, write_video
from torchrl_mac.trainers.run import RunFolder
from torchrl_mac.trainers.run_checkpoints import RunCheckpoints
from torchrl_mac.trainers.trainer import PhaseTrainer
from torchrl_mac.trainers.update import LossUpdate, Precision, TargetOrder

__all__ = [
    "CollectionHook",
    "EarlyStopping",
    "EliteHook",
    "EpisodeEvaluator",
    "Evaluation",
    "JSONLinesLogger",
    "LossUpdate",
    "ModelRolloutHook",
    "NonFiniteError",
    "Phase",
    "PhaseTrainer",
    "Precision",
    "RunCheckpoints",
    "RunFolder",
    "SealedCheckpoint",
    "TargetOrder",
    "TrainerHook",
    "join_group",
    "load_policy",
    "load_policy_and_metadata",
    "make_adam",
    "parameter_groups",
    "plot_curves",
    "rewind",
    "versions",
    "write_summary",
    "write_video",
]
