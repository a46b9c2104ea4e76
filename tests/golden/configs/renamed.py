"""The names that configuration fields had before 2026-11-30, and whether the dumps here are the old ones under new names.

python tests/golden/configs/renamed.py OLD NEW   # folders with dumps
"""

import re
import sys
from pathlib import Path

# old → new, by the end of a field's path
FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "output_width": "output_dim",
    "text.width": "text.hidden_size",
    "audio.width": "audio.hidden_size",
    "backbone.width": "backbone.hidden_size",
    "decoder.width": "decoder.hidden_size",
    "transformer.width": "transformer.hidden_size",
    "text.norm_eps": "text.rms_norm_eps",
    "backbone.norm_eps": "backbone.rms_norm_eps",
    "decoder.norm_eps": "decoder.rms_norm_eps",
    "rope.original_length": "rope.original_max_position_embeddings",
    "codec.window": "codec.sliding_window",
    "model.window": "model.sliding_window",
    "model.codebooks": "model.num_codebooks",
    "audio_vocab": "audio_vocab_size",
    "codebook_pad": "codebook_pad_token_id",
    "codebook_eos": "codebook_eos_token_id",
    "row.heard": "row.ctc_targets",
    "curriculum.listen": "curriculum.speech_qa",
    "curriculum.write": "curriculum.asr",
    "curriculum.answer": "curriculum.text_qa",
    "curriculum.read": "curriculum.tts",
    "curriculum.proceed": "curriculum.continuation",
    "curriculum.withhold": "curriculum.holdout_fraction",
    "curriculum.imagined": "curriculum.pseudo_speech",
    "global_batch": "global_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "eval_every": "eval_interval_steps",
    "log_every": "log_interval_steps",
    "skip_norm": "skip_step_grad_norm",
    "text_chunk": "logits_chunk_size",
    "decoder_chunk": "decoder_chunk_size",
    "decoder_frames": "decoder_frame_fraction",
    "decoder_hidden": "stop_gradient_hidden",
    "hearing_weight": "ctc_weight",
    "final_factor": "min_lr_ratio",
    "clip": "grad_clip_norm",
    "augment.frames": "augment.frame_substitution_prob",
    "checkpoint.every": "checkpoint.save_interval_steps",
    "checkpoint.keep": "checkpoint.max_to_keep",
    **{f"reply.{name}": f"generation.{name}" for name in ("temperature", "top_k", "top_p", "seed", "max_seconds", "dtype")},
    **{f"reply.{name}": f"generation.{name}" for name in ("weights", "cache", "tensor")},
    "decode_from": "decoder_start_step",
    "quantize_from": "quantizer_start_step",
    "judge_from": "discriminator_start_step",
    "dead_ratio": "dead_code_threshold",
}
REMOVED = ("reply.compatibility",)  # verify has it
# old → new value, by field
VALUES = {
    "qkv_bias": {"'none'": "False", "'qkv'": "True"},
    "mlp_bias": {"'none'": "False", "'both'": "True"},
    "decoder_hidden": {"'detached'": "True", "'attached'": "False"},
    "attention": {"'plain'": "'xla'", "'blocks'": "'chunked'"},
    "remat": {"'products'": "'dots'"},
    "reply.weights": {"'as_dtype'": "'none'"},
    "reply.cache": {"'as_dtype'": "'none'"},
}


def renamed(line: str) -> str:
    """A line of an old dump under its new name."""
    name, _, value = line.partition(" = ")
    for field, values in VALUES.items():
        if re.search(rf"(^|\.){re.escape(field)}$", name):
            value = values.get(value, value)
    for old, new in FIELDS.items():
        if re.search(rf"(^|\.){re.escape(old)}$", name):
            return f"{name[: len(name) - len(old)]}{new} = {value}"
    return f"{name} = {value}"


def main() -> int:
    old, new = map(Path, sys.argv[1:])
    lines = lambda path: [line for line in path.read_text().splitlines() if not line.startswith(REMOVED)]
    apart = [p.name for p in sorted(old.glob("*.txt")) if ["format = 3", *map(renamed, lines(p))] != lines(new / p.name)]
    print("\n".join(["differ:", *apart]) if apart else f"the same: {len(list(old.glob('*.txt')))} dumps")
    return bool(apart)


if __name__ == "__main__":
    sys.exit(main())
