"""Builds the kernels in csrc/ on first use, for GPUs and for this CPU: the only file that knows compilers."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from filelock import FileLock

OLDEST_CAPABILITY = (8, 0)
FOR_CPU = "cpu_step.cpp"
SWITCH = "HF_QUEST_CPU_KERNELS"  # 0 in the environment: none of these


@functools.cache
def load():
    """Build the kernels for this machine's GPUs, or find them built, and load them into `torch.ops.hf_quest`.

    Returns whether the kernels are there. If not, the reason and the way out were said in one warning.
    """
    try:
        _load()
    except Exception as error:  # whatever a compiler, a linker or a file system comes up with
        reason = complaints_of(str(error))
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
    sources = [path for path in sorted(find_sources().iterdir()) if path.name != FOR_CPU]
    version = torch.__version__.replace(".", "_").replace("+", "_")
    # What other versions of this package have built stays beside it, and is not built over.
    key = key_of(*(part for path in sources for part in (path.name, path.read_text("utf-8"))))
    name = f"hf_quest_sm{'_'.join(architectures)}_torch_{version}_{key}"
    library = build_root() / name / f"{name}.so"
    if not is_whole(library):
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / "hf_quest.lock"):  # which ends with the process that holds it
            if not is_whole(library):
                build_for_gpus(library, sources, architectures)
                seal(library)
    torch.ops.load_library(library)


def build_for_gpus(library, sources, architectures):
    """Have PyTorch build `library`, which loads it, too."""
    from torch.utils import cpp_extension  # slow to import, and its import looks for a compiler

    from_pip = find_cuda_from_pip()
    if cpp_extension.CUDA_HOME is None:
        if from_pip is None or not (from_pip / "bin" / "nvcc").exists():
            raise RuntimeError("there is no nvcc: none on the PATH, no CUDA_HOME, and none installed with pip")
        cpp_extension.CUDA_HOME = str(from_pip)
    spare_headers = []
    if from_pip is not None:
        # PyTorch's headers want those of cuBLAS and the like, which small toolkits lack and torch from pip brings.
        spare_headers.append(f"-idirafter{from_pip / 'include'}")
        link_runtime(from_pip, library.parent)
    # What is left of a build that was stopped: PyTorch would wait for its end, and load a part of a library.
    for left in (library.parent / "lock", library):
        left.unlink(missing_ok=True)
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    with told(f"hf_quest builds its CUDA kernels for {names} in {library.parent}, once ..."):
        cpp_extension.load(
            library.stem,
            sources=[str(path) for path in sources if path.suffix in (".cu", ".cpp")],
            extra_cflags=["-O3", "-std=c++20", *spare_headers],
            extra_cuda_cflags=["-O3", "-std=c++20", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)],
            extra_ldflags=[f"-L{library.parent}"],
            build_directory=str(library.parent),
            is_python_module=False,
        )


@functools.cache
def load_for_cpu():
    """Build the stages for this CPU, or find them built; return them as a library of `ctypes`.

    None if they are not there: the environment asks for that, or the reason and the way out were said in one warning.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        path, command = plan_for_cpu()
        if not is_whole(path):
            build_for_cpu(path, command)
        return ctypes.CDLL(str(path))
    except Exception as error:  # as in `load`
        warnings.warn(
            "hf_quest could not build its kernels for this CPU and runs its slower PyTorch path. The reason: "
            f"{complaints_of(str(error))}\nWhat helps: a C++ compiler, g++ or clang++, on the PATH or named by CXX, "
            "and a folder that can be written, ~/.cache/torch_extensions or what TORCH_EXTENSIONS_DIR names; then "
            f"start Python again. {SWITCH}=0 in the environment goes without them and says nothing.",
            stacklevel=3,
        )
        return None


def plan_for_cpu():
    """(where the library for this CPU is or will be, the command that builds it but for the name of its output)."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        raise RuntimeError("this build of PyTorch has not loaded GNU's OpenMP (libgomp), whose threads they take")
    found = [shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    compiler = next(filter(None, found), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler: none on the PATH, and no CXX")
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    source = find_sources() / FOR_CPU
    command = [compiler, "-std=c++17", "-O3", tune, "-fopenmp-simd", "-fPIC", "-shared", str(source), "-o"]
    # Machines may share the folder, and what is made for one of them crashes on another.
    key = key_of(source.read_text("utf-8"), *command[1:-2], instructions())
    return build_root() / f"hf_quest_cpu_{key}" / "cpu_step.so", command


def build_root():
    """The folder of all that is built, as PyTorch chooses it."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def key_of(*parts):
    """What tells libraries apart that are built of other texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def instructions():
    """What tells CPUs with other instructions apart; where the system does not list them, this machine from others."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
        return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in names}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def build_for_cpu(path, command):
    """Have the library at `path`, whole at once: other processes may build the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start_of_line = f"hf_quest builds its kernels for this CPU in {path.parent}, once ..."
    with told(start_of_line), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        begun = Path(folder) / path.name
        done = subprocess.run([*command, str(begun)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr or f"{command[0]} ended with {done.returncode}")
        seal(begun)
        os.replace(begun, path)


@contextlib.contextmanager
def told(text):
    """Say what is built, and how long it took if it was."""
    print(text, end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"done in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def seal(path):
    """Mark a library as whole, at its end: no loader looks beyond what its header names."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def is_whole(path):
    """Whether a library is there as it was built: to load a part of one, as full disks leave it, ends the process."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def find_sources():
    """The folder csrc: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return next(path for path in (package / "csrc", package.parent / "csrc") if path.is_dir())


def find_cuda_from_pip():
    """Where pip lays out CUDA of torch's version, the libraries that torch needs and a toolkit if asked, or None."""
    package = importlib.util.find_spec("nvidia")
    major = (torch.version.cuda or "").partition(".")[0]
    folders = package.submodule_search_locations if package is not None else ()
    return next((home for folder in folders if (home := Path(folder) / f"cu{major}").is_dir()), None)


def link_runtime(from_pip, folder):
    """Give the CUDA runtime from pip the name that linkers look for, in `folder`."""
    link = folder / "libcudart.so"
    for runtime in (from_pip / "lib").glob("libcudart.so.*"):
        if not link.exists():
            link.unlink(missing_ok=True)  # of a toolkit that is gone
            with contextlib.suppress(FileExistsError):  # another process was first
                link.symlink_to(runtime)


def complaints_of(output):
    """The lines of a compiler or linker that say what is wrong, or the end of what there is."""
    lines = [line for line in output.splitlines() if re.search(r"\b(error|fatal +|ld):", line)]
    return "\n".join(lines or [output.strip()])[-1500:]
