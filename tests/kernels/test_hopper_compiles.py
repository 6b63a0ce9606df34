"""Gluon's kernels cannot run in Triton's interpreter: here they are at least compiled, which needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

CONVOLUTION = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from lightx2v_kernels.conv3d import _gluon

found = []
cube, phases, aligned = (3, 3, 3), (1, 2, 2), {(i,): [["tt.divisibility", 16]] for i in range(6)}
for c, out, kernel, n, more, sm in ((24, 24, cube, 16, 8, 90), (48, 24, phases, 16, 8, 80), (24, 3, cube, 8, 0, 89)):
    signature = dict.fromkeys(("x", "past", "weight", "bias", "residual", "out"), "*bf16")
    signature |= dict.fromkeys(("frames", "height", "width"), "i32")
    kt, kh, kw = kernel
    chosen = dict(C=c, OUT=out, KT=kt, KH=kh, KW=kw, PAST=kt > 1, RESIDUAL=kt > 1, RELU=True, DOUBLED=kh == 2)
    chosen |= dict(BLOCK_M=128, BLOCK_N=n, MORE_N=more, LINES=8, AT_ONCE=3)
    signature |= dict.fromkeys(chosen, "constexpr")
    source = GluonASTSource(_gluon.convolve, signature, chosen, aligned)
    built = compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 4})
    ptx = built.asm["ptx"]
    loop = ptx[ptx.index("ld.global.v4"):ptx.rindex("mma.sync")]
    found.append([ptx.count("mma.sync"), loop.count("ld.global.v4"), loop.count("ld.shared")])
print(json.dumps(found))
"""


def compiled(script: str, place: Path) -> Any:
    """What the script prints, run in a process of its own: the tests beside it run Triton's interpreter."""
    if importlib.util.find_spec("triton.experimental") is None:
        pytest.skip("this Triton has no Gluon")
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "TRITON_CACHE_DIR": str(place)}
    environment |= {"PATH": os.environ["PATH"], "HOME": str(place)}
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout.splitlines()[-1])


def test_few_channels_go_straight_into_registers(tmp_path: Path) -> None:
    """Sixteen bytes a load, nothing through shared memory before the last product; steps x places x channels."""
    for (products, loads, shared), steps, tiles in zip(
        compiled(CONVOLUTION, tmp_path), (3, 3, 3), (3, 3, 1), strict=True
    ):
        assert products == steps * 2 * 2 * tiles and loads >= steps * (4 + tiles) and shared == 0


def test_it_compiles_to_what_it_is_for(tmp_path: Path) -> None:
    """Asynchronous products of bf16, int8 and fp16; no conversion of an integer score; within 227 KiB."""
    exact, int8, half = compiled(COMPILE, tmp_path)
    assert exact[0] > 0 and half[0] > 0 and exact[1] == half[1] == 0
    assert int8[1] > 0 and int8[0] > int8[1] and int8[2] == 0
    assert all(shared <= 227 * 1024 for *_, shared in (exact, int8, half))
