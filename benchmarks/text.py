"""The text encoder umT5 with random weights at the size of xxl: what its float32 arithmetic costs, and what would not.

python -m benchmarks.text [--device cuda] [--json FILE]
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.frames import table
from benchmarks.timing import machine, median_ms, report
from lightx2v.text.layout import Sizes
from lightx2v.text.resting import Widened
from lightx2v.text.umt5 import TEXT_TOKENS, empty_network
from lightx2v_kernels.closeness import relative_error

XXL = Sizes(256384, 4096, 64, 64, 10240, 24, 32)
TINY = Sizes(512, 64, 4, 16, 128, 2, 32)
Row = dict[str, Any]


def build(found: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Weights at rest in `dtype`, blocks that widen themselves; the embedding is left out, its rows are the input."""
    network = empty_network(found)
    network.shared = nn.Embedding(1, 1)
    network = network.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                # T5 does not divide by the root of the head's size: its queries are that much smaller.
                size = parameter.shape[1] * (found.head_dim if ".q." in name else 1)
                parameter.normal_(0, 0.1 if "bias" in name else size**-0.5)
    network.encoder.final_layer_norm.float()
    for index, block in enumerate(network.encoder.block):
        network.encoder.block[index] = Widened(block)
    return network.eval().requires_grad_(False)


def measure(device: torch.device, left: Callable[[], float]) -> list[Row]:
    """Rows for prompts of several lengths: as it is, with TF32 products, as a CUDA graph, in the weights' own dtype."""
    found = XXL if device.type == "cuda" else TINY
    network = build(found, device, torch.bfloat16)
    rows: list[Row] = []
    with torch.inference_mode():
        for tokens in (32, 128, TEXT_TOKENS):
            if left() <= 0:
                break
            x = torch.randn(1, tokens, found.hidden_size, device=device)
            rows += _of_length(network, x, device)
    return rows


def _of_length(network: nn.Module, x: Tensor, device: torch.device) -> list[Row]:
    rows: list[Row] = []

    def run(module: nn.Module = network, given: Tensor = x) -> Tensor:
        made: Tensor = module(inputs_embeds=given).last_hidden_state
        return made

    def add(what: str, call: Callable[[], Tensor]) -> None:
        error = relative_error(call().float(), truth)
        ms = round(median_ms(call, device, budget_s=0.5, most=20), 3)
        rows.append({"what": what, "tokens": x.shape[1], "ms": ms, "relative error": f"{error:.1e}"})

    truth = run().clone()
    add("float32, as it runs", run)
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            add("float32 with TF32 products", run)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        try:
            add("float32, as a CUDA graph", _graph(run))
        except RuntimeError as error:  # transformers may ask the host while it makes its mask
            rows.append({"what": "as a CUDA graph", "tokens": x.shape[1], "failed": str(error).partition("\n")[0]})
    bare = _Bare(network)
    with bare:
        add("in the dtype of the weights", partial(run, network, x.to(torch.bfloat16)))
    return rows


class _Bare:
    """The network without the widening of its blocks, for a while."""

    def __init__(self, network: nn.Module) -> None:
        self.encoder = network.encoder
        self.blocks = list(network.encoder.block)

    def __enter__(self) -> None:
        for index, block in enumerate(self.blocks):
            self.encoder.block[index] = block.block

    def __exit__(self, *error: object) -> None:
        for index, block in enumerate(self.blocks):
            self.encoder.block[index] = block


def _graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call as one launch. Its memory stays taken as long as the graph lives."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=120, help="no length is begun after so long (default: 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    options = parser.parse_args(arguments)
    device, began = torch.device(options.device), time.monotonic()
    rows = measure(device, lambda: options.seconds - (time.monotonic() - began))
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    report({"benchmark": "text", **machine(device), "results": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
