"""The command line: `python -m lightx2v generate | calibrate | quantize | inspect | doctor | bench`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightx2v.bench.command import add_arguments as add_bench
from lightx2v.bench.command import run as run_bench
from lightx2v.cache.calibration import PROMPTS
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import DTYPES, EXCHANGES, OFFLOADS, QUANTS, SCHEDULERS
from lightx2v.parallel.agreement import StoppedElsewhereError
from lightx2v.parallel.mesh import launched
from lightx2v.schedules import parse_step_list
from lightx2v_kernels import UnsupportedBackendError

if TYPE_CHECKING:
    from lightx2v.pipeline import LightX2VPipeline

EPILOG = (
    "`lightx2v COMMAND --help` lists the flags of a command. Exit status: 0, or 1 after a line that says what to do."
)
ROLES = {"high": "high_noise_model", "low": "low_noise_model"}


def _pipeline(args: argparse.Namespace, cache: Mapping[str, Any] | None = None) -> "LightX2VPipeline":
    """cache: arguments of enable_cache; None leaves that to the config file."""
    from lightx2v.pipeline import LightX2VPipeline

    pipe = LightX2VPipeline(
        args.model_path,
        args.model_cls,
        args.task,
        dit_original_ckpt=args.dit_original_ckpt,
        low_noise_original_ckpt=args.low_noise_original_ckpt,
        high_noise_original_ckpt=args.high_noise_original_ckpt,
        transformer_model_name=args.transformer_model_name,
        device=args.device,
    )
    if args.vae_path or args.tae_path:
        pipe.enable_lightvae(vae_path=args.vae_path, use_tae=bool(args.tae_path), tae_path=args.tae_path)
    if args.offload or args.vram_budget_gb or args.ram_budget_gb:
        how, budgets = args.offload or "auto", {"vram": args.vram_budget_gb, "ram": args.ram_budget_gb}
        named = {f"{name}_budget_gb": budget for name, budget in budgets.items()}
        pipe.enable_offload(how != "none", "auto" if how == "none" else how, **named)
    if args.quant == "none":
        pipe.enable_quantize(quant_scheme="none")
    elif args.quant not in (None, "auto"):
        pipe.enable_quantize(dit_quantized=True, quant_scheme=args.quant)
    if args.lora:
        pipe.enable_lora([parse_lora(text) for text in args.lora])
    if cache is not None:
        pipe.enable_cache(**cache)
    _spread(pipe, args)
    scale = args.guidance_scale
    told = {
        "config_json": args.config_json,
        "attn_mode": args.attn_mode,
        "infer_steps": args.infer_steps,
        "height": args.height,
        "width": args.width,
        "num_frames": args.num_frames,
        "guidance_scale": scale[0] if scale and len(scale) == 1 else scale,
        "sample_shift": args.sample_shift,
        "fps": args.fps,
        "denoising_step_list": args.denoising_step_list and parse_step_list(args.denoising_step_list),
        "boundary": args.boundary,
        "boundary_step_index": args.boundary_step_index,
        "resize_mode": args.resize_mode,
        "scheduler": args.scheduler,
        "dtype": args.dtype,
    }
    # What is left out is the file's to say, or else the pipeline's own default.
    pipe.create_generator(**{name: value for name, value in told.items() if value is not None})
    if (launch := launched()) and launch.size > 1 and pipe._engine.parallel.size == 1:
        raise ValueError(
            f"{launch.size} processes were started and none was given a part: give --ulysses {launch.size}, --ring or "
            "--cfg_parallel, or start one process"
        )
    return pipe


def _spread(pipe: "LightX2VPipeline", args: argparse.Namespace) -> None:
    halves, sequence = 2 if args.cfg_parallel else 1, args.ulysses * args.ring
    if halves * sequence > 1:
        pipe.enable_parallel(halves, sequence, ulysses_p_size=args.ulysses, exchange=args.exchange)
    elif args.exchange != "exact":
        raise ValueError(f"--exchange {args.exchange} without several processes: give --ulysses or --ring")


def _cache(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the flags say of a cache, as enable_cache takes it; None where they say nothing."""
    told = {
        "figures": args.cache_figures,
        "teacache_thresh": args.teacache_thresh,
        "use_ret_steps": args.use_ret_steps,
        "magcache_K": args.magcache_K,
        "magcache_thresh": args.magcache_thresh,
        "magcache_retention_ratio": args.magcache_retention_ratio,
    }
    given = {name: value for name, value in told.items() if value is not None}
    if args.cache_method is None and given:
        raise ValueError(f"{', '.join(given)} without a cache: give --cache_method Tea or --cache_method Mag")
    return None if args.cache_method is None else {"cache_method": args.cache_method, **given}


