"""The sizes that were released, each number with its source, and where they are published.

Reports count gate and up together: their feed-forward figure is twice `intermediate_size`. They also count a
padded table of 256128 rows; the released tables have 256000.
"""

from collections.abc import Mapping
from typing import Any

# "Gemma: Open Models Based on Gemini Research and Technology" (arXiv 2403.08295), table 1.
_GEMMA = {
    "vocab_size": 256_000,  # rows of the released table
    "head_dim": 256,  # head size: for 7B it is not 3072 / 16
    "context_length": 8192,  # section 2, "trained on a context length of 8192 tokens"
}

# "Gemma 2: Improving Open Language Models at a Practical Size" (arXiv 2408.00118), table 1 and section 2.
# What they leave open is from google/gemma_pytorch `gemma/config.py` and the released `config.json`.
_GEMMA_2 = {
    "family": "gemma2",
    "vocab_size": 256_000,  # rows of the released table
    "context_length": 8192,  # table 1, global attention span
    "sliding_window": 4096,  # table 1, sliding window
    "attention_softcap": 50.0,  # section 2, soft_cap of the self-attention layers
    "final_softcap": 30.0,  # section 2, soft_cap of the final layer
    "post_norms": True,  # table 1, pre-norm and post-norm
}

RELEASED: Mapping[str, Mapping[str, Any]] = {
    "2b": _GEMMA
    | {
        "name": "gemma-2b",
        "hidden_size": 2048,  # d_model
        "num_layers": 18,  # layers
        "num_query_heads": 8,  # num heads
        "num_kv_heads": 1,  # num KV heads: multi-query attention
        "intermediate_size": 16_384,  # feedforward hidden dims 32768, halved
    },
    "7b": _GEMMA
    | {
        "name": "gemma-7b",
        "hidden_size": 3072,  # d_model
        "num_layers": 28,  # layers
        "num_query_heads": 16,  # num heads
        "num_kv_heads": 16,  # num KV heads: multi-head attention
        "intermediate_size": 24_576,  # feedforward hidden dims 49152, halved
    },
    "gemma2-2b": _GEMMA_2
    | {
        "name": "gemma-2-2b",
        "hidden_size": 2304,  # d_model
        "num_layers": 26,  # layers
        "layer_kinds": ("local", "global") * 13,  # gemma_pytorch, attn_types: the first is local
        "num_query_heads": 8,  # num heads
        "num_kv_heads": 4,  # num KV heads
        "head_dim": 256,  # head size
        "intermediate_size": 9216,  # feedforward dim 18432, halved
        "query_pre_attn_scalar": 256,  # config.json; the head size
    },
    "gemma2-9b": _GEMMA_2
    | {
        "name": "gemma-2-9b",
        "hidden_size": 3584,  # d_model
        "num_layers": 42,  # layers
        "layer_kinds": ("local", "global") * 21,  # gemma_pytorch, attn_types
        "num_query_heads": 16,  # num heads
        "num_kv_heads": 8,  # num KV heads
        "head_dim": 256,  # head size
        "intermediate_size": 14_336,  # feedforward dim 28672, halved
        "query_pre_attn_scalar": 256,  # config.json; the head size, not 3584 / 16
    },
    "gemma2-27b": _GEMMA_2
    | {
        "name": "gemma-2-27b",
        "hidden_size": 4608,  # d_model
        "num_layers": 46,  # layers
        "layer_kinds": ("local", "global") * 23,  # gemma_pytorch, attn_types
        "num_query_heads": 32,  # num heads
        "num_kv_heads": 16,  # num KV heads
        "head_dim": 128,  # head size
        "intermediate_size": 36_864,  # feedforward dim 73728, halved
        "query_pre_attn_scalar": 144,  # gemma_pytorch: 4608 / 32, and not the head size
    },
}
"""The fields of `config.GemmaConfig`, by size."""

# Where the local Hugging Face cache is looked up, in this order: the base model, then its relatives.
REPOSITORIES: Mapping[str, tuple[str, ...]] = {
    "2b": (
        "google/gemma-2b",
        "google/gemma-1.1-2b-it",
        "google/gemma-2b-it",
        "google/codegemma-2b",
        "google/codegemma-1.1-2b",
    ),
    "7b": (
        "google/gemma-7b",
        "google/gemma-1.1-7b-it",
        "google/gemma-7b-it",
        "google/codegemma-7b",
        "google/codegemma-7b-it",
        "google/codegemma-1.1-7b-it",
    ),
    "gemma2-2b": ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    "gemma2-9b": ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    "gemma2-27b": ("google/gemma-2-27b", "google/gemma-2-27b-it"),
}
"""Where a size is published, the base model first."""
