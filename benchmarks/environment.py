"""The conditions of a measurement, to be kept beside it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import hf_quest
from hf_quest.evaluation.report import processor


def describe(device):
    """A dict of the processor, the versions, the commit and the command of this run."""
    return {
        "processor": processor(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_quest": hf_quest.__version__,
        "commit": commit(),
        "command": command(),
    }


def commit():
    """The commit of this checkout, with `-dirty` where its code differs from it, or None outside of git.

    HF_QUEST_COMMIT tells it where the files are without their repository.
    """
    if "HF_QUEST_COMMIT" in os.environ:
        return os.environ["HF_QUEST_COMMIT"]
    root = Path(__file__).parent.parent
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None


def command():
    """This run as it was typed, the setting for its threads included."""
    threads = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    return " ".join([*threads, "python", *sys.argv])
