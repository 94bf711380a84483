"""`hf-quest app`: dense attention and Quest answer side by side in a browser, and the page shows where Quest looked.

It needs the extra `app`. It is part of the package, not of `demos/`, so that the command is there after a pip install.
"""

import errno
import os
import re
import socket
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .. import demo
from ..reading.extract.result import MAX_BYTES
from .documents import SAMPLES
from .engine import Engine
from .page import build

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # the pages load nothing from elsewhere
    font_mono=["ui-monospace", "monospace"],
).set(
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)


def is_loopback(host):
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host, port):
    """Raise where the page cannot be opened, before a model is loaded for it."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does
            probe.bind((host, port))
    except socket.gaierror as error:
        raise demo.DemoError(f"There is no host {host}: {error.strerror}. Give another --host.") from None
    except PermissionError:
        raise demo.DemoError(f"Port {port} of {host} needs more rights. Give a --port from 1024 on.") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise demo.DemoError(f"This machine has no address {host}. Give another --host.") from None
        reason = "is in use" if "in use" in str(error) else f"cannot be opened ({error.strerror})"
        raise demo.DemoError(
            f"Port {port} of {host} {reason}. Give another by --port, or --port 0 for any that is free."
        ) from None


def check_root_path(root_path):
    """Raise for what is neither a path nor a URL."""
    try:
        parts = urlsplit(root_path)
    except ValueError:
        parts = None
    is_path = re.fullmatch(r"(/[\w.~%+-]+)*/?", parts.path) if parts else False
    is_url = parts and parts.scheme in ("http", "https") and parts.hostname
    if not is_path or not (is_url or root_path == parts.path):
        raise demo.DemoError(
            f"--root-path is a path such as /quest, or a URL such as https://example.org/quest, not {root_path}."
        )


def serve(model=None, device="auto", host="127.0.0.1", port=7860, samples=SAMPLES, root_path="", folder=None):
    """Load the model, open the page on `host` and `port` (None for any that is free), and return (page, its URL).

    `root_path` is where a proxy shows the page; `folder` where SmolLM2 is unpacked.
    """
    page = build(Engine(model, device, may_change=is_loopback(host), folder=folder), samples)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        root_path=root_path or None,
        theme=THEME,
        css_paths=Path(__file__).parent / "style.css",
        max_file_size=MAX_BYTES,
        show_error=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    return page, url
