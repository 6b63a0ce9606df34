"""The CPU's path and every import need neither Triton nor any package of kernels, quantisation or attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dev.environment import REPOSITORY
from tiny_wan import SMALL, write_folder

ABSENT = (
    "triton flash_attn flash_attn_interface fa3_fwd fa3_fwd_interface sageattention sageattn3 sgl_kernel vllm torchao "
    "flashinfer comfy_kitchen kernels xformers diffusers gguf"
)
# Nothing of these is found, as where they were never installed: neither module, nor spec, nor version.
ABSENCE = f"""
import sys
ABSENT = set({ABSENT.split()})

class Finders:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            for found in getattr(finder, "find_distributions", lambda *context: ())(*context):
                if found.metadata["Name"].replace("-", "_") not in ABSENT:
                    yield found

    def invalidate_caches(self):
        for finder in self.finders:
            getattr(finder, "invalidate_caches", lambda: None)()

sys.meta_path[:] = [Finders(list(sys.meta_path))]
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", ABSENCE + script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_absent_is_found_by_nobody() -> None:
    script = """
import importlib.util, importlib.metadata, torch
assert importlib.util.find_spec("triton") is None and importlib.util.find_spec("einops")
assert importlib.metadata.version("einops")
try:
    importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    print("absent")
"""
    assert run(script).split() == ["absent"]


def test_a_clip_without_any_of_them(tmp_path: Path) -> None:
    script = f"""
from lightx2v import LightX2VPipeline
pipe = LightX2VPipeline({str(write_folder(tmp_path))!r})
pipe.create_generator(**{SMALL!r})
made = pipe.generate(seed=1, prompt="a", save_result_path={str(tmp_path / "a.mp4")!r}, progress=False)
print(sorted({{name.split(".")[0] for name in sys.modules}} & ABSENT))
"""
    assert run(script).strip() == "[]" and (tmp_path / "a.mp4").stat().st_size > 0


def test_every_backend_of_a_package_says_what_installs_it() -> None:
    script = """
import torch
from lightx2v_kernels import registry
place = torch.device("cpu"), torch.float32, 128
taken = {op: registry.select(op, "auto", *place).name for op in registry.registries()}
for op in registry.registries():
    for backend in registry.registry(op).backends:
        if backend.package is not None:
            why = backend.why_not(*place)
            assert "is not installed (" in why, (op, backend.name, why)
            assert backend.name != taken[op]
            try:
                registry.select(op, backend.name, *place)
            except registry.UnsupportedBackendError as error:
                print(op, backend.name, error)
"""
    said = run(script)
    for name in ("flash_attn2", "flash_attn3", "flash_attn4", "sage_attn", "sage_attn2", "sage_attn3", "triton"):
        assert f"attention {name} attention backend '{name}' cannot run on cpu" in said
