"""Whatever goes wrong is one line on stderr, and no library says more."""

import functools
import logging
import os
import sys
import warnings

import typer
from rich.console import Console
from rich.text import Text

DEBUG = "HF_QUEST_DEBUG"
# Loggers that complain when PyTorch and Transformers are imported, about what nobody asked for.
NOISY = ("torch", "torch.utils._pytree", "torchao", "transformers", "huggingface_hub", "pypdf")
WrongUse = typer.BadParameter.__base__  # of click, which is inside of Typer or beside it, by version


class Commands(typer.core.TyperGroup):
    """The program, which says in one line what is wrong with its options, and not in a box."""

    def main(self, *args, standalone_mode=True, **options):
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except WrongUse as error:
            message = " ".join(error.format_message().replace("Value error, ", "").split())
            if message:  # without one it has printed the help
                where = error.ctx.command_path if error.ctx else self.name
                say(f"{message.rstrip('.')}. ({where} --help says what there is.)")
            code = error.exit_code
        if not standalone_mode:
            return code
        sys.exit(code)


def fail(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    say(lines[0])
    raise typer.Exit(code=1) from None


def say(line):
    Console(stderr=True).print(Text(f"Error: {line}"), soft_wrap=True)


def silence_libraries():
    """No warnings, retries and progress bars of the libraries between the lines of this program."""
    if os.environ.get(DEBUG):
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    for name in NOISY:  # some set their level when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)


def in_one_line(command):
    """The command, with one line of error for whatever goes wrong."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        silence_libraries()
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:  # who reads has enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(code=1) from None
        except ModuleNotFoundError as error:
            extra = "app" if error.name == "gradio" else "eval"
            fail(f'This needs {error.name}. Install it with: pip install "hf-quest[{extra}]"')
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            fail(explanation(error))

    return run


def explanation(error):
    """What to say of an error. The messages of some kinds were written for the user."""
    from hf_quest import QuestError
    from hf_quest.demo import DemoError
    from hf_quest.reading import DocumentError

    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, (DemoError, DocumentError, QuestError, OSError, ValueError)):
        return error
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}{': ' * bool(first)}{first} ({DEBUG}=1 shows where.)"
