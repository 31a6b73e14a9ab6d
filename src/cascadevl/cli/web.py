"""``cascadevl web``: a page to chat with a server about pictures."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from importlib.util import find_spec

from cascadevl.cli.arguments import Subparsers
from cascadevl.errors import ConfigError


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "web",
        help="a page to chat with a server",
        description="Show a web page that asks a server of `cascadevl serve` about pictures: "
        "conversations with streamed answers, tiles as the router sees them, the best of several "
        "answers.",
    )
    parser.add_argument(
        "--server",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="who answers (http://127.0.0.1:8000/v1)",
    )
    parser.add_argument(
        "--api-key-env",
        default="CASCADEVL_API_KEY",
        metavar="NAME",
        help="environment variable that holds the server's key, if it asks for one "
        "(CASCADEVL_API_KEY)",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(7860; 0 for any)")
    parser.add_argument(
        "--max-file", default="20mb", metavar="N", help="largest picture that is taken (20mb)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the page until the process is told to stop."""
    if find_spec("gradio") is None:
        raise ConfigError(
            "gradio is not installed; the web chat needs the extra 'web': "
            "pip install 'cascadevl[web]'"
        )
    from cascadevl.engine.http_json import HttpServer
    from cascadevl.serving.web_client import WebClient

    key = os.environ.get(args.api_key_env)
    client = WebClient(HttpServer(url=args.server, api_key=key, max_retries=1))
    about = client.about()

    from cascadevl.serving.web_chat import WebChat, launch

    page, address = launch(
        WebChat(client, about), host=args.host, port=args.port or None, max_file=args.max_file
    )
    print(f"{about.name} at {address}", flush=True)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        stop.wait()
    finally:
        page.close()
    return 0
