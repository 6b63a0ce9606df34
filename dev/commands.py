"""The commands of dev.py."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dev import browser, comfyui
from dev.environment import ENGINE, HOST, PAGE, REPOSITORY, TEST, prepare

DEMO_MODELS = REPOSITORY / "demo" / "models"
DEMO_MODEL = DEMO_MODELS / "wan2.1_t2v"
SECOND = {"host", "parallel", "parity", "ui"}  # of the folders of tests: about half of their time
FAST = "not host and not ui and not gpu and not weights"


@dataclass(frozen=True)
class Demo:
    """One way to make a video with the small models. steps None: the model's own, which cannot be changed.

    prompt: of demo/grammar.py. flags: of `lightx2v generate`.
    """

    about: str
    prompt: str
    steps: int | None
    flags: Mapping[str, object]


DEMOS = {
    "t2v": Demo("text to video", "a red circle moves right over a white background", 20, {"guidance_scale": 4}),
    "i2v": Demo(
        "image to video",
        "a green square moves right over a white background",
        20,
        {
            "task": "i2v",
            "dit_original_ckpt": DEMO_MODELS / "variants" / "wan_i2v_fp8_scaled.safetensors",
            "resize_mode": "fixed_shape",
            "guidance_scale": 2.5,
        },
    ),
    "moe": Demo(
        "text to video with two experts",
        "a blue triangle moves up over a gray background",
        20,
        {
            "model_cls": "wan2.2_moe",
            "high_noise_original_ckpt": DEMO_MODELS / "variants" / "wan_t2v_high_noise_fp8_e4m3.safetensors",
            "low_noise_original_ckpt": DEMO_MODEL / "diffusion_pytorch_model.safetensors",
            "guidance_scale": (4, 3),
        },
    ),
    "4step": Demo(
        "text to video in four steps, by a LoRA",
        "a yellow cross moves down left over a navy background",
        None,
        {
            "model_cls": "wan2.1_distill",
            "lora": DEMO_MODELS / "loras" / "wan_t2v_4steps_lora_rank16.safetensors",
            "guidance_scale": 1,
        },
    ),
    "hunyuan": Demo(
        "text to video with HunyuanVideo-1.5",
        "a blue square moves down over a white background",
        20,
        {
            "model_path": DEMO_MODELS / "hunyuan_video_15",
            "model_cls": "hunyuan_video_1.5",
            "fps": 16,
            "guidance_scale": 4,
        },
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    verbatim: dict[str, Callable[[Sequence[str]], int]] = {"test": _test, "bench": _bench, "run": _run}
    name, rest = next(iter(arguments), ""), arguments[1:]
    try:
        if name in verbatim and rest[:1] not in (["-h"], ["--help"]):
            return verbatim[name](rest)
        options, rest = _parser().parse_known_args(arguments)
        if rest and name != "host":
            _parser().error(f"unknown arguments: {' '.join(rest)}")
        status: int = options.command(options, rest)
    except KeyboardInterrupt:
        status = 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Everything there is to do in this repository. What a command needs is installed into .venv once.",
        epilog="Environment: LIGHTX2V_VENV (another virtual environment), COMFYUI_PATH (a ComfyUI of your own), "
        "CHROMIUM_PATH, and pip's own settings.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, about: str, usage: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)

    demo = add("demo", "make a video with the small models that come with the pack")
    kinds = "; ".join(f"{name}: {entry.about}" for name, entry in DEMOS.items())
    demo.add_argument("kind", nargs="?", choices=DEMOS, default="t2v", help=f"{kinds}; default: %(default)s")
    demo.add_argument("--prompt", help="a sentence of docs/demo.md; each kind has one of its own")
    demo.add_argument("--image", type=Path, help="i2v: the first frame; default: one is drawn for the prompt")
    demo.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    demo.add_argument("--steps", type=int, help="default: 20; 4step takes none")
    demo.add_argument("--out", type=Path, help="default: out/demo.mp4, out/demo_i2v.mp4, ...")
    demo.set_defaults(command=_demo)
    add("test", "ruff, mypy and every test; with arguments: only pytest, with them", "dev.py test [PYTEST ARGUMENTS]")
    check = add("check", "ruff, mypy and the tests that need no ComfyUI, browser or GPU")
    check.set_defaults(command=_check)
    host = add("host", "start ComfyUI with the pack and its small models; further arguments go to ComfyUI")
    host.add_argument("--port", type=int, default=8188, help="default: %(default)s")
    host.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s")
    host.set_defaults(command=_host)
    about_bench = "measure the kernels, or a whole network: python -m benchmarks.kernels (model: compare) ARGUMENTS"
    add("bench", about_bench, "dev.py bench [model] ARGUMENTS")
    about_run = "python ARGUMENTS in the environment, as in: dev.py run -m lightx2v doctor"
    add("run", about_run, "dev.py run ARGUMENTS")
    return parser


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> int:
    demo = DEMOS[options.kind]
    if options.image and options.kind != "i2v":
        _parser().error(f"demo {options.kind} starts from no picture: demo i2v takes --image")
    if options.steps and demo.steps is None:
        _parser().error(f"demo {options.kind} has a fixed number of steps: leave --steps out")
    _require_models(demo)
    python = prepare(ENGINE)
    suffix = "" if options.kind == "t2v" else f"_{options.kind}"
    out = (options.out or REPOSITORY / "out" / f"demo{suffix}.mp4").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    prompt = options.prompt or demo.prompt
    settings = _demo_settings(demo, prompt, options, out)
    if options.kind == "i2v":
        image = options.image and options.image.resolve()
        if image is None:
            image = out.with_name(f"{out.stem}_start.png")
            drawing = ["--prompt", prompt, "--seed", str(options.seed), "--first", str(image)]
            if status := _python(python, "-m", "demo.picture", *drawing):
                return status
        settings["image_path"] = image
    start = time.monotonic()
    status = _python(python, "-m", "lightx2v", "generate", *_flags(settings))
    if status == 0:
        print(f"{demo.about}: made in {time.monotonic() - start:.0f} s. Open {out}")
    return status


def _require_models(demo: Demo) -> None:
    """SystemExit unless the demo's files are there."""
    for path in (DEMO_MODEL, *(value for value in demo.flags.values() if isinstance(value, Path))):
        if not path.exists():
            raise SystemExit(f"{path} is missing; `git checkout -- demo/models` brings it back")


