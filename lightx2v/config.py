"""How a model is run and what is asked of it, frozen. What a checkpoint is stands in its family's own config."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

DTYPES = ("auto", "bf16", "fp16", "fp32")
OFFLOADS = ("none", "model", "block", "auto")
CACHES = ("none", "teacache", "magcache")
CACHE_THRESHOLDS = {"none": 0.0, "teacache": 0.15, "magcache": 0.24}  # LightX2V pipeline.py, enable_cache
QUANTS = ("auto", "none", "fp8", "int8", "nvfp4", "mxfp8")
SCHEDULERS = ("unipc", "euler", "distilled")
EXCHANGES = ("exact", "fp8")


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError naming the choices unless value is one of them."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Parallel:
    """One video on several devices, one process each; every process holds the whole model.

    ulysses: processes that exchange heads for tokens around attention (arXiv:2309.14509); divides the heads.
    ring: processes that pass keys and values on in a ring (arXiv:2310.01889); any number. Both shard the tokens.
    cfg: 2 computes the conditional and the unconditional pass of guidance at the same time, on one half each.
    exchange: how queries, keys and values travel: "exact" as they are, "fp8" in 8 bits with a scale a head and token.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    exchange: str = "exact"

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 (off) or more processes")
        if self.cfg not in (1, 2):
            raise ValueError(f"cfg={self.cfg} must be 1 (off) or 2: guidance has two passes")
        one_of("exchange", self.exchange, EXCHANGES)

    @property
    def sequence(self) -> int:
        """Processes that share the tokens of one pass."""
        return self.ulysses * self.ring

    @property
    def size(self) -> int:
        """All processes."""
        return self.sequence * self.cfg

    def describe(self) -> str:
        """In words, "ulysses 4 x cfg 2"; "one device" for none."""
        sizes = {"ulysses": self.ulysses, "ring": self.ring, "cfg": self.cfg}
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
        return told if self.exchange == "exact" else f"{told}, {self.exchange} exchange"


@dataclass(frozen=True)
class Engine:
    """Resolved once, when the model is built. attention: "auto", "exact" or a backend of attention.

    offload: where weights wait. "none": on the GPU, and of two experts one in RAM. "model": in RAM, all visit the GPU
        together. "block": in RAM, and pass through the GPU block by block. "auto": on the GPU as far as they fit.
    vram_budget_gb: GB of GPU memory that "block" and "auto" may take, 0 for the least and for all that is free.
    vae_offload: the VAE waits in RAM too.
    quant: in what the linear layers of blocks multiply, see `lightx2v.quant.packing`. "auto": packed weights of a file
        stay packed where the device has a kernel for them; "none": they are restored; "fp8", "int8", "nvfp4", "mxfp8":
        any file's are so.
    linear: "auto" or a backend of `int8_linear` and the others in lightx2v_kernels.linear.
    ram_budget_gb: GB of RAM in which weights may rest that pass through the GPU, 0 for all that is free; the rest of
        them is read from the file each time.
    parallel: several devices for one video; needs a `lightx2v.parallel.mesh.Mesh` where a model is built and run.
    """

    attention: str = "auto"
    dtype: str = "auto"  # compute and storage dtype of the transformer
    offload: str = "none"
    vram_budget_gb: float = 0.0
    vae_offload: bool = False
    quant: str = "auto"
    linear: str = "auto"
    ram_budget_gb: float = 0.0
    parallel: Parallel = Parallel()

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("quant", self.quant, QUANTS)
        one_of("offload", self.offload, OFFLOADS)
        if not 0 <= self.vram_budget_gb < float("inf"):
            raise ValueError(f"vram_budget_gb={self.vram_budget_gb} must be 0 (no limit of its own) or more; 8 is 8 GB")
        if not 0 <= self.ram_budget_gb < float("inf"):
            raise ValueError(f"ram_budget_gb={self.ram_budget_gb} must be 0 (all that is free) or more; 16 is 16 GB")


@dataclass(frozen=True)
class Cache:
    """Which steps may reuse the result of an earlier one.

    threshold: the error that may add up before a step is computed again; 0 computes every step; None: what is usual for
        the checkpoint, or for the method.
    use_ret_steps: TeaCache: compute the first 5 steps, and read the projected embedding.
    max_skips: MagCache: steps skipped in a row at most.
    retention_ratio: MagCache: share of the steps computed at the start.
    figures: "" takes the checkpoint's own; or the name of published ones, or a .cache.json.
    """

    method: str = "none"
    threshold: float | None = None
    use_ret_steps: bool = False
    max_skips: int = 6
    retention_ratio: float = 0.2
    figures: str = ""

    def __post_init__(self) -> None:
        one_of("cache method", self.method, CACHES)
        if self.threshold is not None and not 0 <= self.threshold <= 10:
            raise ValueError(f"cache threshold={self.threshold} must be from 0 (off) to 10; 0.05 to 0.3 is usual")
        if self.max_skips < 0:
            raise ValueError(f"max_skips={self.max_skips} must be 0 or more steps; 2 to 6 is usual")
        if not 0 <= self.retention_ratio <= 1:
            raise ValueError(
                f"retention_ratio={self.retention_ratio} is a share of the steps from 0 to 1; 0.2 is usual"
            )

    def limit(self, usual: Mapping[str, float]) -> float:
        """The threshold in use. usual: method -> a checkpoint's own, without use_ret_steps."""
        if self.threshold is not None:
            return self.threshold
        general = CACHE_THRESHOLDS[self.method]
        return general if self.use_ret_steps else usual.get(self.method, general)


@dataclass(frozen=True)
class Sampling:
    """One pass of the sampler over (part of) a schedule."""

    seed: int = 0
    steps: int = 50
    cfg_scale: float = 5.0  # 1 turns guidance off and halves the work
    cfg_low: float | None = None  # of the low-noise expert, where there are two; None: cfg_scale
    boundary: float | None = None  # noise level of the change of experts; None: what the model was trained with
    boundary_step: int | None = None  # or the number of steps that the high-noise expert has
    shift: float = 5.0
    scheduler: str = "unipc"
    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)  # of "distilled", which ignores steps
    start_step: int = 0
    end_step: int | None = None  # None: to the end; less leaves noise in the latents for the next sampler
    add_noise: bool = True  # False: the latents already carry the noise of start_step

    def __post_init__(self) -> None:
        one_of("scheduler", self.scheduler, SCHEDULERS)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional pass."""
        return self.cfg_scale != 1 or self.cfg_low not in (None, 1)


@dataclass(frozen=True)
class Request:
    """What a user asks for. Sizes are pixels and frames of the finished video."""

    prompt: str
    negative_prompt: str = ""
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    sampling: Sampling = field(default_factory=Sampling)
