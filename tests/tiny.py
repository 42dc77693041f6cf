"""Small real things for tests: a byte-level BPE tokenizer with a ChatML template, and tiny random
models of several families.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 1024
# What every tiny model has, in the names of most configurations and in GPT-2's.
SPECIAL_TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=512,
    initializer_range=0.2,
)
GPT2_SIZES = dict(
    vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2
)
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# A configuration's class, and what a family has besides: kinds of attention, and of heads.
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "qwen3": (
        transformers.Qwen3Config,
        dict(num_key_value_heads=1, head_dim=24, tie_word_embeddings=True),
    ),
    "mistral": (transformers.MistralConfig, dict(num_key_value_heads=2, sliding_window=8)),
    "gemma": (transformers.GemmaConfig, dict(num_key_value_heads=1, head_dim=16)),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=8,
            num_hidden_layers=3,
            layer_types=GEMMA3_LAYERS,
        ),
    ),
    "gpt2": (transformers.GPT2Config, dict()),
}


def save_tokenizer(folder):
    """Train a BPE tokenizer of 1,024 tokens on the built-in pairs and save it; pad is eos, as in
    SmolLM.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(ROOT / "train/data/builtin/train.jsonl")], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(family="llama", dtype=torch.float32, seed=0, **overrides):
    """A random model of `family`: 2 or 3 layers, width 64, 4 heads, vocabulary 1,024; large initial
    weights, so that logits spread.
    """
    config_class, extra = FAMILIES[family]
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = config_class(**{**sizes, **SPECIAL_TOKENS, **extra, **overrides})
    torch.manual_seed(seed)
    # one draw for all dtypes
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return lm.to(dtype).eval()


def make_score_model(family="llama", dtype=torch.float32, seed=0, **overrides):
    """The same body with one number for a head, as transformers has it, in its own class."""
    body = make_model(family, torch.float32, seed, **overrides)
    body.config.num_labels = 1
    lm = transformers.AutoModelForSequenceClassification.from_config(
        body.config, dtype=torch.float32
    )
    lm.load_state_dict(body.state_dict(), strict=False)
    torch.manual_seed(seed + 100)
    torch.nn.init.normal_(lm.score.weight, std=0.3)
    return lm.to(dtype).eval()


def save_model(folder, family="llama", seed=0, **overrides):
    """Save a tiny model and the tokenizer in `folder` as a user's model directory; returns the
    folder's path.
    """
    lm = make_model(family, seed=seed, **overrides)
    lm.generation_config.max_length = 99  # its own, to be found again wherever a model is written
    lm.save_pretrained(folder)
    save_tokenizer(folder)
    return Path(folder)
