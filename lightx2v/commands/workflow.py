"""`lightx2v workflow`: run a workflow on a ComfyUI server and fetch what it makes."""

import argparse
import sys
from pathlib import Path

from lightx2v.comfyui import Server, ServerError, read_graph

DEFAULT = "http://127.0.0.1:8188"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="a workflow in API format, such as workflows/wan_t2v.api.json")
    command.add_argument("--server", default=DEFAULT, help=f"default: {DEFAULT}")
    command.add_argument("--output", type=Path, default=Path(), help="folder for its files; default: this one")
    command.add_argument("--quiet", action="store_true", help="no word of progress")


def run(args: argparse.Namespace) -> int:
    """0 once the files are here. Raises ServerError in words; stopped by Ctrl+C, it stops at the server too."""
    graph, server = read_graph(args.file), Server(args.server)
    prompt = server.queue(graph)
    try:
        outputs = server.follow(prompt, lambda words: None if args.quiet else print(words, file=sys.stderr))
    except KeyboardInterrupt:
        server.cancel(prompt)
        raise
    written = list(server.fetch(outputs, args.output))
    if not written:
        raise ServerError(f"{args.file}: it ran and saved nothing: add a Save Video node")
    for path in written:
        print(path)
    return 0
