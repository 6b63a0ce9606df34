"""Worker processes, without ComfyUI: what they make, keep, measure and survive."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dev.environment import REPOSITORY
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Cache, Engine, Parallel, Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.lora import Lora, apply_loras
from lightx2v.parallel.devices import Shared, devices_of, share
from lightx2v.parallel.gain import Gain, of_depths
from lightx2v.parallel.jobs import Job, RankError, sendable
from lightx2v.parallel.workers import Workers
from lightx2v.sampling import Step
from lightx2v_kernels.registry import UnsupportedBackendError

MODELS = REPOSITORY / "demo" / "models"
T2V = MODELS / "wan2.1_t2v" / "diffusion_pytorch_model.safetensors"
LOW, HIGH = T2V, MODELS / "variants" / "wan_t2v_high_noise_fp8_e4m3.safetensors"
NIGHT = Lora(MODELS / "loras" / "wan_t2v_night_lora_rank8.safetensors")
FOUR = Lora(MODELS / "loras" / "wan_t2v_4steps_lora_rank16.safetensors")
CPU, ULYSSES = torch.device("cpu"), Parallel(ulysses=2)
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="worker processes need Linux")


def conditioning(seed: int) -> Conditioning:
    return Conditioning(torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed)))


def job(*paths: Path, parallel: Parallel = ULYSSES, **changes: Any) -> Job:
    """Three steps of a small video whose tokens two processes cannot share evenly."""
    engine = Engine(parallel=parallel, **changes.pop("engine", {}))
    start, sampling = Start(torch.zeros(1, 16, 3, 6, 10)), Sampling(seed=5, steps=3, cfg_scale=4.0)
    return replace(Job(paths, engine, (), start, sampling, conditioning(1), conditioning(2)), **changes)


def alone(job: Job) -> Tensor:
    """What one process makes of a job."""
    engine = replace(job.engine, parallel=Parallel(), offload="none")
    networks = []
    for path in job.transformers:
        networks.append(load_transformer(identify(path), engine, CPU))
        apply_loras(networks[-1], identify(path), job.loras)
    model = Model(identify(job.transformers[0]).spec, CPU, *((lambda network=each: network) for each in networks))
    return diffuse(model, job.start, job.sampling, job.cond, job.uncond)


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(["cpu", "cpu"])
    yield workers
    workers.close()


CASES: dict[str, Job] = {
    "plain": job(T2V),
    "guidance on halves": job(T2V, parallel=Parallel(cfg=2)),
    "a LoRA": job(T2V, loras=(NIGHT,)),
    "other LoRAs": job(T2V, loras=(replace(NIGHT, strength=0.5), FOUR)),
    "int8, blocks that pass, a LoRA": job(T2V, engine={"quant": "int8", "offload": "block"}, loras=(NIGHT,)),
    "two experts that take turns": job(HIGH, LOW, parallel=Parallel(ring=2), engine={"offload": "model"}),
}


@linux
def test_they_make_what_one_process_makes_and_stay(two: Workers) -> None:
    pids = set()
    for name, asked in CASES.items():
        steps: list[int] = []
        hooks = Hooks(lambda step, x0, steps=steps: steps.append(step.index))
        first, second = two.run(asked, hooks)
        assert steps == [0, 1, 2] and second.latents is None, name
        expected = alone(asked)
        assert (first.latents - expected).abs().max() < 1e-5 * expected.abs().max(), name
        pids.add(two.pids())
    assert len(pids) == 1
    assert any(line.startswith("LoRA: ") for line in two.run(CASES["a LoRA"], Hooks())[0].lines)


@linux
def test_errors_are_the_jobs_own_and_end_nothing(two: Workers, tmp_path: Path) -> None:
    two.run(CASES["plain"], Hooks())
    pids = two.pids()
    with pytest.raises(CheckpointError, match="no such file"):
        two.run(job(tmp_path / "gone.safetensors"), Hooks())
    with pytest.raises(UnsupportedBackendError, match="warp_drive"):
        two.run(job(T2V, engine={"attention": "warp_drive"}), Hooks())
    with pytest.raises(ValueError, match="figures"):
        two.run(job(T2V, cache=Cache("teacache", figures="nobody's")), Hooks())
    poisoned = conditioning(1)
    poisoned.context[0, 0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="held NaN or infinity"):
        two.run(job(T2V, cond=poisoned), Hooks())
    two.run(CASES["plain"], Hooks())
    assert two.pids() == pids


@linux
def test_a_cancelled_job_stops_all_and_the_next_one_runs(two: Workers) -> None:
    class Stop(Exception):
        pass

    def stop(step: Step, x0: Tensor | None) -> None:
        assert x0 is not None and x0.shape == (1, 16, 3, 6, 10)
        raise Stop

    two.run(CASES["plain"], Hooks())
    pids = two.pids()
    with pytest.raises(Stop):
        two.run(job(T2V, sampling=Sampling(steps=900), previews=True), Hooks(stop))
    two.rest()
    torch.testing.assert_close(two.run(CASES["plain"], Hooks())[0].latents, alone(CASES["plain"]), rtol=0, atol=1e-5)
    assert two.pids() == pids


@linux
def test_several_devices_are_measured_against_one(two: Workers) -> None:
    gain = two.measure(CASES["plain"], Hooks())
    assert gain is not None and gain.one > 0 and gain.all > 0
    assert two.measure(CASES["guidance on halves"], Hooks()) is not None


@linux
def test_one_that_ends_between_two_jobs_is_started_again(two: Workers, caplog) -> None:
    two.run(CASES["plain"], Hooks())
    pids = two.pids()
    os.kill(pids[0], signal.SIGTERM)
    until = time.monotonic() + 10
    while Path(f"/proc/{pids[0]}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)
    two.run(CASES["plain"], Hooks())
    assert not set(two.pids()) & set(pids)
    assert f"process {pids[0]}) was ended by signal 15" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: a process on each")
@pytest.mark.parametrize(("sign", "words"), [(signal.SIGKILL, "signal 9"), (signal.SIGSTOP, "no sign of life")])
def test_a_lost_rank_gives_its_gpu_back(sign: signal.Signals, words: str) -> None:
    devices = (0, 1)
    free = [torch.cuda.mem_get_info(device)[0] for device in devices]
    workers = Workers([f"cuda:{device}" for device in devices])

    def strike(step: Step, x0: Tensor | None) -> None:
        if step.index == 1:
            os.kill(workers.pids()[1], sign)

    began = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(cuda:1.*{words}"):
        workers.run(job(T2V, sampling=Sampling(steps=900)), Hooks(strike))
    assert time.monotonic() - began < 120 and workers.pids() == ()
    for device, before in zip(devices, free, strict=True):
        assert torch.cuda.mem_get_info(device)[0] > before - 50e6
    made = workers.run(CASES["plain"], Hooks())
    assert made[0].latents is not None and made[0].latents.isfinite().all()
    workers.close()


def test_devices_are_named_or_refused_in_words() -> None:
    assert devices_of("all", 2) == ("cuda:0", "cuda:1")
    assert devices_of(" All ", 0) == devices_of("cpu, cpu", 4) == ("cpu", "cpu")
    assert devices_of("1,cuda:0", 2) == ("cuda:1", "cuda:0")
    for named, words in (
        ("0, 2", "no GPU 2"),
        ("0, 0", "twice"),
        ("two", "write all"),
        ("0, cpu", "write all"),
        ("", ""),
    ):
        with pytest.raises(ValueError, match=words):
            devices_of(named, 2)


def test_sizes_are_chosen_to_fit() -> None:
    assert share(Shared(), 2, 40, guided=True) == Parallel(cfg=2)
    assert share(Shared(), 2, 40, guided=False) == Parallel(ulysses=2)
    assert share(Shared(), 8, 40, guided=True) == Parallel(ulysses=4, cfg=2)
    assert share(Shared(), 3, 40, guided=True) == Parallel(ring=3)
    assert share(Shared(), 6, 40, guided=False) == Parallel(ulysses=2, ring=3)
    assert share(Shared(ring=2, exchange="fp8"), 4, 12, guided=False) == Parallel(2, 2, 1, "fp8")
    with pytest.raises(ValueError, match="do not come to 4 devices for a model of 40 heads"):
        share(Shared(ulysses=3), 4, 40, guided=True)
    with pytest.raises(ValueError, match="without guidance"):
        share(Shared(cfg=2), 2, 40, guided=False)


def test_a_whole_step_follows_from_few_blocks() -> None:
    gain = of_depths((1.0, 0.8), (1.4, 1.0), depth=40)  # 0.1 and 0.05 s a block, 0.8 and 0.7 beside them
    assert (gain.one, gain.all) == pytest.approx((4.8, 2.7))
    assert gain.worth and "1.78 times as fast" in gain.line(2)
    assert not Gain(1.1, 1.0).worth and "one does it" in Gain(1.1, 1.0).line(2)
    assert of_depths((1.0, 0.8), (1.1, 0.9), depth=2) == Gain(1.0, 0.8)


def test_an_error_that_cannot_be_sent_sends_its_words() -> None:
    class Local(Exception):
        pass

    assert str(sendable(Local("gone"))) == "Local: gone"
    assert isinstance(sendable(CheckpointError("x")), CheckpointError)
