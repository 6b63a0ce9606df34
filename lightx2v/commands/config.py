"""`lightx2v config`: what one of LightX2V's JSON files becomes, key by key, and whether it can run."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightx2v.classes import model_class
from lightx2v.config_json import Reading, Told, model_facts, read_config
from lightx2v.config_keys import DEAD, HONOURED, MODEL, REFUSED
from lightx2v.config_survey import ABSENT, CANNOT, IDLE, RUNS, Survey, asked, shown, survey
from lightx2v_kernels import UnsupportedBackendError, registry

if TYPE_CHECKING:
    from lightx2v.pipeline import LightX2VPipeline

ORDER = (REFUSED, ABSENT, HONOURED, MODEL, DEAD, IDLE)
HEAD_DIM = 128  # of every Wan and HunyuanVideo-1.5
NOT_HERE = "cannot run on this machine"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="one of LightX2V's JSON files")
    command.add_argument("--model_path", type=Path, help="model folder: shows engine and request, and finds its files")
    command.add_argument("--model_cls", default="wan2.1", help="see `generate`; default: wan2.1")
    command.add_argument("--task", default="t2v", help="t2v, i2v or flf2v; default: t2v")
    command.add_argument("--attn_mode", help="an attention that wins over the file's")
    command.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda where there is one")
    command.add_argument("--json", action="store_true", help="one object")


def run(args: argparse.Namespace) -> int:
    """0 where the file can run here, else 1."""
    given = {"attn_mode": args.attn_mode} if args.attn_mode else {}
    found = _surveyed(args, given)
    problem = None if found.verdict == CANNOT else _problem(found.told, given, args.device)
    built: Mapping[str, Any] = {}
    if problem is None and found.verdict == RUNS and args.model_path:
        built, problem = _built(args, given)
    verdict = NOT_HERE if found.verdict == RUNS and problem is not None else found.verdict
    if args.json:
        keys = [asdict(finding) for kind in ORDER for finding in found.of(kind)]
        report = {"file": args.file, "verdict": verdict, "here": problem, "arguments": _arguments(found.told)}
        print(json.dumps({**report, **built, "keys": keys}, indent=2, default=str))
    else:
        print("\n".join(_lines(args.file, verdict, problem, found, built)))
    return 0 if verdict == RUNS else 1


def _surveyed(args: argparse.Namespace, given: Mapping[str, str]) -> Survey:
    model_class(args.model_cls, (args.task,))
    folders, facts = [args.file.parent], dict[str, Any]()
    if args.model_path:
        infos = _pipeline(args)._infos
        folders = [args.model_path, args.model_path.parent, *folders]
        facts = model_facts(infos[0]) if infos else {}
    return survey(Reading(args.file, read_config(args.file), facts, folders, given))


def _pipeline(args: argparse.Namespace) -> "LightX2VPipeline":
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline(args.model_path, args.model_cls, args.task, device=args.device)


def _problem(told: Told, given: Mapping[str, str], device: str | None) -> str | None:
    """Why the attention that is asked for cannot run here."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    try:
        name = given.get("attn_mode") or told.generator.get("attn_mode", "auto")
        registry.select("attention", name, place, dtype, HEAD_DIM)
    except UnsupportedBackendError as error:
        return str(error)
    return None


def _built(args: argparse.Namespace, given: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """Engine and request as the pipeline has them after the file, or why it refuses it."""
    pipe = _pipeline(args)
    try:
        pipe.create_generator(config_json=args.file, **given)  # type: ignore[arg-type]
    except (ValueError, UnsupportedBackendError, NotImplementedError) as error:
        return {}, str(error)
    return {"engine": asdict(pipe._engine), "request": asdict(pipe._request), "describe": pipe.describe()}, None


def _arguments(told: Told) -> dict[str, dict[str, Any]]:
    methods: dict[str, dict[str, Any]] = {}
    for name, value in asked(told):
        method, _, argument = name.partition(".")
        methods.setdefault(method, {})[argument] = value
    return methods


def _lines(file: Path, verdict: str, problem: str | None, found: Survey, built: Mapping[str, Any]) -> Iterator[str]:
    yield f"{file}: {verdict}"
    for kind in ORDER:
        for finding in found.of(kind):
            value = "" if finding.verdict in (REFUSED, ABSENT) else f"{finding.key} = {shown(finding.value)}: "
            yield f"  {finding.verdict:<9} {value}{finding.becomes}"
    if problem is not None:
        yield f"  here      {problem}"
    for name in ("engine", "request"):
        if name in built:
            yield f"  {name:<9} {', '.join(f'{key} {shown(value)}' for key, value in built[name].items())}"
