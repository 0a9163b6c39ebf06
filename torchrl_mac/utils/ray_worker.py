"""An actor of a Ray cluster that runs tasks."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from torchrl_mac.utils.process_worker import WorkerError

__all__ = ["RayWorker"]


class RayWorker:
    """An actor with one core that runs tasks one after the other.

    Args:
        make_task (callable): called there once, returns what runs a task. Pickled.
    """

    def __init__(self, make_task: Callable[[], Callable[..., Any]]) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=1)(_Task).remote(sys.path, pickle.dumps(make_task))

    @staticmethod
    def connect(num_workers: int) -> None:
        """Connects this process to its cluster, if it is not yet.

        Args:
            num_workers (int): cores of a cluster that is started here, as none is running.

        Raises:
            ImportError: if Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:
            raise ImportError("engine='ray' needs Ray: pip install 'torchrl_mac[ray]'.")
        import ray

        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS", "local")
        of_own: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False}
        ray.init(address, log_to_driver=False, **(of_own if address == "local" else {}))

    def ask(self, args: tuple[Any, ...], timeout: float | None) -> Any:
        """Runs a task.

        Raises:
            WorkerError: if it fails, takes longer than ``timeout`` seconds, or the actor is gone.
        """
        import ray

        try:
            return ray.get(self._actor.run.remote(pickle.dumps(args)), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise WorkerError(
                f"A worker process has not answered for {timeout:g} s and was ended."
            ) from error
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"A worker process has died: {error}") from error
        except ray.exceptions.RayTaskError as error:
            raise WorkerError(f"A worker process has failed: {error}") from error

    def kill(self) -> None:
        """Ends the actor, whatever it does."""
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)


class _Task:
    """What the actor is."""

    def __init__(self, path: list[str], make_task: bytes) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self.task = pickle.loads(make_task)()
        if "torch" in sys.modules:  # it came with the task; it is not imported for this
            sys.modules["torch"].set_num_threads(1)

    def run(self, args: bytes) -> Any:
        return self.task(*pickle.loads(args))
