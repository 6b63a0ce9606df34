"""LightX2V's JSON files: every key has a verdict, every file of theirs is translated or refused in words."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dev import config_table
from dev.environment import REPOSITORY
from lightx2v import LightX2VPipeline, config_json
from lightx2v.config import Parallel
from lightx2v.config_json import Reading, read_config, read_told
from lightx2v.config_keys import DEAD, HONOURED, KEYS, MODEL, REFUSED, TABLE, VERDICTS
from lightx2v.config_survey import ABSENT, CANNOT, IDLE, NEEDS, RUNS, survey
from lightx2v.parallel.sizes import named
from lightx2v_kernels import registry

CONFIGS = REPOSITORY.parent / "shared" / "reference" / "configs"
WHERE = Path("config.json")
SIZES = {"infer_steps": 40, "target_height": 480, "target_width": 832, "target_video_length": 81}


def translate(settings: Mapping[str, Any], **changes: Any) -> config_json.Told:
    return Reading(WHERE, settings, **changes).translate()


def published() -> list[Path]:
    return sorted(CONFIGS.rglob("*.json"))


def refusal(path: Path) -> str:
    """Why a published file cannot be used here, or nothing; whichever attention it names."""
    try:
        Reading(path, read_config(path), given={"attn_mode"}).translate()
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


needs_configs = pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"LightX2V's own files are not at {CONFIGS}")


@needs_configs
def test_what_each_key_of_a_published_file_becomes() -> None:
    """Compared with the table: where a change is meant, `python dev.py run -m dev.config_table` writes it anew."""
    assert config_table.text(CONFIGS).splitlines() == config_table.TABLE.read_text(encoding="utf-8").splitlines()


def table() -> dict[str, tuple[str, dict[str, str]]]:
    """File -> its verdict, and key -> what it becomes."""
    _, _, listed = config_table.TABLE.read_text(encoding="utf-8").partition("\n\n")
    files = {}
    for line in listed.splitlines():
        name, verdict, keys = line.split(": ", 2)
        files[name] = (verdict, dict(key.split(" -> ", 1) for key in keys.split(" | ")))
    return files


def test_the_table_says_what_every_file_becomes() -> None:
    files = table()
    verdicts = Counter(verdict for verdict, _ in files.values())
    assert len(files) >= 104 and verdicts.keys() == {RUNS, NEEDS, CANNOT} and verdicts[RUNS] >= 42
    said = f"{len(files)} files {verdicts[RUNS]} run as they are, {verdicts[NEEDS]} once the files"
    assert said in " ".join((REPOSITORY / "docs" / "config-json.md").read_text(encoding="utf-8").split())
    becomes = {(key, what) for _, keys in files.values() for key, what in keys.items()}
    assert {key for key, _ in becomes} <= KEYS.keys()
    for key, what in becomes:  # a key that is honoured names a method that is there
        for method in re.findall(r"(?:^|; )(\w+)\(", what if KEYS[key].verdict == HONOURED else ""):
            assert method == "LightX2VPipeline" or hasattr(LightX2VPipeline, method), (key, what)
    refused = {
        key for verdict, keys in files.values() if verdict == CANNOT for key, what in keys.items() if "=" in what
    }
    assert {"parallel", "feature_caching", "self_attn_1_type", "changing_resolution"} <= refused
    assert sum("enable_parallel(" in keys.get("parallel", "") for _, keys in files.values()) >= 24


def test_a_file_is_surveyed_beyond_what_cannot_be_honoured(tmp_path: Path) -> None:
    settings = {
        **SIZES,
        "target_heigth": 480,
        "parallel": {"tensor_p_size": 4},
        "feature_caching": "Custom",
        "teacache_thresh": 0.2,
        "t5_cpu_offload": True,
        "num_layers": 40,
        "enable_cfg": True,
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
        "dit_original_ckpt": "/path/to/dit",
        "dit_quantized": True,
        "dit_quant_scheme": "mxfp4",
        "sample_guide_scale": [3.5, 4],
        "comment": "mine",
    }
    found = survey(Reading(WHERE, settings))
    assert found.verdict == CANNOT
    by_key = {each.key: each for each in found.findings}
    assert list(by_key) == [key for key in settings if key != "comment"], "in the file's order"
    refused = {"target_heigth", "parallel", "feature_caching", "dit_quant_scheme"}
    assert {each.key for each in found.of(REFUSED)} == refused
    assert "did you mean 'target_height'" in by_key["target_heigth"].becomes
    assert "the nearest is 'Tea'" in by_key["feature_caching"].becomes
    assert "files of this scheme cannot be read" in by_key["dit_quant_scheme"].becomes
    assert by_key["target_height"].becomes == "create_generator(height=480)"
    assert by_key["self_attn_1_type"].becomes == "create_generator(attn_mode='torch_sdpa')"
    assert by_key["sample_guide_scale"].becomes == "create_generator(guidance_scale=[3.5, 4])"
    kinds = {key: by_key[key].verdict for key in ("dit_original_ckpt", "t5_cpu_offload", "num_layers", "enable_cfg")}
    assert list(kinds.values()) == [ABSENT, DEAD, MODEL, IDLE]
    assert by_key["teacache_thresh"].verdict == IDLE, "of a cache that is refused"
    usable = {key: value for key, value in settings.items() if key not in refused}
    assert survey(Reading(WHERE, usable)).verdict == NEEDS
    (tmp_path / "dit").touch()
    assert survey(Reading(WHERE, {**usable, "dit_original_ckpt": str(tmp_path / "dit")})).verdict == RUNS


@needs_configs
def test_what_published_files_say_is_what_is_asked_for() -> None:
    def told(name: str) -> config_json.Told:
        return Reading(CONFIGS / name, read_config(CONFIGS / name), given={"attn_mode"}).translate()

    size = {"infer_steps": 50, "height": 480, "width": 832, "num_frames": 81}
    plain = told("wan/wan_t2v.json")
    assert plain.generator == {**size, "sample_shift": 8, "guidance_scale": 6}
    assert plain.calls == {
        "enable_offload": {"cpu_offload": False, "offload_granularity": "block", "vae_offload": False}
    }
    assert not plain.unused and not plain.originals

    tea = told("caching/teacache/wan_t2v_1_3b_tea_480p.json").calls["enable_cache"]
    assert (tea["cache_method"], tea["teacache_thresh"], tea["use_ret_steps"]) == ("Tea", 0.26, True)
    assert [len(numbers) for numbers in tea["coefficients"]] == [5, 5]

    four = told("distill/wan_i2v_distill_4step_cfg.json").generator
    assert four["guidance_scale"] == 1.0 and four["denoising_step_list"] == [1000, 750, 500, 250]

    pair = told("wan22/wan_moe_i2v.json").generator
    assert pair["guidance_scale"] == [3.5, 3.5] and pair["boundary"] == 0.9

    quantised = told("bench/lightx2v_5.json").calls["enable_quantize"]
    assert quantised["dit_quantized"] is True and quantised["quant_scheme"] == "fp8-sgl"


@needs_configs
def test_an_attention_that_is_not_registered_is_refused_by_name() -> None:
    known = registry.choices("attention")
    for path in published():
        name = read_config(path).get("self_attn_1_type")
        if name and name not in known and not refusal(path):
            with pytest.raises(ValueError, match=rf"self_attn_1_type='{name}': a sparse attention"):
                Reading(path, read_config(path)).translate()


@needs_configs
def test_every_key_that_published_files_hold_has_a_verdict() -> None:
    keys = {key for path in published() for key in read_config(path)}
    assert len(keys) >= 90 and keys <= KEYS.keys()


def test_the_table_has_one_verdict_a_key_and_is_the_documents() -> None:
    keys = [key for row in TABLE for key in row.keys.split()]
    assert len(keys) == len(set(keys)), "a key has two rows"
    assert {row.verdict for row in TABLE} == set(VERDICTS)
    text = (REPOSITORY / "docs" / "config-json.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    listed = [(" ".join(re.findall("`([^`]+)`", row[0])), row[1], row[2]) for row in rows]
    assert listed == [(row.keys, row.verdict, row.says) for row in TABLE]


def test_values_become_arguments() -> None:
    guided = {**SIZES, "fps": 16.0, "sample_shift": 5, "sample_guide_scale": [4.0, 3.0], "enable_cfg": True}
    size = {"infer_steps": 40, "height": 480, "width": 832, "num_frames": 81, "fps": 16, "sample_shift": 5}
    assert translate(guided).generator == {**size, "guidance_scale": [4.0, 3.0]}
    assert translate({**guided, "enable_cfg": False}).generator == {**size, "guidance_scale": 1.0}
    offload = translate({"cpu_offload": True, "offload_granularity": "phase", "vae_cpu_offload": True}).calls
    assert offload == {"enable_offload": {"cpu_offload": True, "offload_granularity": "phase", "vae_offload": True}}
    cache = translate({"feature_caching": "Mag", "magcache_K": 4, "magcache_ratios": [[1.0], [1.0]]}).calls
    assert cache == {"enable_cache": {"cache_method": "Mag", "magcache_K": 4, "magcache_ratios": [[1.0], [1.0]]}}
    quantised = translate({"t5_quantized": True, "t5_quant_scheme": "int8", "dit_quantized_ckpt": __file__}).calls
    assert quantised["enable_quantize"]["text_encoder_quant_scheme"] == "int8"
    assert not quantised["enable_quantize"]["dit_quantized"]
    assert "dit_quantized_ckpt" not in quantised["enable_quantize"], "it is not switched on"


def test_honoured_keys_change_what_is_asked_for() -> None:
    """Each of them, alone or with the switch that it belongs to, makes a difference."""
    switches: dict[str, dict[str, Any]] = {
        "clip_": {"clip_quantized": True},
        "t5_": {"t5_quantized": True},
        "qwen25vl_": {"qwen25vl_quantized": True},
        "dit_quant": {"dit_quantized": True},
        "high_noise_quantized": {"dit_quantized": True},
        "low_noise_quantized": {"dit_quantized": True},
        "offload_gran": {"cpu_offload": True},
        "lora_dynamic": {"lora_configs": [{"path": __file__}]},
        "coefficients": {"feature_caching": "Tea"},
        "teacache": {"feature_caching": "Tea"},
        "use_ret": {"feature_caching": "Tea"},
        "magcache": {"feature_caching": "Mag"},
        "tae_path": {"use_tae": True},
        "cross_attn": {"self_attn_1_type": "torch_sdpa"},
    }
    values: dict[str, Any] = {
        "enable_cfg": False,
        "denoising_step_list": [1000, 500],
        "coefficients": [1.0],
        "magcache_ratios": [1.0],
        "scheduler_type": "WanStepDistillScheduler",
        "feature_caching": "Tea",
        "lora_configs": [{"path": __file__}],
        "offload_granularity": "phase",
        "dit_quant_scheme": "int8-vllm",
        "t5_quant_scheme": "int8",
        "qwen25vl_quant_scheme": "int8",
        "attn_type": "torch_sdpa",
        "clip_quant_scheme": "int8",
        "parallel": {"cfg_p_size": 2},
    }
    attention = {"self_attn_1_type": "torch_sdpa", "cross_attn_1_type": "reference", "cross_attn_2_type": "reference"}
    elsewhere = {"transformer_model_name", "aspect_ratio"}  # tested by themselves: they need a folder
    for key in (key for key, row in KEYS.items() if row.verdict == HONOURED and key not in elsewhere):
        switch = next((value for start, value in switches.items() if key.startswith(start)), {})
        path = __file__ if key.endswith(("ckpt", "_path")) else None
        value = values.get(key, attention.get(key, path or 1))
        base = {name: on for name, on in switch.items() if name != key}
        if key.startswith("cross_attn"):
            with pytest.raises(ValueError, match="one attention computes all of them"):
                translate({**base, key: value})
        else:
            assert translate({**base, key: value}) != translate(base), key


def test_a_hunyuans_size_is_its_transformers(tmp_path: Path) -> None:
    for name in ("480p_t2v", "720p_i2v"):
        (tmp_path / "transformer" / name).mkdir(parents=True)

    def told(**settings: Any) -> config_json.Told:
        return translate(settings, folders=(tmp_path,), facts={"family": "hunyuan1.5"})

    small = told(transformer_model_name="480p_t2v", aspect_ratio="16:9", attn_type="torch_sdpa")
    assert small.generator == {"height": 480, "width": 848, "attn_mode": "torch_sdpa"}
    assert small.originals == {"dit_original_ckpt": tmp_path / "transformer/480p_t2v"}
    square = told(transformer_model_name="720p_i2v", aspect_ratio="1:1").generator
    assert square == {"height": 960, "width": 960}
    given = told(transformer_model_name="480p_t2v", aspect_ratio="16:9", target_height=640, target_width=640)
    assert given.generator == {"height": 640, "width": 640}
    assert given.unused == ("aspect_ratio='16:9' (the size is told otherwise)",)
    with pytest.raises(ValueError, match="aspect_ratio='wide': expected width:height, such as 16:9"):
        told(transformer_model_name="480p_t2v", aspect_ratio="wide")
    with pytest.raises(ValueError, match=r"'transformer/1080p': there is no such file; looked for"):
        told(transformer_model_name="1080p")
    with pytest.raises(ValueError, match=r"transformer_model_name='480p_t2v' is of HunyuanVideo-1\.5: remove it"):
        translate({"transformer_model_name": "480p_t2v"}, facts={"family": "wan"})


def test_refused_keys_are_refused_unless_switched_off() -> None:
    for key in (key for key, row in KEYS.items() if row.verdict == REFUSED):
        with pytest.raises(ValueError, match=rf"config\.json: {key}=.*remove {key} from the file"):
            translate({key: True})
        for off in (False, None, "", 0, {}):
            assert translate({key: off}) == config_json.Told()


def test_several_gpus() -> None:
    def told(**parallel: Any) -> Any:
        return dict(translate({"parallel": parallel}).calls)

    assert told(cfg_p_size=1, seq_p_size=1, seq_p_attn_type="ring") == told() == {}
    assert translate({"parallel": False}).calls == {}
    asked = {"cfg_p_size": 2, "seq_p_size": 4, "seq_p_attn_type": "ulysses-4090"}
    assert told(**asked) == {"enable_parallel": asked} and named(**asked) == Parallel(4, 1, 2)
    fp8 = {"seq_p_size": 8, "exchange": "fp8"}
    assert told(seq_p_size=8, seq_p_fp8_comm=True) == told(seq_p_size=8, seq_p_quant_scheme="fp8")
    assert told(seq_p_size=8, seq_p_fp8_comm=True) == {"enable_parallel": fp8}
    (said,) = translate({"parallel": {"seq_p_size": 2, "vae_parallel": False}}).unused
    assert said.startswith("parallel.vae_parallel (")
    for parallel, words in (
        ({"tensor_p_size": 4}, r"parallel=\{.*tensor_p_size=4: layers are not split .* the nearest is seq_p_size"),
        ({"seq_p_size": 4, "seq_p_fp4_comm": True}, "not exchanged in 4 bits"),
        ({"seq_p_sise": 4}, "'seq_p_sise' is no key of parallel; it has cfg_p_size, seq_p_size"),
        ({"seq_p_size": 0}, "seq_p_size=0: expected a number of processes"),
        ({"seq_p_size": 4, "seq_p_attn_type": "usp"}, "'usp' is not supported; known: ulysses, ring, ulysses-4090"),
        ({"cfg_p_size": 3}, "cfg=3 must be 1 .off. or 2"),
    ):
        with pytest.raises(ValueError, match=words):
            translate({"parallel": parallel})
    with pytest.raises(ValueError, match=r"parallel=4: expected an object"):
        translate({"parallel": 4})
    assert named(1, 8, "ring", 2) == Parallel(2, 4) and named(1, 8, "ring") == Parallel(1, 8)
    with pytest.raises(ValueError, match=r"ulysses_p_size=3: the second must divide the first"):
        named(1, 8, "ulysses", 3)


def test_dead_keys_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead = {key: 1 for key, row in KEYS.items() if row.verdict == DEAD}
    path = tmp_path / "dead.json"
    path.write_text(json.dumps({**dead, "comment": "mine", "comment_parallel": "mine"}), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        told = read_told(path, tmp_path, ())
    assert (told.generator, told.calls, told.originals) == ({}, {}, {})
    (record,) = caplog.records
    assert all(f"{key} (" in record.getMessage() for key in dead) and "mine" not in record.getMessage()


def test_the_checkpoint_decides_what_it_is() -> None:
    facts = {key: 7 for key, row in KEYS.items() if row.verdict == MODEL and key not in ("text_len", "model_type")}
    same = {**facts, "text_len": 512, "model_type": "i2v"}
    assert translate(same, facts=facts) == config_json.Told()
    for key in (*facts, "text_len"):
        (said,) = translate({**same, key: 9}, facts=facts).unused
        assert said.startswith(f"{key}=9 (")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_heigth": 480}, r"'target_heigth' is no key of these files; did you mean 'target_height'\?"),
        ({"feature_caching": "TaylorSeer"}, "feature_caching='TaylorSeer' is not supported; known: Tea, Mag"),
        ({"scheduler_type": "DPM"}, "scheduler_type='DPM' is not supported; known: WanStepDistillScheduler"),
        ({"self_attn_1_type": "aiter_attn"}, "self_attn_1_type='aiter_attn': for hardware .* nearest is 'torch_s"),
        ({"self_attn_1_type": "draft_attn"}, "a sparse attention, .* nearest is 'auto'; write one of auto, exact"),
        ({"self_attn_1_type": "torch_sdp"}, "did you mean 'torch_sdpa'"),
        ({"dit_original_ckpt": "/path/to/dit"}, "dit_original_ckpt='/path/to/dit' is a placeholder: write the real"),
        ({"dit_original_ckpt": "gone.pth"}, r"'gone\.pth': there is no such file; looked for gone\.pth"),
        ({"cpu_offload": "false"}, "cpu_offload='false': expected true or false"),
        ({"target_height": "480"}, "target_height='480': expected a whole number"),
        ({"infer_steps": 4.5}, "infer_steps=4.5: expected a whole number"),
        ({"sample_shift": True}, "sample_shift=True: expected a number"),
        ({"denoising_step_list": 4}, "denoising_step_list=4: expected a list"),
        ({"lora_configs": [{"path": "/path/to/lora"}]}, "lora_configs='/path/to/lora' is a placeholder"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        translate(settings)


def test_stale_names_and_empty_paths() -> None:
    with pytest.raises(ValueError, match=r"a sparse attention, .* nearest is 'sage_attn2'"):
        translate({"self_attn_1_type": "spas_sage_attn"})
    empty = {"dit_original_ckpt": None, "high_noise_original_ckpt": "", "lora_configs": None, "feature_caching": ""}
    assert translate(empty) == config_json.Told()


def test_a_stale_name_is_its_successors() -> None:
    settings = {"self_attn_1_type": "sage_attn", "cross_attn_1_type": "sage_attn2"}
    settings["cross_attn_2_type"] = "sage_attn2_k_int8_v_fp8"
    assert translate(settings).generator == {"attn_mode": "sage_attn2"}


def test_relative_paths_start_at_the_model_or_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dit.safetensors").touch()
    told = translate({"dit_original_ckpt": "dit.safetensors"}, folders=(tmp_path, tmp_path / "models"))
    assert told.originals == {"dit_original_ckpt": tmp_path / "models" / "dit.safetensors"}


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json' cannot be read: No such file"):
        read_config(tmp_path / "gone.json")
    path = tmp_path / "bad.json"
    for text, message in (("{", "is not JSON: .*correct the file"), ("[1]", "holds a JSON list; expected an object")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_config(path)
