"""What every stage needs to know about the run it is part of."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """One invocation of the training script.

    state: folder of resumable state. out: folder of the exported checkpoints and results.
    deadline: time.monotonic() at which stages must have saved and returned.
    dry: everything in miniature, to see that it runs.
    """

    device: torch.device
    state: Path
    out: Path
    deadline: float
    dry: bool = False
    compile: bool = False
    seed: int = 0
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def log(self, text: str) -> None:
        """Print a line with the time since the start, and keep it in the log file."""
        line = f"[{time.monotonic() - self.began:6.1f}] {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a") as file:
            file.write(line + "\n")

    def report(self, name: str, values: dict[str, Any]) -> None:
        """Log a result and keep it in results.json, across invocations."""
        self.log(f"{name} {json.dumps(values)}")
        path = self.state / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = values
        for folder in (self.state, self.out):
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    def generator(self, stage: int) -> torch.Generator:
        """A generator on the run's device for one stage."""
        return torch.Generator(device=self.device).manual_seed(self.seed * 1000 + stage)

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; on a CPU conv3d gradients in bfloat16 came out NaN (torch 2.11), so float32 there."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def synchronize(self) -> None:
        """Wait for the device, so that a wall-clock reading means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def start_run(args: argparse.Namespace) -> Run:
    """The run that a command line asks for; its folders are made."""
    device = torch.device(args.device)
    state = args.state or Path(tempfile.mkdtemp(prefix="demo-state-"))
    for folder in (state, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(
        device=device,
        state=state,
        out=args.out,
        deadline=time.monotonic() + args.call_seconds,
        dry=args.dry,
        compile=device.type == "cuda" and not args.no_compile,
        seed=args.seed,
    )


def save_state(path: Path, value: Any) -> None:
    """torch.save to a temporary name, then rename."""
    fresh = path.with_suffix(".tmp")
    torch.save(value, fresh)
    os.replace(fresh, path)