def _demo_settings(demo: Demo, prompt: str, options: argparse.Namespace, out: Path) -> dict[str, object]:
    """Flags of `lightx2v generate` without their dashes."""
    steps = {} if demo.steps is None else {"infer_steps": options.steps or demo.steps}
    size = {"height": 128, "width": 128, "num_frames": 17, "sample_shift": 5}
    asked = {"model_path": DEMO_MODEL, "prompt": prompt, "seed": options.seed, "save_result_path": out}
    return {**asked, **size, **steps, **demo.flags}


def _flags(settings: Mapping[str, object]) -> list[str]:
    """{"seed": 3, "guidance_scale": (4, 3)} -> ["--seed", "3", "--guidance_scale", "4", "3"]."""
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _test(rest: Sequence[str]) -> int:
    python = prepare(ENGINE, HOST, PAGE, TEST)
    comfyui.fetch_comfyui(python)
    browser.fetch_browser()
    if rest:
        return _pytest(python, *rest)
    return _lint(python) or _halves(python)


def _check(options: argparse.Namespace, rest: Sequence[str]) -> int:
    python = prepare(ENGINE, HOST, TEST)
    return _lint(python) or _pytest(python, "-m", FAST)


def _host(options: argparse.Namespace, rest: Sequence[str]) -> int:
    python = prepare(ENGINE, HOST, PAGE)
    root = comfyui.fetch_comfyui(python)
    base = comfyui.HOST / "base"
    comfyui.make_base(base, {comfyui.PACK_NAME: REPOSITORY}, comfyui.demo_models())
    address = "127.0.0.1" if options.listen == "0.0.0.0" else options.listen
    print(f"Starting ComfyUI on http://{address}:{options.port} (Ctrl+C ends it); its files are in {base}", flush=True)
    line = comfyui.command(python, root, base, listen=options.listen, port=options.port, extra=rest)
    return _become(line, os.environ)


def _bench(rest: Sequence[str]) -> int:
    module, rest = ("benchmarks.compare", rest[1:]) if rest[:1] == ["model"] else ("benchmarks.kernels", rest)
    return _become([str(prepare(ENGINE)), "-m", module, *rest], _with_repository())


def _run(rest: Sequence[str]) -> int:
    return _become([str(prepare(ENGINE)), *rest], _with_repository())


def _lint(python: Path) -> int:
    """Style, layout and types; stops at the first that complains."""
    for line in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)):
        print(f"== {' '.join(line)}", flush=True)
        if status := _python(python, "-m", *line, cwd=REPOSITORY):
            return status
    return 0


def _halves(python: Path) -> int:
    """All tests, in two processes side by side: those that start ComfyUI or several processes, beside all others."""
    folders = {path.name for path in (REPOSITORY / "tests").iterdir() if any(path.glob("test_*.py"))}
    # Each with half of the cores: threads of two processes that wait for one core take ten times as long.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), **os.environ}
    status = 0
    with tempfile.TemporaryDirectory() as logs, ExitStack() as files:
        running = []
        for number, half in enumerate((folders & SECOND, folders - SECOND)):
            log = files.enter_context((Path(logs) / f"{number}.log").open("w+", encoding="utf-8", errors="replace"))
            line = [str(python), "-m", "pytest", *(f"tests/{name}" for name in sorted(half))]
            print(f"== {' '.join(line[2:])}", flush=True)
            process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running.append((process, line, log))
        for process, line, log in running:
            status = process.wait() or status
            log.seek(0)
            print(f"== {' '.join(line[2:])}\n{log.read()}", flush=True)
    return status


def _pytest(python: Path, *arguments: str) -> int:
    """Tests, from the repository root; paths among the arguments are relative to it."""
    print("== pytest", flush=True)
    paths = any((REPOSITORY / argument.split("::")[0]).exists() for argument in arguments)
    os.chdir(REPOSITORY)
    return _become([str(python), "-m", "pytest", *([] if paths else ["tests"]), *arguments], os.environ)


def _python(python: Path, *arguments: str, cwd: Path | None = None) -> int:
    return subprocess.run([str(python), *arguments], cwd=cwd, env=_with_repository()).returncode


def _become(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Give this process over to `line`, a command's last act: signals and the exit status are then its own."""
    sys.stdout.flush()
    if sys.platform == "win32":
        # There is no exec on Windows that the caller would wait for.
        return subprocess.run(line, env=environment).returncode
    os.execve(line[0], list(line), environment)


def _with_repository() -> dict[str, str]:
    """This process's environment, with this repository's packages importable from whatever folder."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
