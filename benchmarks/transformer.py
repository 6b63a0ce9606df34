"""Times one forward pass of a Wan transformer with random weights: `python -m benchmarks.transformer [--model NAME]`.

Real shapes, no checkpoint: the weights are made on the device. Gate first: the output is compared with that of the same
weights on the reference kernels in fp64, at a small size. TFLOP/s counts the matrix products and the attention,
multiply-add as two.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.timing import machine, median_ms, report
from lightx2v.models.wan.config import HEAD_DIM, WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import Kernels, UnsupportedBackendError, references, select
from lightx2v_kernels.closeness import why_too_far

TEXT_TOKENS = 512
WAN = WanConfig(
    hidden_size=1536,
    ffn_size=8960,
    num_layers=30,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    patch_size=(1, 2, 2),
)


@dataclass(frozen=True)
class Model:
    """A network and the latents it is timed at, (T, H, W): 21 x 60 x 104 is 832 x 480 x 81 frames."""

    config: WanConfig
    latents: tuple[int, int, int]


MODELS = {
    "demo": Model(replace(WAN, hidden_size=256, ffn_size=896, num_layers=6), (5, 16, 16)),
    "wan-1.3b": Model(WAN, (21, 60, 104)),
    "wan-14b": Model(replace(WAN, hidden_size=5120, ffn_size=13824, num_layers=40), (21, 60, 104)),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b" if cuda else "demo")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--attention", default="auto", help="auto, or the name of an attention backend")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    return parser.parse_args(arguments)


def build(config: WanConfig, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> WanTransformer:
    """Random weights, scaled so that the tokens keep their size through all blocks; the same for the same seed."""
    with torch.device("meta"):
        model = WanTransformer(config, kernels)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def inputs(model: Model, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """latents (1, C, T, H, W), timestep (1,), context (1, S, text_dim), all float32."""
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(1, model.config.in_channels, *model.latents, device=device, generator=generator)
    context = torch.randn(1, TEXT_TOKENS, model.config.text_dim, device=device, generator=generator)
    return latents, torch.full((1,), 700.0, device=device), context


def num_tokens(model: Model) -> int:
    (t, h, w), (pt, ph, pw) = model.latents, model.config.patch_size
    return (t // pt) * (h // ph) * (w // pw)


def flops(model: Model) -> float:
    """Of one forward pass: the tokens through their matrices, the text through its keys and values, and attention."""
    config, tokens = model.config, num_tokens(model)
    d, ffn = config.hidden_size, config.ffn_size
    per_block = 2 * tokens * (6 * d * d + 2 * d * ffn) + 2 * TEXT_TOKENS * 2 * d * d
    per_block += 4 * tokens * (tokens + TEXT_TOKENS) * d
    edges = 2 * tokens * d * (config.in_channels + config.out_channels) * config.patch_size[1] * config.patch_size[2]
    return config.num_layers * per_block + edges + 2 * TEXT_TOKENS * d * (config.text_dim + d)


def gate(model: Model, attention: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Two blocks at 192 tokens against the same weights on the references in fp64; None if they agree, else why not."""
    small = Model(replace(model.config, num_layers=2), (3, 16, 16))
    chosen = select(attention=attention, device=device, dtype=dtype, head_dim=HEAD_DIM)
    plain = references()
    network = build(small.config, chosen, device, dtype)
    weights = network.state_dict()
    args = inputs(small, device)

    def run(kernels: Kernels, as_dtype: torch.dtype) -> Tensor:
        twin = build(small.config, kernels, device, as_dtype)
        twin.load_state_dict(weights)
        return twin(*args)

    return why_too_far(network(*args), run(plain, torch.float64), run(plain, dtype))


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MODELS[options.model]
    try:
        kernels = select(attention=options.attention, device=device, dtype=dtype, head_dim=HEAD_DIM)
    except UnsupportedBackendError as error:
        raise SystemExit(f"--attention {options.attention} --device {device}: {error}") from error
    result: dict[str, Any] = {"model": options.model, "tokens": num_tokens(model), "dtype": str(dtype)[6:]}
    result |= {"compiled": options.compile, "kernels": dict(kernels.names), "ms": None}
    wrong = gate(model, options.attention, device, dtype)
    result["gate"] = f"wrong: {wrong}" if wrong else "passed"
    if not wrong:
        network = build(model.config, kernels, device, dtype)
        if options.compile:
            for block in network.blocks:
                block.compile(dynamic=False)
        args = inputs(model, device)
        result["ms"] = round(median_ms(lambda: network(*args), device, budget_s=5, most=20), 3)
        result["tflops"] = round(flops(model) / result["ms"] / 1e9, 3)
        if device.type == "cuda":
            result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    Console(width=None if sys.stdout.isatty() else 140).print(result)
    report({"benchmark": "transformer", **machine(device), **result}, options.json)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
