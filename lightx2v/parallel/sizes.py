"""LightX2V's names for several GPUs."""

from collections.abc import Mapping
from typing import Any

from lightx2v.config import Parallel

KINDS = ("ulysses", "ring")
SAME = {"ulysses-4090": "ulysses"}  # the same exchange over other connections, which NCCL chooses by itself


def named(
    cfg_p_size: int, seq_p_size: int, seq_p_attn_type: str, ulysses_p_size: int | None = None, exchange: str = "exact"
) -> Parallel:
    """Arguments of `LightX2VPipeline.enable_parallel`. Raises ValueError for a name or sizes that do not work."""
    kind = SAME.get(seq_p_attn_type, seq_p_attn_type)
    if kind not in KINDS:
        raise ValueError(
            f"seq_p_attn_type={seq_p_attn_type!r} is not supported; known: {', '.join((*KINDS, *SAME))}, and "
            "ulysses_p_size for both at once"
        )
    usual = seq_p_size if kind == "ulysses" else 1
    ulysses = usual if ulysses_p_size is None else ulysses_p_size
    if ulysses < 1 or seq_p_size < 1 or seq_p_size % ulysses:
        raise ValueError(
            f"seq_p_size={seq_p_size}, ulysses_p_size={ulysses}: the second must divide the first; what is left is the "
            "size of the ring"
        )
    return Parallel(ulysses, seq_p_size // ulysses, cfg_p_size, exchange)


# Keys inside a file's "parallel" that change nothing here -> why.
IDLE = {
    "vae_parallel": "frames are decoded as docs/parallel.md says",
    "seq_p_head_parallel": "exchanges are laid out as docs/parallel.md says",
    "seq_p_tensor_fusion": "queries, keys and values always travel together",
    "seq_p_prepost_backend": "kernels are chosen by themselves",
    "seq_p_a2a_backend": "NCCL chooses its connections",
}
SIZES = ("cfg_p_size", "seq_p_size", "tensor_p_size")
QUANTISED = ("seq_p_fp8_comm", "seq_p_quant_scheme", "seq_p_fp4_comm")
KNOWN = (*SIZES, "seq_p_attn_type", *QUANTISED, "tp_load_mode", *IDLE)


def of_file(told: Mapping[str, Any]) -> dict[str, Any]:
    """A file's "parallel" as arguments of enable_parallel; raises ValueError for what cannot be honoured."""
    for key, value in told.items():
        if key not in KNOWN:
            raise ValueError(f"{key!r} is no key of parallel; it has {', '.join(KNOWN)}")
        if key in SIZES and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f"{key}={value!r}: expected a number of processes, 1 or more")
    if told.get("tensor_p_size", 1) != 1:
        raise ValueError(
            f"tensor_p_size={told['tensor_p_size']}: layers are not split between GPUs; the nearest is seq_p_size"
        )
    scheme = told.get("seq_p_quant_scheme") or ("fp8" if told.get("seq_p_fp8_comm") else None)
    if told.get("seq_p_fp4_comm") or scheme not in (None, "fp8"):
        raise ValueError("tokens are not exchanged in 4 bits; the nearest is seq_p_quant_scheme 'fp8'")
    given = {key: told[key] for key in ("cfg_p_size", "seq_p_size", "seq_p_attn_type") if key in told}
    named(**{"cfg_p_size": 1, "seq_p_size": 1, "seq_p_attn_type": "ulysses", **given})
    return {**given, **({"exchange": scheme} if scheme else {})}
