"""A whole network's weights at rest in RAM, once: copies on a device come and go, and nothing is ever written back."""

import torch
from torch import nn

from lightx2v.offload.parts import parts_of
from lightx2v.offload.slab import Slab


class Home:
    """Constructing moves all weights to main memory, unless they rest there already as an earlier one left them.

    To change tensors in place, do so while they are at home; where tensors are replaced, make a new one.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks, beside = parts_of(network)
        self._slabs = [Slab(block.modules()) for block in blocks] + [Slab(beside)]

    def copy_to(self, device: torch.device) -> None:
        """The network uses copies on the device from now on. Where there is no room for all, it stays at home."""
        if device.type == "cpu":
            return
        try:
            for slab in self._slabs:
                slab.point(slab.views(slab.host.to(device)))
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """The network uses what is in RAM; nobody holds the copies any longer."""
        for slab in self._slabs:
            slab.point_home()
