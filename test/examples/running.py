"""Starting the examples on real environments, with a little dataset."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_mac.datasets import generate_dataset

ROOT = Path(__file__).parents[2]
TERMS = [f"loss_{term}" for term in ("flow", "distillation", "dynamics", "reward")]
TERMS += [f"loss_{term}" for term in ("termination", "value", "qvalue")]
MODEL = ("dynamics_cells=[16,16]", "head_cells=[16]")
OF_SCRIPT = dict.fromkeys(("mopo", "mobile"), MODEL)
OF_SCRIPT |= dict.fromkeys(
    ("mac", "mac_multitask", "mac_gaussian", "mac_fql", "dreamer"), ("chunk_size=10", *MODEL)
)
ONE_EPISODE = ["eval_episodes=1", "eval_num_envs=1"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate_dataset(
        "cube-single-play-v0",
        folder,
        episodes=3,
        val_episodes=1,
        steps=81,
        workers=1,
        progress=False,
    )
    return folder


def run(data, output, *overrides, **kwargs):
    with start(data, output, *overrides, **kwargs) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(data, output, *overrides, example="mac", launcher=(), flags=()):
    command = [sys.executable, *launcher, *arguments(data, output, overrides, example, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, **pipes, env=env, cwd=data)


def arguments(data, output, overrides, example="mac", flags=()):
    parts = [
        *(ROOT / f"examples/{example}.py", *flags),
        *("preset=cpu", f"data_dir={data}"),
        *(f"hydra.run.dir={output}", "num_threads=1", "log_interval=5"),
        *("policy_cells=[16,16]", "value_cells=[16]"),
        *OF_SCRIPT.get(example, ("task=cube-single",)),
        *("eval_episodes=2", "eval_num_envs=2", "eval_interim_episodes=1", "video_episodes=0"),
        *overrides,
    ]
    return [str(part) for part in parts]


@pytest.fixture
def fork(processes, data, tmp_path):
    """Starts an example like ``start``, in a process that has its libraries already."""

    def fork(output, *overrides, example="mac", **env):
        command, said = arguments(data, output, overrides, example), tmp_path / "said"
        process = processes.Process(target=_main, args=(command, data, said, env))
        process.start()
        return process

    def wait(*args, **kwargs):
        """The exit code, and what was written to stdout and stderr."""
        process = fork(*args, **kwargs)
        process.join()
        return process.exitcode, (tmp_path / "said").read_text()

    fork.wait = wait
    return fork


def _main(command, folder, said, env):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env, WANDB_SILENT="true")
    os.chdir(folder)
    said = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def newest(folder, of=""):
    return max(folder.glob(f"checkpoints/{of}checkpoint-*"), default=None)
