"""Something that goes wrong at a chosen place of the engine, once; and what a run made, in a few characters."""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
from collections.abc import Callable
from functools import reduce
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io


def _cancel() -> None:
    comfy.model_management.interrupt_current_processing()


def _fail() -> None:
    raise RuntimeError("the test's")


def _lose() -> None:
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


DEEDS: dict[str, Callable[[], None]] = {"cancel": _cancel, "fail": _fail, "lose": _lose, "die": _die}


class FixtureTripwire(io.ComfyNode):
    """From now on a function of the engine does that at one of its calls, counted from 0, and is itself again.

    place: "module:name", as in "lightx2v.models.wan.transformer:WanBlock.forward". about: counts only calls in whose
    arguments this word stands.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureTripwire",
            category="tests",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.String.Input("place"),
                io.Combo.Input("deed", options=list(DEEDS)),
                io.Int.Input("call", default=0),
                io.String.Input("about", default=""),
            ],
        )

    @classmethod
    def execute(cls, place: str, deed: str, call: int, about: str) -> io.NodeOutput:
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module))
        whole, left = getattr(owner, name), [call]

        def trapped(*args: Any, **kwargs: Any) -> Any:
            if about in " ".join(each for each in args if isinstance(each, str)):
                left[0] -= 1
            if left[0] < 0:
                setattr(owner, name, whole)
                DEEDS[deed]()
            return whole(*args, **kwargs)

        setattr(owner, name, trapped)
        return io.NodeOutput()


class FixtureDigest(io.ComfyNode):
    """Shows the digest of what arrives: of the bits of a LATENT's samples, or of an IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureDigest", category="tests", is_output_node=True, inputs=[io.AnyType.Input("value")]
        )

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        tensor = value["samples"] if isinstance(value, dict) else value
        raw = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(raw.shape)}".encode() + raw.view(torch.uint8).numpy().tobytes())
        return io.NodeOutput(ui={"text": (digest.hexdigest()[:16],)})