def generate(args: argparse.Namespace) -> None:
    """One video from a prompt."""
    pipe = _pipeline(args, _cache(args))
    pipe.generate(
        args.seed,
        args.prompt,
        args.negative_prompt,
        args.save_result_path,
        image_path=args.image_path,
        last_frame_path=args.last_frame_path,
        progress=not args.quiet,
    )
    if not _first():
        return
    described = pipe.describe(args.image_path or args.last_frame_path)
    print(f"{args.save_result_path}: {described}, seed {args.seed}, prompt: {args.prompt}")
    for line in pipe.report.text().splitlines():
        print(f"  {line}")


def calibrate(args: argparse.Namespace) -> None:
    """Measure a model for its feature caches; a .cache.json next to each transformer."""
    prompts, images = args.prompt or PROMPTS, {"image_path": args.image_path, "last_frame_path": args.last_frame_path}
    written = _pipeline(args).calibrate(prompts, args.seed, args.negative_prompt, **images, progress=not args.quiet)
    for path in written if _first() else ():
        print(f"{path}: measured on {len(prompts)} prompts")


def quantize(args: argparse.Namespace) -> None:
    """A transformer's checkpoint as a file in 8 or 4 bits."""
    import torch

    from lightx2v.quant.writing import write_quantised

    device = torch.device(args.device)
    options = {"force": args.force, "device": device, "progress": not args.quiet}
    made = write_quantised(args.source, args.target, args.scheme, args.layout, **options)
    sizes = f"{made.before / 1e9:.2f} GB became {made.after / 1e9:.2f}"
    print(f"{args.target}: {made.layers} layers in {args.scheme}, {sizes}")


def _first() -> bool:
    """Whether this process speaks for all that make the video."""
    launch = launched()
    return launch is None or launch.rank == 0


