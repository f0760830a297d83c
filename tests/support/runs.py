"""Flags of runs that many tests begin with, and what runs leave behind."""

import json
from pathlib import Path

import gguf

import run
from support.models import tiny_tokenizer
from training import checkpoints

ROOT = Path(run.__file__).parent
ZO = "--trainer zo --max_steps 6 --learning_rate 1e-2 --output_dir out --save_model"
BOOST = f"{ZO} --xgblora --xgblora_steps_per_iteration 4 --save_steps 2"


def in_folder(name):
    """Return the flags of `BOOST` with another output directory."""
    return BOOST.replace("--output_dir out", f"--output_dir {name}")


def adapter_bytes(path="out"):
    """Return the bytes of the adapter and of its chain of boosters."""
    return [(Path(path) / f"{name}.safetensors").read_bytes() for name in ("adapter_model", "boosters")]


def replace_in_checkpoint(checkpoint: Path, name: str, content: bytes) -> None:
    """Put other bytes into a file of a checkpoint, and their hash into its manifest: it is complete."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    manifest[name] = {"bytes": len(content), "sha256": checkpoints.sha256(checkpoint / name)}
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def write_gguf(path: Path, model) -> None:
    """Write a Llama as llama.cpp has it: its names, and the halves of each head of q and k interleaved."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = (
        sorted(vocabulary, key=vocabulary.get)
        + ["ab"]
        + [f"<unused{i}>" for i in range(config.vocab_size - 260)]
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1] * (len(tokens) - 259))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    names = {"self_attn": "attn", "o_proj": "output", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
    names |= {"mlp": "ffn", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        if name.startswith("model.layers."):
            layer, *parts = name.removeprefix("model.layers.").removesuffix(".weight").split(".")
            name = f"blk.{layer}.{'_'.join(names[part] for part in parts)}.weight"
        writer.add_tensor({**whole, "lm_head.weight": "output.weight"}.get(name, name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
