"""Kernels built for the CPU: tests/NAME.cpp, with tests/cuda_on_cpu.h for what CUDA has built in."""

import shutil
import subprocess
from pathlib import Path

import pytest

from hf_quest.kernels import build

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which knows where CUDA's headers are")


def build_program(name, tmp_path_factory, kernels=()):
    """Its path. It ends at a race, and at an index that is too large. `kernels` are files of csrc that it calls."""
    program, tests, csrc = tmp_path_factory.mktemp(name) / name, Path(__file__).parent, build.find_sources()
    flags = ["-x", "c++", "-std=c++20", "-O1", f"-I{csrc}", "-include", tests / "cuda_on_cpu.h", "-Xcompiler"]
    flags += ["-fsanitize=thread", "-Xcompiler", "-fsanitize=bounds", "-Xcompiler", "-fno-sanitize-recover=all"]
    sources = [tests / f"{name}.cpp", *(csrc / kernel for kernel in kernels)]
    subprocess.run(["nvcc", *flags, "-o", program, *sources], check=True)
    return program