def parse_lora(text: str) -> dict[str, object]:
    """PATH[:STRENGTH[:high|low]] as `LightX2VPipeline.enable_lora` takes it.

    Read from the right, so that the colon of C:\\lora.safetensors stays in the path. Raises ValueError where no such
    file exists.
    """
    config: dict[str, object] = {}
    path, whole = text, Path(text).exists()
    head, _, last = path.rpartition(":")
    if not whole and head and last in ROLES:
        path, config = head, {"name": ROLES[last]}
        head, _, last = path.rpartition(":")
    if not whole and len(head) > 1 and _is_number(last):
        path, config = head, {"strength": float(last), **config}
    if not Path(path).exists():
        raise ValueError(f"--lora {text}: there is no file {path}; write PATH, PATH:STRENGTH or PATH:STRENGTH:high")
    return {"path": path, **config}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightx2v", description="Video diffusion with Wan2.1 and Wan2.2.", epilog=EPILOG
    )
    parser.add_argument("--verbose", action="store_true", help="log what the engine decides")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("generate", help="make one video")
    command.set_defaults(run=generate)
    _add_model(command.add_argument_group("model"))
    request = command.add_argument_group("what to make")
    request.add_argument("--prompt", required=True)
    saved = "an .mp4; FOLDER/ or clip_%%04d.png for a picture a frame; a .safetensors or .npy; default: %(default)s"
    request.add_argument("--save_result_path", default="lightx2v_gen_result.mp4", help=saved)
    _add_request(request)
    _add_sampling(command.add_argument_group("how to make it"))
    _add_cache(command.add_argument_group("which steps may reuse earlier results"))

    command = commands.add_parser("calibrate", help="measure a model for its feature caches")
    command.set_defaults(run=calibrate)
    _add_model(command.add_argument_group("model"))
    request = command.add_argument_group("what to make while measuring")
    request.add_argument("--prompt", action="append", help="may be given several times; default: four of its own")
    _add_request(request)
    _add_sampling(command.add_argument_group("how to make it: as it will be used"))

    command = commands.add_parser("quantize", help="write a transformer as a file in 8 or 4 bits")
    command.set_defaults(run=quantize)
    command.add_argument("source", type=Path, help="a transformer in bf16, fp16 or fp32, file or folder")
    command.add_argument("target", type=Path, help="the .safetensors file to write")
    command.add_argument("--scheme", choices=QUANTS[2:], default="fp8", help="default: fp8")
    layout = "whose files it is to be like: ComfyUI reads comfy, no int8; default: lightx2v"
    command.add_argument("--layout", choices=("lightx2v", "comfy"), default="lightx2v", help=layout)
    command.add_argument("--force", action="store_true", help="replace a file that is there")
    command.add_argument("--device", default="cpu", help="where to compute: cpu (default), cuda")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    reports = {
        "inspect": "say what a checkpoint is",
        "config": "say what one of LightX2V's JSON files becomes, key by key",
        "doctor": "say what this machine can run, and what a model folder holds",
        "workflow": "queue a workflow on a ComfyUI server and fetch what it makes",
    }
    for name, what in reports.items():
        command = commands.add_parser(name, help=what)
        module = importlib.import_module(f"lightx2v.commands.{name}")
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    command = commands.add_parser("bench", help="time a network with random weights: no checkpoint is needed")
    command.set_defaults(run=run_bench)
    add_bench(command)
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model_path", required=True, help="folder with transformer, encoders and VAE")
    classes = (
        "wan2.1, wan2.2 (TI2V-5B), wan2.2_moe (A14B), hunyuan_video_1.5; for 4-step models wan2.1_distill, "
        "wan2.2_moe_distill, hunyuan_video_1.5_distill"
    )
    group.add_argument("--model_cls", default="wan2.1", help=classes)
    group.add_argument("--task", default="t2v", help="t2v, i2v or flf2v (first and last frame)")
    group.add_argument("--transformer_model_name", help="of several of HunyuanVideo-1.5 in one folder: 480p_t2v ...")
    group.add_argument("--dit_original_ckpt", help="a transformer in place of the folder's, file or folder")
    group.add_argument("--high_noise_original_ckpt", help="of two experts the one for the first steps")
    group.add_argument("--low_noise_original_ckpt", help="of two experts the one for the other steps")
    group.add_argument("--vae_path", help="a VAE or LightVAE in place of the folder's")
    group.add_argument("--tae_path", help="a tiny autoencoder that decodes: fast, less exact")
    shape = "PATH[:STRENGTH[:high|low]]"
    group.add_argument(
        "--lora", action="append", metavar=shape, help="may be given several times; strength 1 as trained"
    )
    settings = "LightX2V's settings, instead of the defaults of the flags below; flags that are given win"
    group.add_argument("--config_json", help=settings)
    group.add_argument("--attn_mode", help="auto (default), exact, or a backend that `doctor` lists")
    group.add_argument("--dtype", choices=DTYPES, help="default: auto")
    quant = (
        "fp8, int8, nvfp4, mxfp8, also with a kernel, such as fp8-triton: in what the transformer's linear layers are, "
        "from a quantised file of the folder, or quantised as they are read; auto (default): as the file is, where the "
    )
    group.add_argument("--quant", metavar="SCHEME", help=f"{quant}GPU can; none: restored")
    waits = "auto: on the GPU as far as it fits; block: passes through it; model: visits it; none: stays; default: auto"
    group.add_argument("--offload", choices=OFFLOADS, default=None, help=waits)
    budget = "GB of the GPU that auto and block may take; default: all that is free, and the least"
    group.add_argument("--vram_budget_gb", type=float, default=0.0, metavar="GB", help=budget)
    ram = (
        "GB of RAM for weights that pass through the GPU; more of them is read from the file; default: all that is free"
    )
    group.add_argument("--ram_budget_gb", type=float, default=0.0, metavar="GB", help=ram)
    group.add_argument("--device", default=None, help="cuda, cuda:1, cpu; default: cuda where there is one")
    _add_parallel(group)


