"""`hfgpt serve`: an OpenAI-compatible server for one model."""

import ipaddress
import os
import socket
import sys
from importlib.util import find_spec

from transformers import AutoModelForCausalLM

from hfgpt.errors import InputError
from hfgpt.evaluation.fast_generation import speed_up_generation
from hfgpt.evaluation.generation import SamplingArguments
from hfgpt.models import find_model

PACKAGES = {"serve": ("fastapi", "uvicorn", "openai"), "web": ("gradio",)}


def serve(
    path: str,
    host: str,
    port: int,
    page: SamplingArguments | None = None,
    system: str | None = None,
    fast: bool = False,
):
    """Serves a model until it is interrupted; prints the server's URL when it accepts requests.

    Args:
        path: A folder or Hub id.
        host: Address to listen on.
        port: Port; 0: any that is free.
        page: Also serve a page to use the model in a browser, with these sampling settings.
        system: System prompt of the page.
        fast: Generate faster on a CPU, see `speed_up_generation`.

    Raises:
        InputError: A package is not installed, the address cannot be used, or the model is not a
            language model or does not support `fast`.
    """
    check_packages(page is not None)
    saved = find_model(path)
    if saved.is_classifier:
        raise InputError(f"'{path}' is a classifier, which has no completions: use hfgpt classify")
    with listen(host, port) as listening:
        model, tokenizer = saved.load_with_tokenizer(AutoModelForCausalLM, changed_weights="warn")
        if fast:
            speed_up_generation(model, half=True)
        import uvicorn

        from hfgpt.serving.endpoints import Server, build_app

        app, submit = build_app(path, model, tokenizer)
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}"
        if page is not None:
            from hfgpt.serving.web import Page, add_page

            app = add_page(app, Page(submit, model, tokenizer, page, system))
        print(f"{url}/v1" if page is None else f"{url}\n{url}/v1", flush=True)
        if not is_local(host):
            print("hfgpt: warning: other machines can use this server, without a password", file=sys.stderr)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        Server(config).run(sockets=[listening])


def check_packages(web: bool):
    """Checks that the packages of the server, and of the page, are installed.

    Raises:
        InputError: Names the first that is not.
    """
    for extra in ("serve", "web") if web else ("serve",):
        for name in PACKAGES[extra]:
            if find_spec(name) is None:
                command = f"pip install 'hfgpt[{'web' if web else 'serve'}]'"
                raise InputError(f"the server needs the package {name}, which is not installed: {command}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; connections wait until the server runs.

    Raises:
        InputError: The address cannot be used.
    """
    if not host:  # would listen on all addresses
        raise InputError("--host is empty: use 127.0.0.1, or 0.0.0.0 to let other machines use the server")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        unknown = isinstance(error, (socket.gaierror, UnicodeError))
        reason = "unknown host" if unknown else os.strerror(error.errno)  # without the address
        raise InputError(
            f"cannot listen on {host}, port {port} ({reason}): choose another --host or --port"
        ) from error


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
