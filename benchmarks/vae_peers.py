"""diffusers' and ComfyUI's Wan2.1 VAE, with the weights of their own making, where they can be imported."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import median_ms

DTYPE = torch.bfloat16
Peer = tuple[nn.Module, Callable[[Tensor], Any], Callable[[Tensor], Any]]  # network, decode, encode


def diffusers() -> Peer:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan()
    return vae, lambda raw: vae.decode(raw, return_dict=False), lambda clip: vae.encode(clip, return_dict=False)


def comfy() -> Peer:
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()  # its modules ask for a GPU when they are imported
    from comfy.ldm.wan.vae import WanVAE

    widths = {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    vae = WanVAE(**widths, temperal_downsample=[False, True, True], dropout=0.0)
    return vae, vae.decode, vae.encode


def measure(size: tuple[int, int, int], device: torch.device, left: Callable[[], float]) -> list[dict[str, Any]]:
    """Rows as those of our own; a peer that is not installed or does not fit has a note and no time."""
    rows = []
    for make in (diffusers, comfy):
        head = {"model": make.__name__, "dtype": str(DTYPE)[6:], "gate": "peer", "ms": None}
        try:
            rows += [{**head, **row} for row in _times(make, size, device, left)]
        except (ImportError, torch.OutOfMemoryError) as error:
            rows.append({**head, "what": "decode", "note": f"{type(error).__name__}: {error}"[:100]})
    return rows


@torch.inference_mode()
def _times(
    make: Callable[[], Peer], size: tuple[int, int, int], device: torch.device, left: Callable[[], float]
) -> list[dict[str, Any]]:
    with torch.device(device):
        vae, decode, encode = make()
    vae.to(DTYPE).eval()
    height, width, count = size
    raw = torch.randn(1, 16, (count - 1) // 4 + 1, height // 8, width // 8, device=device, dtype=DTYPE)
    clip = torch.rand(1, 3, count, height, width, device=device, dtype=DTYPE)
    rows = []
    for what, run in (("decode", lambda: decode(raw)), ("encode", lambda: encode(clip))):
        if left() <= 0:
            rows.append({"what": what, "note": "left out: no time"})
            continue
        peak = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            peak = round((torch.cuda.max_memory_allocated(device) - before) / 1e9, 2)
        rows.append(
            {
                "what": what,
                "ms": round(median_ms(run, device, budget_s=1.5, most=3, least=2, warm=1), 2),
                "peak_gb": peak,
            }
        )
    return rows
