"""From an identified checkpoint to a network ready to run."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from lightx2v.checkpoint import assign, places
from lightx2v.config import Engine, Parallel
from lightx2v.identify import CheckpointInfo
from lightx2v.lora import share
from lightx2v.lora.branch import is_linear
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.ring import mergeable
from lightx2v.parallel.ulysses import require_heads, spread
from lightx2v.quant.linear import kind_of
from lightx2v.quant.packing import choose_products, filling, keep_packed, pack
from lightx2v_kernels import Kernels, select

log = logging.getLogger(__name__)
NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(engine: Engine, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that the transformer runs in on `device` when its file stores `stored`.

    "auto": float32 on the CPU, where half precision is slower; on a GPU the file's half precision, bfloat16 for
    float32 files, float16 where the GPU has no bfloat16 (before Ampere).
    """
    if engine.dtype != "auto":
        return NAMED[engine.dtype]
    if device.type == "cpu":
        return torch.float32
    if stored == torch.float16:
        return torch.float16
    native_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native_bf16 else torch.float16


def choose_kernels(info: CheckpointInfo, engine: Engine, device: torch.device, mesh: Mesh | None = None) -> Kernels:
    """The kernels for one model on one device, of a mesh with attention over it.

    Raises UnsupportedBackendError with every reason why not, ValueError for heads that cannot be shared out.
    """
    dtype, head_dim, parallel = compute_dtype(engine, info.dtype, device), info.spec.head_dim, engine.parallel
    require_heads(info.config.num_heads, parallel, info.spec.title)
    merging = mergeable(engine.attention, device, dtype, head_dim) if parallel.ring > 1 else None
    attention = engine.attention if merging is None else merging.name
    kernels = select(attention=attention, device=device, dtype=dtype, head_dim=head_dim)
    if mesh is None or parallel.sequence == 1:
        return kernels
    return spread(kernels, mesh, merging.partial() if merging and merging.partial else None)


def require_kernels(infos: Sequence[CheckpointInfo], engine: Engine, device: torch.device) -> None:
    """Raise UnsupportedBackendError, with every reason, where what the engine names cannot run these models there."""
    for info in infos:
        choose_kernels(info, engine, device)
        choose_products(info, engine, device, compute_dtype(engine, info.dtype, device))


def build_transformer(
    info: CheckpointInfo, engine: Engine, device: torch.device, mesh: Mesh | None = None
) -> nn.Module:
    """The network for `device`, on the meta device and in the dtypes that it will have; `fill` gives it its weights.

    Linear layers that keep packed weights, as `engine.quant` says, are `ScaledLinear` and `GgufLinear`.
    mesh: joined for `engine.parallel`, where that is more than one device.
    Raises CheckpointError for a bad file and UnsupportedBackendError for an attention backend, or a format or kernel of
    linear layers, that was named and cannot run here.
    """
    spec, dtype = info.spec, compute_dtype(engine, info.dtype, device)
    _require_mesh(engine, mesh)
    kernels = choose_kernels(info, engine, device, mesh)  # outside the meta device: choosing runs self-tests
    products = choose_products(info, engine, device, dtype)
    with torch.device("meta"):
        transformer = spec.build(info.config, kernels)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if spec.keep_float32(name) else dtype)
    pack(transformer, info, engine, products, kernels)
    places(transformer, filling(transformer, info.header, device))
    return transformer.eval().requires_grad_(False)


def fill(
    transformer: nn.Module,
    info: CheckpointInfo,
    device: torch.device,
    quantise_on: torch.device | None = None,
    *,
    only: Callable[[str], bool] = lambda name: True,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Stream the weights of a built network to a device. only: names of those; the others stay in the file. on_tensor:
    before each, may raise to cancel; the network is then of no use.

    Weights are restored or quantised one at a time, so that no more than one is in memory in float32: restored on that
    device, quantised on `quantise_on` (default: the same).
    """
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    header = filling(transformer, info.header, quantise_on or device)
    assign(transformer, header, dtype=dtypes.get, device=device, only=only, on_tensor=on_tensor)
    log.info("%s: %s; %s", info.path.name, info.describe(), described(transformer))


def described(transformer: nn.Module) -> str:
    """In what the linear layers of a network multiply, in words."""
    kinds = Counter(kind_of(module) for module in transformer.modules() if is_linear(module))
    return "linear layers: " + ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())


def load_transformer(
    info: CheckpointInfo,
    engine: Engine,
    device: torch.device,
    weights_on: torch.device | None = None,
    left: Callable[[nn.Module], Collection[str]] = lambda transformer: (),
    mesh: Mesh | None = None,
) -> nn.Module:
    """Build the network for `device` and read its weights to `weights_on` (default: device); raises as the two do.

    left: names of weights that stay in the file, and without contents in the network. mesh: see `build_transformer`.
    """
    transformer = build_transformer(info, engine, device, mesh)
    names = left(transformer)
    fill(transformer, info, weights_on or device, device, only=lambda name: name not in names)
    return transformer


def with_attention(
    transformer: nn.Module, info: CheckpointInfo, engine: Engine, device: torch.device, mesh: Mesh | None = None
) -> nn.Module:
    """The same network with the attention of `engine`, sharing every weight and LoRA with `transformer`."""
    _require_mesh(engine, mesh)
    kernels = choose_kernels(info, engine, device, mesh)
    with torch.device("meta"):
        other = info.spec.build(info.config, kernels)
    keep_packed(transformer, other)
    other.load_state_dict(transformer.state_dict(), assign=True)
    share(transformer, other)
    return other.eval().requires_grad_(False)


def _require_mesh(engine: Engine, mesh: Mesh | None) -> None:
    found = Parallel() if mesh is None else mesh.parallel
    if found != engine.parallel:
        raise ValueError(
            f"the model is to run on {engine.parallel.describe()}, the mesh is of {found.describe()}: join one for the "
            "engine's own sizes"
        )
