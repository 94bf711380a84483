"""Builds the CUDA kernels in csrc/ on first use: the only file that knows nvcc and ninja."""

import contextlib
import functools
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path

import torch

OLDEST_CAPABILITY = (8, 0)


@functools.cache
def load():
    """Build the kernels for this machine's GPUs, or find them built, and load them into `torch.ops.hf_quest`.

    Returns whether the kernels are there. If not, the reason and the way out were said in one warning.
    """
    try:
        _load()
    except Exception as error:  # whatever a compiler, a linker or a file system comes up with
        reason = str(error).strip()[-1500:]
        warnings.warn(
            f"hf_quest could not build its CUDA kernels and runs its slower PyTorch path. The reason: {reason}\n"
            f"What helps: a CUDA {torch.version.cuda} toolkit with CUDA_HOME set to it (or `pip install "
            '"hf-quest[cuda]"`), a C++ compiler and ninja; then start Python again.',
            stacklevel=3,
        )
        return False
    return True


def _load():
    found = sorted({torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())})
    capabilities = [capability for capability in found if capability >= OLDEST_CAPABILITY]
    if not capabilities:
        raise RuntimeError(f"the kernels need compute capability 8.0 (Ampere) or later, and the GPUs have {found}")
    # Hopper's own instructions are in the architecture with an "a" alone.
    architectures = [f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in capabilities]

    from torch.utils import cpp_extension  # slow to import, and its import looks for a compiler

    toolkit = cpp_extension.CUDA_HOME
    if toolkit is None:
        toolkit = find_pip_toolkit()
        if toolkit is None:
            raise RuntimeError("there is no nvcc: none on the PATH, no CUDA_HOME, and none installed with pip")
        cpp_extension.CUDA_HOME = str(toolkit)

    version = torch.__version__.replace(".", "_").replace("+", "_")
    name = f"hf_quest_sm{'_'.join(architectures)}_torch_{version}"
    build_directory = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    build_directory.mkdir(parents=True, exist_ok=True)
    link_runtime(Path(toolkit), build_directory)
    is_new = not (build_directory / f"{name}.so").exists()
    source_directory = find_sources()
    if is_new:
        architecture_names = ", ".join(f"sm_{architecture}" for architecture in architectures)
        print(
            f"hf_quest builds its CUDA kernels for {architecture_names} in {build_directory}, once ...",
            end=" ",
            file=sys.stderr,
            flush=True,
        )
    start = time.perf_counter()
    cpp_extension.load(
        name,
        sources=[str(path) for path in sorted(source_directory.glob("*.c*")) if path.suffix in (".cu", ".cpp")],
        extra_cflags=["-O3", "-std=c++20"],
        extra_cuda_cflags=["-O3", "-std=c++20", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)],
        extra_ldflags=[f"-L{build_directory}"],
        build_directory=str(build_directory),
        is_python_module=False,
    )
    if is_new:
        print(f"done in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def find_sources():
    """The folder csrc: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(path for path in (package / "csrc", package.parent / "csrc") if path.is_dir())


def find_pip_toolkit():
    """The CUDA toolkit of torch's CUDA version that `pip install nvidia-cuda-nvcc` lays out, or None."""
    package = importlib.util.find_spec("nvidia")
    major = (torch.version.cuda or "").partition(".")[0]
    for folder in package.submodule_search_locations if package is not None else ():
        home = Path(folder) / f"cu{major}"
        if (home / "bin" / "nvcc").exists():
            return home
    return None


def link_runtime(toolkit, folder):
    """Give the CUDA runtime in a toolkit from pip the name that linkers look for, in `folder`."""
    link = folder / "libcudart.so"
    for runtime in (toolkit / "lib").glob("libcudart.so.*"):
        if not link.exists():
            link.unlink(missing_ok=True)  # of a toolkit that is gone
            with contextlib.suppress(FileExistsError):  # another process was first
                link.symlink_to(runtime)