def _add_parallel(group: argparse._ArgumentGroup) -> None:
    under = "of several GPUs, under torchrun"
    shares = f"{under}: processes that share the tokens by exchanging heads; divides the model's heads"
    group.add_argument("--ulysses", type=int, default=1, metavar="N", help=shares)
    group.add_argument(
        "--ring", type=int, default=1, metavar="N", help=f"{under}: or by passing keys and values on; any number"
    )
    halves = f"{under}: both passes of guidance at once, each on one half of the processes"
    group.add_argument("--cfg_parallel", action="store_true", help=halves)
    eighth = "fp8 sends queries, keys and values between GPUs in 8 bits; default: exact"
    group.add_argument("--exchange", choices=EXCHANGES, default="exact", help=eighth)


def _add_request(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--negative_prompt", default="")
    group.add_argument("--image_path", help="the first frame, for i2v and flf2v")
    group.add_argument("--last_frame_path", help="the last frame, for flf2v")
    size = "pixels, a multiple of 16 (TI2V-5B: 32); with an image the two give the area and the image the proportions"
    group.add_argument("--height", type=int, help=f"default 480; {size}")
    group.add_argument("--width", type=int, help="default 832; see --height")
    group.add_argument(
        "--resize_mode", choices=("fixed_shape",), help="exactly --height and --width, cutting the image"
    )
    group.add_argument("--num_frames", type=int, help="4n + 1; default 81, HunyuanVideo-1.5 121")
    group.add_argument(
        "--fps", type=int, default=None, help="of the file; default: 16, TI2V-5B and HunyuanVideo-1.5 24"
    )
    group.add_argument("--seed", type=int, default=42)
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--infer_steps", type=int, help="default 50")
    cfg = "default 5, HunyuanVideo-1.5 6; 1 turns guidance off; two numbers: of the high- and of the low-noise expert"
    group.add_argument("--guidance_scale", type=float, nargs="+", metavar="SCALE", help=cfg)
    group.add_argument(
        "--sample_shift", type=float, help="default 5; of HunyuanVideo-1.5 5, at 720p 9 from text and 7 from an image"
    )
    group.add_argument("--scheduler", choices=SCHEDULERS, default=None, help="default: the model class's own")
    levels = (
        "default 1000,750,500,250: of the distilled scheduler, in thousandths before the shift; replaces --infer_steps"
    )
    group.add_argument("--denoising_step_list", help=levels)
    change = "noise level from 0 to 1 at which the experts change; default: the model's own"
    group.add_argument("--boundary", type=float, help=change)
    group.add_argument("--boundary_step_index", type=int, help="or the number of steps of the high-noise expert")


def _add_cache(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cache_method", choices=("None", "Tea", "Mag"), help="TeaCache or MagCache; default: None")
    figures = "a .cache.json or the name of published ones; default: the checkpoint's own"
    group.add_argument("--cache_figures", help=figures)
    more = "error that may add up before a step is computed again; 0 is off"
    group.add_argument("--teacache_thresh", type=float, help=f"default 0.15; {more}")
    group.add_argument("--use_ret_steps", action="store_true", default=None, help="TeaCache: compute the first 5 steps")
    group.add_argument("--magcache_thresh", type=float, help=f"default 0.24; {more}")
    group.add_argument("--magcache_K", type=int, help="default 6; steps skipped in a row at most")
    retention = "share of the steps computed at the start"
    group.add_argument("--magcache_retention_ratio", type=float, help=f"default 0.2; {retention}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one line on stderr about what to do."""
    args = _parser().parse_args(arguments)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level if _first() else logging.ERROR, format="%(message)s")
    try:
        status = args.run(args)
    except (
        CheckpointError,
        UnsupportedBackendError,
        ValueError,
        NotImplementedError,
        OSError,
        FloatingPointError,
    ) as error:
        launch = launched()
        process = f"process {launch.rank}: " if launch and launch.size > 1 else ""
        print(f"{process}error: {error}", file=sys.stderr)
        return 1
    except StoppedElsewhereError:
        return 1  # the process that stopped says why
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
