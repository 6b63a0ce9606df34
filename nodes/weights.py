"""Weights that outlive their handle, so that a loader which runs again for other LoRAs reads nothing again.

ComfyUI drops a node's outputs before it runs the node once more. What was read into RAM then waits for as long as the
graph runs that asks for the same file, and a new handle takes it over.
"""

import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightx2v.config import Engine
from lightx2v.identify import CheckpointInfo
from lightx2v.lora import Applied, Lora, apply_loras, change_loras
from lightx2v.offload import Home, Placing

from . import host

POLL_S = 0.5  # between looks at whether the graph has ended


@dataclass
class Weights:
    """One transformer in memory. key: the file as it was, and what it was built for.

    engine: with the attention that was chosen last. applied: None where nothing is read yet. filed: blocks that were
    left in the file. home: once they were in RAM.
    """

    key: tuple[Any, ...]
    engine: Engine
    network: nn.Module
    placing: Placing
    applied: Applied | None = None
    filed: int = 0
    home: Home | None = None

    def rest(self) -> bool:
        """Leave the device; whether they are in RAM now. Those that never were are not copied there."""
        if self.home is not None:
            self.home.leave()
        read = self.applied is not None
        return read and all(tensor.device.type in ("cpu", "meta") for tensor in self.network.parameters())

    def forget(self, empty: nn.Module) -> None:
        """Nothing is read. empty: the network before that."""
        self.home, self.applied, self.filed, self.network = None, None, 0, empty

    def wear(self, loras: tuple[Lora, ...], info: CheckpointInfo, device: torch.device) -> None:
        """These LoRAs, whatever was on before. device: where merged weights are added up."""
        if self.applied is None:
            how = "branch" if self.filed else "auto"  # what is read again each time cannot be changed
            self.applied = apply_loras(self.network, info, loras, how, device=device)
        elif self.applied.loras != loras:
            if self.home is not None:
                self.home.leave()  # what is changed is what rests in RAM
            self.applied = change_loras(self.network, self.applied, loras, device=device)
            self.home = None  # made again of the tensors that there are now, where they lie


class Waiting:
    """Weights whose handle is gone. name: of the file, as the loader's picker has it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Weights] = {}
        self._lock = threading.Lock()

    def take(self, key: tuple[Any, ...]) -> Weights | None:
        """Those that wait under this key; others of the same file need not wait any longer."""
        with self._lock:
            found = self._kept.pop(key, None)
            self._kept = {other: kept for other, kept in self._kept.items() if other[0] != key[0]}
            return found

    def follow(self, handle: object, weights: Weights, name: str) -> None:
        """Let them wait in RAM once the handle is gone, if a graph runs then that asks for the file."""
        weakref.finalize(handle, self._left, weights, name).atexit = False

    def _left(self, weights: Weights, name: str) -> None:
        run = host.run_asking_for(name)
        if run is None or not weights.rest():
            return
        with self._lock:
            self._kept[weights.key] = weights
        threading.Thread(target=self._until_ended, args=(weights.key, run), daemon=True).start()

    def _until_ended(self, key: tuple[Any, ...], run: int) -> None:
        while host.is_running(run) and key in self._kept:
            time.sleep(POLL_S)
        with self._lock:
            self._kept.pop(key, None)
