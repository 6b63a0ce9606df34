"""Random weights: made on the device, shared between contestants, and as hard on a GPU as real ones if asked.

*plain*: normal, scaled so that tokens keep their size through all blocks. Attention is nearly flat then, and tokens
grow alike from block to block, which costs a GPU less power than real weights do. *hot*: queries and keys are longer,
so that a query attends to some hundred of 32 760 keys, and what blocks add to all tokens alike (shifts, the mean of
GELU, the text) is kept small, so that tokens stay about as random as they came.
"""

import torch
from torch import Tensor, nn

from lightx2v.bench.subjects import Subject
from lightx2v_kernels import Kernels

WEIGHTS = ("hot", "plain")
QUERY_SIZE = 1.5  # of normed q and k when hot: scores of standard deviation 1.5^2
SHIFT_SIZE = 0.1  # of what a timestep adds to each block's modulation when hot, against plain
GATE_SIZE = 0.5  # share of a block's result that is added to the tokens when hot
TEXT_SIZE = 0.2  # of what the text adds, against plain


def build(subject: Subject, kernels: Kernels, device: torch.device, dtype: torch.dtype, kind: str) -> nn.Module:
    """The network with random weights of a kind of WEIGHTS, the same for the same seed, in the dtypes that a file of
    `dtype` would be loaded in."""
    with torch.device("meta"):
        network = subject.spec.build(subject.config, kernels)
    for name, parameter in network.named_parameters():
        wide = dtype == torch.bfloat16 and subject.spec.keep_float32(name)
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        if kind == "hot":
            heat(network)
    return network


@torch.no_grad()
def heat(network: nn.Module) -> None:
    """Change plain weights to hot ones, in place: networks that share them change with it."""
    for name, parameter in network.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "_q_norm.weight", "_k_norm.weight")):
            parameter.fill_(QUERY_SIZE)
        elif name.startswith("time_projection.") or "_mod.linear." in name:
            parameter.mul_(SHIFT_SIZE)
        elif name.startswith("blocks.") and name.endswith("modulation"):
            parameter.zero_()
            parameter[:, [2, 5]] = GATE_SIZE
        elif name.endswith("cross_attn.o.weight"):
            parameter.mul_(TEXT_SIZE)
        elif name.endswith(("ffn.2.weight", "_mlp.fc2.weight")):
            parameter.sub_(parameter.mean(1, keepdim=True))
        if name.endswith("_mod.linear.bias"):
            gates = parameter.view(6, -1)
            gates[[2, 5]] = GATE_SIZE


def twin(subject: Subject, network: nn.Module, kernels: Kernels) -> nn.Module:
    """The same network with other kernels, sharing every weight with `network`, layers that were replaced included."""
    with torch.device("meta"):
        other = subject.spec.build(subject.config, kernels)
    for name, module in network.named_modules():
        if type(module) is not type(other.get_submodule(name)):
            other.set_submodule(name, module)
    other.load_state_dict(network.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def weight_bytes(network: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    tensors = [plain for tensor in (*network.parameters(), *network.buffers()) for plain in _plain(tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor of another project's own class is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]
