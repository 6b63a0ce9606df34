"""How a model is run and what is asked of it, frozen. What a checkpoint is stands in its family's own config."""

from collections.abc import Collection
from dataclasses import dataclass, field

DTYPES = ("auto", "bf16", "fp16", "fp32")
OFFLOADS = ("none", "model")
SCHEDULERS = ("unipc", "euler", "distilled")


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError naming the choices unless value is one of them."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Engine:
    """Resolved once, when the model is built. attention: "auto" or a backend of lightx2v_kernels.attention."""

    attention: str = "auto"
    dtype: str = "auto"  # compute and storage dtype of the transformer
    offload: str = "none"  # "model": weights wait on the CPU and visit the GPU for their stage

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("offload", self.offload, OFFLOADS)


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
