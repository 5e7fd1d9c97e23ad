"""The Gemma decoder, of either generation, as one small torch module with static KV-cache inputs.

What a generation adds, windows, soft-caps and norms, is in the configuration. The module is written in plain
torch operators and used twice: traced, it is the source of every graph; run eagerly, layer by layer in fp32,
it is the reference that bundles are held against.

Symbols in the shape comments: B batch, T tokens, S slots of a layer's cache, d hidden size, H query heads,
K KV heads, G = H / K query heads per KV head, h head_dim, f width of one of gate and up, V vocabulary.

Sources: Gemma report (arXiv 2403.08295) section 2; Gemma 2 report (arXiv 2408.00118) section 2;
google/gemma_pytorch `gemma/model.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_export.exporter.config import GemmaConfig
from gemma_export.runtime.rolling import RollingCache


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), the sum of squares and the gain in fp32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last axis of x."""
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.epsilon) * (1.0 + self.weight)


def rotary_frequencies(config: GemmaConfig) -> Tensor:
    """The frequency of every pair of channels, fp32 [h / 2].

    Frequencies and angles are rounded to fp32 as the reference implementations round them: at position 8191
    an angle held in more digits would differ from theirs by up to 5e-4 radians.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (config.rope_theta**exponents)


def rotary_tables(config: GemmaConfig, max_length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, fp32 [max_length, h / 2] each."""
    angles = torch.arange(max_length, dtype=torch.float32)[:, None] * rotary_frequencies(config)[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + h/2) of x [B, heads, T, h] by angles given as cos, sin [B, 1, T, h/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def causal_mask(position_ids: Tensor, max_length: int, window: int | None = None) -> Tensor:
    """Additive mask [B, 1, T, S] of a cache with a slot for every position: 0 where a query sees a slot.

    It does where position - window < slot <= position; elsewhere stands a finite minimum. Finite, so that a
    row can never become 0/0; a minimum of another dtype would turn to -inf in fp16.

    Args:
        position_ids: int64 [B, T].
        max_length: S.
        window: Tokens that are seen, the position's own among them; None for all before it.
    """
    slots = torch.arange(max_length, device=position_ids.device)[None, None, None, :]
    positions = position_ids[:, None, :, None]
    visible = slots <= positions
    if window is not None:
        visible = visible & (slots > positions - window)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def rolling_mask(position_ids: Tensor, slots: int, window: int) -> Tensor:
    """Additive mask [B, 1, T, S] of a rolling cache, where position p lies in slot p mod S.

    Of the positions that share a slot it holds the last that was written. A query sees it where a query
    over all positions would, and never what was not written yet.

    Args:
        position_ids: int64 [B, T], consecutive in each row; they are written before the mask is used.
        slots: S, at least window + T - 1: less, and a step would overwrite what its first query sees.
        window: Tokens that are seen, the position's own among them.
    """
    slot = torch.arange(slots, device=position_ids.device)[None, None, None, :]
    positions, last = position_ids[:, None, :, None], position_ids[:, None, -1:, None]
    # Nothing negative is divided: runtimes do not agree on what remains of that.
    held = last - (last + (slots - slot)) % slots  # [B, 1, 1, S]
    visible = (held <= positions) & (held > positions - window) & (held >= 0)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def written_slots(position_ids: Tensor, rolling: RollingCache) -> Tensor:
    """The slots of a rolling cache that a step writes: position mod S, int64 [B, T].

    Of a step of more tokens than it may have they lie outside of the cache, which no runtime writes: it
    fails, instead of overwriting what the step's first query sees.
    """
    first, last = position_ids[:, :1], position_ids[:, -1:]
    outside = torch.where(last - first >= rolling.chunk, rolling.slots, 0)  # [B, 1]
    return position_ids % rolling.slots + outside


def layer_masks(
    config: GemmaConfig, position_ids: Tensor, max_length: int, rolling: RollingCache | None = None
) -> list[Tensor]:
    """The mask of every layer [B, 1, T, S]; layers of one kind have one and the same.

    Args:
        config: Says which layers are local.
        position_ids: int64 [B, T].
        max_length: Positions there are, and slots of a layer that does not roll.
        rolling: The caches of the local layers, where they roll.
    """

    def mask(window: int | None) -> Tensor:
        if window is None or rolling is None:
            return causal_mask(position_ids, max_length, window)
        return rolling_mask(position_ids, rolling.slots, window)

    masks = {window: mask(window) for window in dict.fromkeys(config.windows)}
    return [masks[window] for window in config.windows]


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """The soft-cap cap · tanh(x / cap): x where x is small, and never beyond the cap. For None, x itself."""
    return x if cap is None else torch.tanh(x / cap) * cap


class Attention(nn.Module):
    """Multi-query, grouped or multi-head attention over a static cache."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_dim = (
            config.num_query_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        size, kv_size = config.num_query_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)  # [B, heads, T, h]

    def forward(
        self,
        x: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends over the cache; arguments and results are those of the block."""
        q = rotate(self._heads(self.q_proj(x), self.query_heads), cos, sin)  # [B, H, T, h]
        k = rotate(self._heads(self.k_proj(x), self.kv_heads), cos, sin)  # [B, K, T, h]
        v = self._heads(self.v_proj(x), self.kv_heads)
        written = slots[:, None, :, None].expand(k.shape)
        key = key.scatter(2, written, k)  # [B, K, S, h]
        value = value.scatter(2, written, v)
        # The G query heads of one KV head follow each other, so folding them into the rows is a reshape.
        grouped = q.reshape(q.shape[0], self.kv_heads, -1, q.shape[2], self.head_dim)  # [B, K, G, T, h]
        scores = grouped @ key[:, :, None].transpose(-1, -2) * self.scale  # [B, K, G, T, S]
        scores = soft_cap(scores, self.softcap)  # Before the mask: what is masked has no cap.
        weights = torch.softmax(scores + mask[:, :, None], dim=-1)
        attended = (weights @ value[:, :, None]).reshape(q.shape)  # [B, H, T, h]
        merged = attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)  # [B, T, H·h]
        return self.o_proj(merged), key, value


