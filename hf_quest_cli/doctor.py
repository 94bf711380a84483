"""`hf-quest doctor`: what is installed, what the GPU is, whether the kernels are built, and what to do."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path

import torch
import transformers
from rich.console import Console

import hf_quest
from hf_quest.kernels import build

OLDEST = (8, 0)  # compute capability that the kernels need
EXTRAS = {
    "documents": ("charset_normalizer", "pypdf", "cryptography", "mammoth", "markdownify"),
    "app": ("gradio",),
    "eval": ("datasets", "matplotlib", "gguf"),
}


def examine(as_json):
    facts, advice = found(), []
    facts["kernels"] = kernels(advice)
    facts["CPU kernels"] = kernels_for_cpu(advice)
    for extra, missing in missing_of(EXTRAS).items():
        verb = "is" if len(missing) == 1 else "are"
        advice.append(f'For `{extra}`, {", ".join(missing)} {verb} missing: pip install "hf-quest[{extra}]"')
    if as_json:
        print(json.dumps({**facts, "advice": advice}, indent=1))
        return
    console = Console()
    width = max(map(len, facts)) + 2
    for name, value in facts.items():  # no table, which would cut a path off
        console.print(f"{name:{width}}{value}", highlight=False, markup=False, soft_wrap=True)
    for line in advice or ["Nothing is missing."]:
        console.print(f"→ {line}", highlight=False, markup=False, soft_wrap=True)


def found():
    """Versions and machines."""
    return {
        "hf_quest": f"{hf_quest.__version__} in {Path(hf_quest.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "PyTorch": torch.__version__,
        "Transformers": f"{transformers.__version__} (tested: {tested()})",
        "CUDA of PyTorch": torch.version.cuda or "none: a build for CPUs",
        "GPU": ", ".join(map(gpu, range(torch.cuda.device_count()))) or "none",
    }


def tested():
    try:
        wanted = importlib.metadata.requires("hf-quest") or []
    except importlib.metadata.PackageNotFoundError:
        return "not installed by pip"
    return next((line.removeprefix("transformers") for line in wanted if line.startswith("transformers")), "")


def gpu(index):
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"


def missing_of(extras):
    missing = {
        name: [each for each in modules if importlib.util.find_spec(each) is None] for name, modules in extras.items()
    }
    return {name: modules for name, modules in missing.items() if modules}


def kernels(advice):
    """Where the kernels are built, or why they are not; what to do goes to `advice`."""
    if not torch.cuda.is_available():
        advice.append("Without a CUDA GPU no CUDA kernels are needed.")
        return "not needed: there is no CUDA GPU"
    if all(torch.cuda.get_device_capability(index) < OLDEST for index in range(torch.cuda.device_count())):
        advice.append("The kernels need compute capability 8.0 (Ampere) or later. Everything runs in PyTorch, slower.")
        return "not built: the GPU is too old"
    built = list(built_in(build_root()))
    if built:
        return ", ".join(map(str, built))
    for name, what in missing_tools():
        advice.append(f"{name}: {what}")
    advice.append("The kernels are built when a model first decodes on the GPU, once, in one to three minutes.")
    return f"not built yet; they will be in {build_root()}"


def kernels_for_cpu(advice):
    """The same of the kernels for this CPU."""
    if os.environ.get(build.SWITCH) == "0":
        return f"turned off by {build.SWITCH}=0"
    try:
        path, _ = build.plan_for_cpu()
    except RuntimeError as error:
        if "compiler" in str(error):
            advice.append("For faster steps on a CPU install g++, such as apt-get install g++.")
        return f"not built: {error}"
    if path.exists():
        return str(path)
    advice.append("The kernels for this CPU are built when a model first decodes on it, once, in some seconds.")
    return f"not built yet; they will be in {path.parent}"


def build_root():
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def built_in(folder):
    """The kernels for this PyTorch in a folder of PyTorch's extensions."""
    version = torch.__version__.replace(".", "_").replace("+", "_")
    return sorted(folder.glob(f"hf_quest_*_torch_{version}/*.so"))


def missing_tools():
    """(name, what to do) of what building needs and is not there."""
    from torch.utils import cpp_extension

    pip_cuda = 'pip install "hf-quest[cuda]", or set CUDA_HOME to a CUDA toolkit'
    from_pip = importlib.util.find_spec("nvidia")
    folders = from_pip.submodule_search_locations if from_pip else ()
    has_nvcc = cpp_extension.CUDA_HOME is not None or any(Path(each).glob("cu*/bin/nvcc") for each in folders)
    if not has_nvcc:
        yield "There is no nvcc", pip_cuda
    if not shutil.which("ninja") and importlib.util.find_spec("ninja") is None:
        yield "There is no ninja", 'pip install "hf-quest[cuda]"'
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        yield "There is no C++ compiler", "install g++, such as apt-get install g++"
