"""Every key of LightX2V's JSON files, and what it means here; docs/config-json.md shows the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HONOURED, MODEL, DEAD, REFUSED = "honoured", "model", "dead", "refused"
# What the verdicts mean.
VERDICTS = {
    HONOURED: "does what it says",
    MODEL: "the checkpoint's header decides; a warning where the file says something else",
    DEAD: "accepted, changes nothing, and is named in the one warning of the file",
    REFUSED: "an error, unless it is switched off (false, null, 0, empty)",
}


@dataclass(frozen=True)
class Row:
    """keys: separated by blanks; `block.key` is inside a block. says: what it becomes, or why it becomes nothing."""

    keys: str
    verdict: str
    says: str


SPARSE = "setting of a sparse attention, which is not there"
OFFLOADED = "encoders wait in RAM between their turns, whatever this says"
TABLE = (
    Row("infer_steps", HONOURED, "infer_steps of create_generator; a distilled model's steps are denoising_step_list"),
    Row("target_height target_width", HONOURED, "height, width"),
    Row("target_video_length", HONOURED, "num_frames"),
    Row("sample_guide_scale", HONOURED, "guidance_scale: one number, or those of the high- and low-noise expert"),
    Row("enable_cfg", HONOURED, "false: guidance_scale 1"),
    Row("sample_shift fps boundary boundary_step_index denoising_step_list resize_mode", HONOURED, "by that name"),
    Row("scheduler_type", HONOURED, "WanStepDistillScheduler: scheduler distilled; WanScheduler: unipc"),
    Row("self_attn_1_type", HONOURED, "attn_mode; sage_attn and sage_attn2_k_int8_v_fp8 mean sage_attn2"),
    Row("cross_attn_1_type cross_attn_2_type", HONOURED, "one attention computes all: the name must be the same"),
    Row("dit_original_ckpt high_noise_original_ckpt low_noise_original_ckpt", HONOURED, "as in LightX2VPipeline"),
    Row("dit_quantized dit_quantized_ckpt", HONOURED, "enable_quantize"),
    Row("high_noise_quantized_ckpt low_noise_quantized_ckpt", HONOURED, "enable_quantize"),
    Row(
        "dit_quant_scheme",
        HONOURED,
        "quant_scheme of enable_quantize: a kernel that it names runs or raises; fp8 takes the best",
    ),
    Row("t5_quantized t5_quantized_ckpt t5_quant_scheme", HONOURED, "enable_quantize, text_encoder_..."),
    Row("clip_quantized clip_quantized_ckpt clip_quant_scheme", HONOURED, "enable_quantize, image_encoder_..."),
    Row("cpu_offload offload_granularity vae_cpu_offload", HONOURED, "enable_offload"),
    Row("lora_configs lora_dynamic_apply", HONOURED, "enable_lora"),
    Row("feature_caching", HONOURED, "enable_cache: Tea, Mag, NoCaching; other methods are refused"),
    Row("coefficients teacache_thresh use_ret_steps", HONOURED, "enable_cache"),
    Row("magcache_K magcache_thresh magcache_retention_ratio", HONOURED, "enable_cache"),
    Row("magcache_ratios magcache_calibration", HONOURED, "enable_cache"),
    Row(
        "parallel",
        HONOURED,
        "enable_parallel, under torchrun: cfg_p_size, seq_p_size, seq_p_attn_type, exchange in fp8; tensor_p_size and "
        "4 bits are errors",
    ),
    Row("use_lightvae use_tae vae_path tae_path", HONOURED, "enable_lightvae"),
    Row("use_tiling_vae", HONOURED, "true: enable_vae_tiling; false: whole frames where they fit"),
    Row("in_dim out_dim dim ffn_dim num_heads num_layers freq_dim eps model_type", MODEL, "the network"),
    Row("num_channels_latents vae_stride text_len use_image_encoder patch_size", MODEL, "latents and encoders"),
    Row("changing_resolution", REFUSED, "steps at another resolution are not supported; use a cache for speed"),
    Row("enable_dynamic_cfg", REFUSED, "models that read their guidance as an input are not supported"),
    Row("video_frame_interpolation", REFUSED, "frames are not interpolated; interpolate the saved video"),
    Row("video_super_resolution", REFUSED, "videos are not enlarged; enlarge the saved video"),
    Row("disagg_mode", REFUSED, "all stages run in one process"),
    Row("use_prompt_enhancer", REFUSED, "prompts are taken as they are; write the longer prompt yourself"),
    Row("do_mm_calib", REFUSED, "linear layers are not calibrated"),
    Row("lightvae_pruning_rate lightvae_encoder_vae_pth lightvae_encoder_path", REFUSED, "MG-LightVAE cannot be read"),
    Row("transformer_model_name", HONOURED, "of HunyuanVideo-1.5: which of the folder's transformers; 480p or 720p"),
    Row("attn_type", HONOURED, "of HunyuanVideo-1.5: attn_mode"),
    Row("aspect_ratio", HONOURED, "of HunyuanVideo-1.5: height and width at the size of its transformer"),
    Row("qwen25vl_quantized qwen25vl_quantized_ckpt qwen25vl_quant_scheme", HONOURED, "text_encoder_... as of t5"),
    Row("qwen25vl_cpu_offload siglip_cpu_offload byt5_cpu_offload", DEAD, OFFLOADED),
    Row("t5_cpu_offload clip_cpu_offload", DEAD, OFFLOADED),
    Row("offload_ratio vae_offload_cache clean_cuda_cache num_disk_workers", DEAD, "memory is planned here"),
    Row("lazy_load unload_modules", DEAD, "weights that RAM cannot hold are read from the file as needed, by plan"),
    Row("t5_lazy_load empty_cache_min_free_gib empty_cache_min_reclaimable_gib", DEAD, "memory is planned here"),
    Row("rope_type rope_chunk rope_chunk_size rotary_chunk", DEAD, "kernels are chosen by themselves"),
    Row("rms_norm_type layer_norm_type modulate_type", DEAD, "kernels are chosen by themselves"),
    Row("tp_mm_type tp_rms_norm_type mxfp8_fuse_enable", DEAD, "kernels are chosen by themselves"),
    Row("nvfp4_ffn_split_n_workaround", DEAD, "kernels are chosen by themselves"),
    Row("clip_attn_type", DEAD, "the image encoder has its own attention"),
    Row("vae_dtype vae_weight_dtype", DEAD, "float32 on a CPU, bfloat16 on a GPU"),
    Row("vae_name vae_type need_scaled", DEAD, "told from the VAE's file"),
    Row("use_stream_vae", DEAD, "the VAE always works chunk by chunk"),
    Row("use_bfloat16", DEAD, "dtype of create_generator decides"),
    Row("t5_original_ckpt t5_tokenizer_path clip_original_ckpt", DEAD, "found in model_path"),
    Row("use_compile", DEAD, "nothing is compiled; the video is the same"),
    Row("enable_reuse", DEAD, "each video encodes its own prompt; the video is the same"),
    Row("max_area resolution fixed_area align_single_card_shape", DEAD, "target_height and target_width decide"),
    Row("cfg_scale", DEAD, "of enable_dynamic_cfg"),
    Row("changing_resolution_steps resolution_rate", DEAD, "of changing_resolution"),
    Row("downsample_factor residual_diff_threshold", DEAD, "of caches that are not there"),
    Row("sub_servers", DEAD, "no other server is asked"),
    Row("disagg_config rdma_buffer_slot_size clip_embed_dim", DEAD, "of disagg_mode"),
    Row("seq_parallel cfg_parallel", DEAD, "of parallel"),
    Row("seed image_path model_path model_cls task", DEAD, "give it to LightX2VPipeline or generate"),
    Row("sparge sparge_ckpt draft_attn_sparsity_ratio", DEAD, SPARSE),
    Row("dynamic_sparse_attn_setting general_sparse_attn_setting nbhd_attn_setting", DEAD, SPARSE),
    Row("rainfusion_attn_setting sol_attn_setting sparge_attn_setting", DEAD, SPARSE),
    Row("spas_flash_attn4_setting spas_sage_attn2_setting spas_sage_attn3_setting", DEAD, SPARSE),
    Row("radial_attn_setting svg_attn_setting svg2_attn_setting", DEAD, SPARSE),
)
KEYS = {key: row for row in TABLE for key in row.keys.split()}
# Attention names of LightX2V whose kernels have another name here, or had another one there.
STALE = {"sage_attn": "sage_attn2", "sage_attn2_k_int8_v_fp8": "sage_attn2", "spas_sage_attn": "spas_sage_attn2"}
RENAMED = {
    "infer_steps": "infer_steps",
    "target_height": "height",
    "target_width": "width",
    "target_video_length": "num_frames",
    "sample_shift": "sample_shift",
    "fps": "fps",
    "boundary": "boundary",
    "boundary_step_index": "boundary_step_index",
    "denoising_step_list": "denoising_step_list",
    "resize_mode": "resize_mode",
}
SCHEDULER_TYPES = {"WanStepDistillScheduler": "distilled", "WanScheduler": "unipc"}
CACHE_METHODS = {"Tea": "Tea", "Mag": "Mag", "NoCaching": "None"}
# What LightX2V has and nothing here does -> what comes nearest: all of these skip steps or blocks by how much changed.
NEAREST = dict.fromkeys(("Ada", "Custom", "DualBlock", "DynamicBlock", "FirstBlock", "TaylorSeer"), "Tea")
CACHE_KEYS = (
    *("coefficients", "teacache_thresh", "use_ret_steps"),
    *("magcache_calibration", "magcache_K", "magcache_thresh", "magcache_retention_ratio", "magcache_ratios"),
)
QUANT_PATHS = {
    "dit_quantized_ckpt": "dit_quantized_ckpt",
    "high_noise_quantized_ckpt": "high_noise_quantized_ckpt",
    "low_noise_quantized_ckpt": "low_noise_quantized_ckpt",
    "t5_quantized_ckpt": "text_encoder_quantized_ckpt",
    "clip_quantized_ckpt": "image_encoder_quantized_ckpt",
    "qwen25vl_quantized_ckpt": "text_encoder_quantized_ckpt",
}
QUANT_SWITCHES = {
    "dit_quantized": "dit_quantized",
    "t5_quantized": "text_encoder_quantized",
    "clip_quantized": "image_encoder_quantized",
    "qwen25vl_quantized": "text_encoder_quantized",
}
# What undoes a method that a file called, where the next file says nothing about it; {} where its defaults do.
UNDONE_BY: Mapping[str, Mapping[str, Any]] = {
    "enable_offload": {"offload_granularity": "auto"},
    "enable_lora": {"lora_configs": ()},
    "enable_cache": {"cache_method": "None"},
    "enable_vae_tiling": {"mode": "auto"},
}
# What values must be.
SWITCHES = frozenset(
    "enable_cfg cpu_offload vae_cpu_offload dit_quantized t5_quantized clip_quantized qwen25vl_quantized use_lightvae "
    "use_tae use_tiling_vae use_ret_steps magcache_calibration lora_dynamic_apply".split()
)
WHOLE = frozenset(
    "infer_steps target_height target_width target_video_length fps boundary_step_index magcache_K".split()
)
NUMBERS = WHOLE | frozenset("sample_shift boundary teacache_thresh magcache_thresh magcache_retention_ratio".split())
OBJECTS = frozenset({"parallel"})
TEXTS = frozenset(
    "scheduler_type self_attn_1_type cross_attn_1_type cross_attn_2_type attn_type feature_caching vae_path tae_path "
    "transformer_model_name aspect_ratio offload_granularity dit_original_ckpt high_noise_original_ckpt "
    "low_noise_original_ckpt dit_quantized_ckpt high_noise_quantized_ckpt low_noise_quantized_ckpt t5_quantized_ckpt "
    "clip_quantized_ckpt qwen25vl_quantized_ckpt dit_quant_scheme t5_quant_scheme clip_quant_scheme "
    "qwen25vl_quant_scheme".split()
)
LISTS = frozenset("denoising_step_list lora_configs coefficients magcache_ratios".split())
HUNYUAN = "hunyuan1.5"
SIDES = {"480p": 640, "720p": 960}  # pixels of the square that such a HunyuanVideo-1.5 was trained on
QWEN_SCHEME = "qwen25vl_quant_scheme"
ORIGINALS = ("dit_original_ckpt", "high_noise_original_ckpt", "low_noise_original_ckpt")
