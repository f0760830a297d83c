"""Tiny random models of many families and a tokenizer of bytes, made from nothing."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 264  # 256 bytes and a few special tokens
FAMILIES = ["opt", "opt-350m", "llama", "qwen2", "gpt2"]
NAMES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**NAMES, "intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = {**MLP, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FALCON = {**NAMES, "max_position_embeddings": 128}
# name -> (the library's class, its configuration)
OTHERS = {
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
    "mistral-window": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 3, "sliding_window": None}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 16}),
    "gemma2-window": ("Gemma2", {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3",
        {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi": ("Phi", MLP),
    "phi3": ("Phi3", GROUPED),
    "stablelm": ("StableLm", {**GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "olmo2": ("Olmo2", GROUPED),
    "granite": (
        "Granite",
        {**GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "cohere": ("Cohere", {**GROUPED, "logit_scale": 0.5}),
    "gpt_neox": ("GPTNeoX", MLP),
    "falcon": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon-new": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-heads": ("Falcon", {**FALCON, "multi_query": False, "bias": True, "parallel_attn": False}),
    "falcon-alibi": (
        "Falcon",
        {**FALCON, "alibi": True, "multi_query": False, "bias": True, "parallel_attn": False},
    ),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    ),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    ),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}),
}  # fmt: skip  # fmt: skip
ALL_FAMILIES = FAMILIES + list(OTHERS)


def tiny_model(family: str, seed: int = 0, dtype=torch.float32, **more):
    """Return a random causal language model with two layers; weights large enough that mistakes show.

    Args:
        family: a name of `ALL_FAMILIES`.
        more: further settings of its configuration.
    """
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rotary = {**small, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
    opt = {**small, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    specials = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    builders = {
        "opt": lambda: OPTForCausalLM(OPTConfig(**opt, **specials, **more)),
        "opt-350m": lambda: OPTForCausalLM(
            OPTConfig(**{**opt, "word_embed_proj_dim": 16}, do_layer_norm_before=False, **specials, **more)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**rotary, **specials, **more)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**rotary, **specials, **more)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **specials, **more
            )
        ),
    }
    if family not in builders:
        return other_model(family, seed, dtype, specials | more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = builders[family]().eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def other_model(family: str, seed: int, dtype, more: dict):
    """Return a random model of one of `OTHERS`."""
    name, config = OTHERS[family]
    classes = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}.get(
        name, (f"{name}Config", f"{name}ForCausalLM")
    )
    config_class, model_class = (getattr(transformers, part) for part in classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**config | more)).eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of which every byte is a token, with OPT's special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
