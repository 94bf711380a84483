"""Folders of tensors on a disk: written whole or not at all, and read only if they are as they were written.

`cache.json` has the format's version, what the writer describes, and of every safetensors file its size, the hash of
its header and a sum of each tensor. It is written last, into a folder of another name, which is then renamed.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import QuestError
from .copies import copy_by_head

INDEX = "cache.json"
SUFFIX = ".safetensors"
FORMAT, VERSION = "hf_quest cache", 1
ROOM = 1 << 20  # bytes for the index and headers


def check_target(folder: Path, num_bytes: int) -> None:
    """Raise if `folder` cannot become a new one of so many bytes."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.is_symlink() or (folder.exists() and not is_empty):
        raise FileExistsError(
            f"{folder} exists, and nothing is written over. Name another folder, or remove this one first. The cache "
            "is unchanged."
        )
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + ROOM:
        raise OSError(
            f"The cache takes {num_bytes:,} bytes, and there are {free:,} free where {folder} is to be. Make room, or "
            "name a folder on another disk. Nothing was written, and the cache is unchanged."
        )


def write(
    folder: Path, content: dict[str, Any], num_bytes: int, files: Iterable[tuple[str, dict[str, torch.Tensor]]]
) -> None:
    """Write `content`, which JSON can hold, and files of tensors by name, `num_bytes` in all, one after the other.

    Raises:
        OSError: if it cannot be written. Nothing is left of it then.
    """
    folder = folder.absolute()
    check_target(folder, num_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.saving-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        part.mkdir()
        written = {name: write_file(part / f"{name}{SUFFIX}", tensors) for name, tensors in files}
        (part / INDEX).write_text(index_of({**content, "files": written}))
        sync(part / INDEX)
        sync(part)
        os.rename(part, folder)  # in the place of nothing, or of an empty folder
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise OSError(
            f"{folder} was not written: {str(error).strip()}. Nothing is left of it, and the cache is unchanged. Make "
            "room, or name a folder on another disk."
        ) from error
    with contextlib.suppress(OSError):  # not every file system can
        sync(folder.parent)


def write_file(path, tensors):
    """Write tensors to a new file; return what to know it by."""
    tensors = on_cpu(tensors)
    save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # as other files; safetensors lets the owner alone read
    sync(path)
    sums = {name: sum_of(tensor) for name, tensor in tensors.items()}
    return {"bytes": path.stat().st_size, "header": hash_of_header(path), "sums": sums}


def on_cpu(tensors):
    """Contiguous tensors on the CPU of which no two share their memory."""
    found, places = {}, set()
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" and tensor.dim() > 2:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            copy_by_head(copy, tensor)
        else:
            copy = tensor.cpu().contiguous()
        copy = copy.clone() if copy.untyped_storage().data_ptr() in places else copy
        places.add(copy.untyped_storage().data_ptr())
        found[name] = copy.detach()
    return found


def sum_of(tensor):
    """A number that another byte anywhere changes: the sum of a contiguous tensor's bytes, eight at a time."""
    content = tensor.reshape(-1).view(torch.uint8)
    num_whole = content.numel() // 8 * 8
    words = content[:num_whole].view(torch.int64).sum().item()
    return int(words) + int(content[num_whole:].sum(dtype=torch.int64).item())


def hash_of_header(path):
    with open(path, "rb") as file:
        size = file.read(8)
        length = min(int.from_bytes(size, "little"), path.stat().st_size)  # of a damaged one it may be anything
        return hashlib.sha256(size + file.read(length)).hexdigest()


def sync(path):
    """Have the disk hold a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():
        return  # which Windows does by itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_of(content):
    return json.dumps({"format": FORMAT, "version": VERSION, "sha256": hash_of(content), "content": content}, indent=1)


def hash_of(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder, once it and the files' headers are found to be whole.

    Raises:
        FileNotFoundError: where there is none.
        QuestError: where there is something else, something newer, or where anything is missing or another.
    """
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}. Name one that a cache was saved to.")
    if not (folder / INDEX).is_file():
        is_part = folder.is_dir() and any(folder.glob(f"*{SUFFIX}")) and ".saving-" in folder.name
        reason = "Saving it did not end: it is a part, which can be removed" if is_part else f"It has no {INDEX}"
        raise QuestError(f"{folder} is no saved cache. {reason}. Name a folder that a cache was saved to.")
    content = read_index(folder)
    for name, known in content["files"].items():
        check_file(folder / f"{name}{SUFFIX}", known)
    return content


def read_index(folder):
    damaged = (
        f"{folder / INDEX} is damaged, or was changed: it is not as it was written. Copy the folder again from where "
        "it is whole, or let the model read the document again."
    )
    try:
        index = json.loads((folder / INDEX).read_bytes())
        version, is_ours = index["version"], index["format"] == FORMAT
        content, is_whole = index["content"], isinstance(version, int) and index["sha256"] == hash_of(index["content"])
    except (ValueError, KeyError, TypeError):
        raise QuestError(damaged) from None
    if is_ours and isinstance(version, int) and version > VERSION:
        raise QuestError(
            f"{folder} is of version {version} of the format of saved caches, and this version of hf_quest reads "
            f"{VERSION}. Update hf_quest: pip install --upgrade hf-quest."
        )
    if not is_ours or not is_whole or version < 1:
        raise QuestError(damaged)
    return content


def check_file(path, known):
    """Raise if a file is not as long as it was, or has another header."""
    if not path.is_file():
        found = "is missing"
    elif path.stat().st_size != known["bytes"]:
        found = f"has {path.stat().st_size:,} of {known['bytes']:,} bytes"
    elif hash_of_header(path) != known["header"]:
        found = "has another header than was written"
    else:
        return
    raise QuestError(
        f"{path} {found}: the saved cache is damaged, and nothing of it was loaded. Copy the folder again from where "
        "it is whole, or let the model read the document again."
    )


def tensors_in(folder: Path, name: str, content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one file by name, in memory that the file is mapped to: their pages are read when they are used.

    Raises:
        QuestError: for tensors whose bytes are not those that were written.
    """
    path, sums = folder / f"{name}{SUFFIX}", content["files"][name]["sums"]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sums}
    except (SafetensorError, OSError) as error:
        raise QuestError(f"{path} cannot be read: {error}. Copy the folder again from where it is whole.") from error
    for key, tensor in tensors.items():
        if sum_of(tensor) != sums[key]:
            raise QuestError(
                f"{key} in {path} is not what was written: the disk or a copy of the file is damaged. Copy the folder "
                "again from where it is whole, or let the model read the document again."
            )
    return tensors
