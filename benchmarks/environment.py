"""The conditions of a measurement, to be kept beside it."""

import os
import platform
import sys

import torch
import transformers

import hf_quest
from hf_quest.evaluation.report import commit, processor


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


def command():
    """This run as it was typed, the setting for its threads included."""
    threads = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    return " ".join([*threads, "python", *sys.argv])
