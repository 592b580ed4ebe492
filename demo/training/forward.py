"""The denoiser's forward for training: diffusers' weights and arithmetic on whole batches, in two compiled blocks.

Written with real rotations and with every weight handed in, so that one compiled graph serves all layers and all
sizes. `tests/unit/demo/test_training.py` holds it equal to diffusers.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_TO = 32  # image tokens are padded to a multiple of this
torch._dynamo.config.recompile_limit = 64


def denoise(denoiser: Any, latents: Tensor, sigma: Tensor, caption: Tensor, lengths: Tensor) -> Tensor:
    """The model's raw output (picture minus noise), float32 [B, C, h, w].

    `caption` [B, L, HIDDEN] has L a multiple of 32 and `lengths` [B] real tokens, more than L - 32 in each row.
    The arithmetic's type is the caption's.
    """
    dtype = caption.dtype
    time = _linear(denoiser.t_embedder.mlp[2], F.silu(_time_hidden(denoiser, 1 - sigma, dtype)))
    image_turns, caption_turns = _rotations(denoiser, latents.shape[2] // 2, latents.shape[3] // 2, caption.shape[1])
    image = _pad(_linear(denoiser.all_x_embedder["2-1"], _patches(latents).to(dtype)), denoiser.x_pad_token)
    for block in denoiser.noise_refiner:
        image = run_block(block, image, image_turns, time)
    words = _linear(denoiser.cap_embedder[1], _rms_norm(caption, denoiser.cap_embedder[0].weight))
    padded = torch.arange(caption.shape[1], device=caption.device) >= lengths[:, None]
    words = torch.where(padded[..., None], denoiser.cap_pad_token.to(dtype), words)
    for block in denoiser.context_refiner:
        words = run_block(block, words, caption_turns, None)
    tokens, turns = torch.cat([image, words], 1), torch.cat([image_turns, caption_turns], 1)
    for block in denoiser.layers:
        tokens = run_block(block, tokens, turns, time)
    return _unpatch(_final(denoiser.all_final_layer["2-1"], tokens, time), latents)


def run_block(block: Any, tokens: Tensor, turns: Tensor, time: Tensor | None) -> Tensor:
    """One transformer block, compiled on a GPU."""
    attention, feed_forward = block.attention, block.feed_forward
    weights = (
        *(attention.to_q.weight, attention.to_k.weight, attention.to_v.weight, attention.to_out[0].weight),
        *(attention.norm_q.weight, attention.norm_k.weight),
        *(block.attention_norm1.weight, block.attention_norm2.weight),
        *(block.ffn_norm1.weight, block.ffn_norm2.weight),
        *(feed_forward.w1.weight, feed_forward.w2.weight, feed_forward.w3.weight),
    )
    modulation = None if time is None else _linear(block.adaLN_modulation[0], time)
    compute = _compiled_block() if tokens.is_cuda and torch.is_grad_enabled() else _block
    result: Tensor = compute(tokens, turns, modulation, weights)
    return result


@cache
def _compiled_block() -> Any:
    return torch.compile(_block, dynamic=True, fullgraph=True)


def _block(tokens: Tensor, turns: Tensor, modulation: Tensor | None, weights: tuple[Tensor, ...]) -> Tensor:
    attend, (before1, after1, before2, after2), mlp = weights[:6], weights[6:10], weights[10:]
    if modulation is None:
        tokens = tokens + _rms_norm(_attention(_rms_norm(tokens, before1), turns, attend), after1)
        return tokens + _rms_norm(_feed_forward(_rms_norm(tokens, before2), mlp), after2)
    scale1, gate1, scale2, gate2 = modulation.unsqueeze(1).chunk(4, dim=2)
    attended = _attention(_rms_norm(tokens, before1) * (1 + scale1), turns, attend)
    tokens = tokens + gate1.tanh() * _rms_norm(attended, after1)
    widened = _feed_forward(_rms_norm(tokens, before2) * (1 + scale2), mlp)
    return tokens + gate2.tanh() * _rms_norm(widened, after2)


def _attention(tokens: Tensor, turns: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    to_q, to_k, to_v, to_out, norm_q, norm_k = weights
    heads = to_q.shape[0] // norm_q.shape[0]
    query, key, value = (
        F.linear(tokens, w.to(tokens.dtype)).view(*tokens.shape[:2], heads, -1) for w in (to_q, to_k, to_v)
    )
    query, key = _turn(_rms_norm(query, norm_q), turns), _turn(_rms_norm(key, norm_k), turns)
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return F.linear(mixed.transpose(1, 2).flatten(2), to_out.to(tokens.dtype))


def _feed_forward(tokens: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    w1, w2, w3 = (w.to(tokens.dtype) for w in weights)
    return F.linear(F.silu(F.linear(tokens, w1)) * F.linear(tokens, w3), w2)


def _rms_norm(values: Tensor, weight: Tensor) -> Tensor:
    wide = values.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight).to(values.dtype)


def _turn(values: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [B, S, heads, 2k] by `turns`, cosines and sines [1, S, 2, k]."""
    cosine, sine = turns[:, :, None, 0], turns[:, :, None, 1]
    first, second = values.float().view(*values.shape[:-1], -1, 2).unbind(-1)
    pairs = first * cosine - second * sine, first * sine + second * cosine
    return torch.stack(pairs, -1).flatten(-2).to(values.dtype)


def _rotations(denoiser: Any, rows: int, columns: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [1, tokens, 2, k], of the padded image's and of the caption's positions."""
    device = denoiser.x_pad_token.device
    tokens = rows * columns
    image = torch.zeros(tokens + (-tokens) % PAD_TO, 3, dtype=torch.int64, device=device)
    image[:tokens, 0] = length + 1
    image[:tokens, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    image[:tokens, 2] = torch.arange(columns, device=device).repeat(rows)
    caption = torch.zeros(length, 3, dtype=torch.int64, device=device)
    caption[:, 0] = torch.arange(1, length + 1, device=device)
    image_turns, caption_turns = (denoiser.rope_embedder(ids) for ids in (image, caption))
    return _cosines(image_turns), _cosines(caption_turns)


def _cosines(turns: Tensor) -> Tensor:
    return torch.stack([turns.real, turns.imag], 1)[None]


def _time_hidden(denoiser: Any, time: Tensor, dtype: torch.dtype) -> Tensor:
    embedder = denoiser.t_embedder
    waves = embedder.timestep_embedding(time * denoiser.t_scale, embedder.frequency_embedding_size)
    return _linear(embedder.mlp[0], waves.to(dtype))


def _final(layer: Any, tokens: Tensor, time: Tensor) -> Tensor:
    scale = 1 + _linear(layer.adaLN_modulation[1], F.silu(time))
    normed = F.layer_norm(tokens.float(), (tokens.shape[-1],), eps=1e-6).to(tokens.dtype)
    return _linear(layer.linear, normed * scale[:, None])


def _linear(layer: Any, values: Tensor) -> Tensor:
    return F.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))


def _pad(tokens: Tensor, pad: Tensor) -> Tensor:
    missing = (-tokens.shape[1]) % PAD_TO
    return torch.cat([tokens, pad.to(tokens.dtype).expand(tokens.shape[0], missing, -1)], 1) if missing else tokens


def _patches(latents: Tensor) -> Tensor:
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def _unpatch(tokens: Tensor, latents: Tensor) -> Tensor:
    b, c, h, w = latents.shape
    patches = tokens[:, : h * w // 4].float().view(b, h // 2, w // 2, 2, 2, c)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
