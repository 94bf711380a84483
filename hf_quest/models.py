"""A model and its tokenizer by a name of the hub or a folder, for the commands and the app."""

import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

LOOK_UP_SECONDS = 10
CONFIG = "config.json"


def first_line(error):
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[Errno -?\d+\] ", "", line)


def load(name, device, dtype=None):
    """A model with `attn_implementation="quest"` and its tokenizer; ValueError with the reason in one line.

    Without `dtype`: the model's own on a GPU, float32 on a CPU, of which many are slow at bfloat16.
    """
    dtype = dtype or ("auto" if device == "cuda" else "float32")
    try:
        options = {"local_files_only": not is_on_hub(str(name))}
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="quest", dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # whatever Transformers, the hub or the model's own code raise
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval(), tokenizer


def is_on_hub(name):
    """Whether the hub has the model, asked once: Transformers would ask for each of its files again and again.

    False for a folder, and for a model that was fetched before where the hub does not answer.
    """
    if name and Path(name).is_dir():
        return False
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=LOOK_UP_SECONDS)
    except HFValidationError:
        raise ValueError("there is no such folder, and it is no name of the hub, such as owner/model.") from None
    except GatedRepoError:
        raise ValueError(f"its owner asks for consent, at https://huggingface.co/{name}, and for a login.") from None
    except EntryNotFoundError:
        return True  # Transformers says what is missing
    except RepositoryNotFoundError:
        raise ValueError("there is no such folder, and the hub has no such model, or not for everybody.") from None
    except Exception as error:
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return False
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer ({first_line(error)})"
        raise ValueError(f"there is no such folder, it was not fetched before, and {reason}.") from None
    return True
