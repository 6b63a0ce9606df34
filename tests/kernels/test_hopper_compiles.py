"""The Gluon kernel for Hopper cannot run in Triton's interpreter: here it is at least compiled, which needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from lightx2v_kernels.attention import _hopper as hopper

def tile(kind, bits, dim):
    return f"tensordesc<{kind}[64, {dim}],{NVMMASharedLayout(min(128, dim * bits // 8), bits, 2)!r}>"

found = []
for int8, anchored, kind, dim in ((False, True, "bf16", 128), (True, True, "bf16", 128), (False, False, "fp16", 64)):
    cut = hopper.INT8 if int8 else hopper.EXACT
    qk = tile("i8", 8, dim) if int8 else tile(kind, 16, dim)
    signature = {"q": qk, "k": qk, "v": tile(kind, 16, dim), "out": "*" + kind, "flags": "*i32", "q_scale": "*fp32"}
    signature |= {"k_scale": "*fp32", "queries": "i32", "keys": "i32", "heads": "i32", "scale": "fp32"}
    chosen = {"DIM": dim, "INT8": int8, "ANCHORED": anchored, "GROUPS": cut.groups, "STAGES": cut.stages}
    chosen["EARLY"] = cut.early
    source = GluonASTSource(hopper.attend, {**signature, **dict.fromkeys(chosen, "constexpr")}, chosen)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = built.asm["ptx"]
    counts = [ptx.count(word) for word in ("wgmma.mma_async", ".s8.s8", "cvt.rn.f32.s32")]
    found.append([*counts, built.metadata.shared])
print(json.dumps(found))
"""


def test_it_compiles_to_what_it_is_for(tmp_path: Path) -> None:
    """Asynchronous products of bf16, int8 and fp16; no conversion of an integer score; within 227 KiB."""
    if importlib.util.find_spec("triton.experimental") is None:
        pytest.skip("this Triton has no Gluon")
    # In a process of its own: the tests beside it run Triton's interpreter.
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    exact, int8, half = json.loads(told.stdout.splitlines()[-1])
    assert exact[0] > 0 and half[0] > 0 and exact[1] == half[1] == 0
    assert int8[1] > 0 and int8[0] > int8[1] and int8[2] == 0
    assert all(shared <= 227 * 1024 for *_, shared in (exact, int8, half))