class GatedMLP(nn.Module):
    """GeGLU: down(gelu_tanh(gate(x)) · up(x)).

    The activation is the tanh approximation whatever a config calls it: the models were trained with it.
    """

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [B, T, d] to the same."""
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x)); post-norms go around attention and MLP."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.config = config
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def mlp_norm(self) -> RMSNorm:
        """The norm whose output the MLP reads."""
        return self.pre_feedforward_layernorm if self.config.post_norms else self.post_attention_layernorm

    def forward(
        self,
        x: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the block.

        Args:
            x: Hidden states [B, T, d].
            slots: int64 [B, T], consecutive in each row: the cache slots that are written.
            cos: Cosines of the positions' angles [B, 1, T, h/2].
            sin: Sines, likewise.
            mask: Additive mask [B, 1, T, S].
            key: This layer's key cache [B, K, S, h].
            value: This layer's value cache, likewise.

        Returns:
            Hidden states [B, T, d] and the two updated caches.
        """
        attended, key, value = self.self_attn(self.input_layernorm(x), slots, cos, sin, mask, key, value)
        if not self.config.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), key, value
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), key, value


class Decoder(nn.Module):
    """The whole model. Its parameters carry the canonical names of `docs/design.md`.

    Args:
        config: The shape.
        max_length: Positions there are: rows of the rotary tables, and slots of a cache that does not roll.
        all_logits: Whether the head reads every token or only the last.
        rolling: The caches of the local layers, where they roll; None where every cache has a slot for each
            position.
    """

    rotary_cos: Tensor  # [max_length, h/2]
    rotary_sin: Tensor  # [max_length, h/2]

    def __init__(
        self,
        config: GemmaConfig,
        max_length: int,
        *,
        all_logits: bool = False,
        rolling: RollingCache | None = None,
    ) -> None:
        super().__init__()
        self.config, self.max_length, self.all_logits = config, max_length, all_logits
        self.rolling = rolling
        self.embedding_scale: float = config.hidden_size**0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rows = (max_length, config.head_dim // 2)
        self.register_buffer("rotary_cos", torch.empty(rows), persistent=True)
        self.register_buffer("rotary_sin", torch.empty(rows), persistent=True)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs T tokens of each row.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], consecutive in each row, below `max_length`. What they write into a
                rolling cache must not go on at its first slot.
            past_key_values: key and value cache of each layer in turn, 2·layers tensors [B, K, S, h].

        Returns:
            Logits [B, 1, V], or [B, T, V] with `all_logits`, and the updated caches in the same order.
        """
        states, presents = self.run_layers(self.embed(input_ids), position_ids, past_key_values)
        return self.head(states[-1]), presents

    def embed(self, input_ids: Tensor) -> Tensor:
        """Scaled embeddings [B, T, d]."""
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded * self.embedding_scale

    def run_layers(
        self, x: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All layers: hidden states [B, T, d] before the first and after each, and the updated caches."""
        masks = layer_masks(self.config, position_ids, self.max_length, self.rolling)
        cos = self.rotary_cos[position_ids][:, None]  # [B, 1, T, h/2]
        sin = self.rotary_sin[position_ids][:, None]
        rolled = position_ids if self.rolling is None else written_slots(position_ids, self.rolling)
        states, presents = [x], list[Tensor]()
        for i, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            slots = position_ids if window is None else rolled
            key, value = past_key_values[2 * i], past_key_values[2 * i + 1]
            x, key, value = layer(states[-1], slots, cos, sin, masks[i], key, value)
            states.append(x)
            presents += [key, value]
        return states, presents

    def head(self, x: Tensor) -> Tensor:
        """Logits of the last token [B, 1, V], or of all with `all_logits`."""
        if not self.all_logits:
            x = x[:, -1:]
        return soft_cap(F.linear(self.norm(x), self.embed_tokens.weight), self.config.final_softcap)
