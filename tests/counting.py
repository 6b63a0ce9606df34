"""Bytes that are alive at once, counted on tensors that may be without contents."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, op: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self._now += storage.nbytes()
                    self.most = max(self.most, self._now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, storage: int, nbytes: int) -> None:
        self._alive.discard(storage)
        self._now -= nbytes
