"""Everything about the prompt that does not depend on the timestep, so it runs once per prompt and can be cached."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from export.modules.blocks import Foreign, block, rms_norm
from export.modules.denoiser import caption_positions
from export.modules.rope import RotaryTables


class PromptEncoder(nn.Module):
    """`input_ids` int64 [B,T], `caption_length` int64 [B] -> caption fp32 [B,T,dim]. T is a multiple of 32.

    Qwen3 without its last layer and final norm (diffusers reads `hidden_states[-2]`), the denoiser's caption embedder,
    the learned pad token past each row's length, and the context refiners. Causal attention makes a mask for the
    right padding unnecessary. Exact when T is each row's own length rounded up to 32. Shares all weights.
    """

    def __init__(self, text_encoder: Foreign, transformer: Foreign) -> None:
        super().__init__()
        config = transformer.config
        self.embed_tokens = text_encoder.embed_tokens
        self.rotary_emb = text_encoder.rotary_emb
        self.layers = nn.ModuleList(list(text_encoder.layers)[:-1])
        self.cap_embedder = transformer.cap_embedder
        self.cap_pad_token = transformer.cap_pad_token
        self.context_refiner = transformer.context_refiner
        self.rope = RotaryTables(config.axes_dims, config.axes_lens, config.rope_theta)
        self.run_layers = run_layers  # or `export.modules.fused_encoder.run_layers`

    def forward(self, input_ids: Tensor, caption_length: Tensor) -> Tensor:
        hidden = self._read(input_ids)
        length = input_ids.shape[1]
        norm, linear = self.cap_embedder[0], self.cap_embedder[1]
        caption = linear(rms_norm(norm, hidden))
        past_end = torch.arange(length, device=input_ids.device).unsqueeze(0) >= caption_length.unsqueeze(1)
        caption = torch.where(past_end.unsqueeze(-1), self.cap_pad_token.to(caption.dtype), caption)
        rotation = self.rope(caption_positions(length, input_ids.device))
        for layer in self.context_refiner:
            caption = block(layer, caption, rotation)
        return caption.float()

    def _read(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids)
        # Expanded to the batch: ONNX's rotary node wants tables as large as its input.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape)
        return self.run_layers(self.layers, hidden, positions, self.rotary_emb(hidden, positions))


def run_layers(layers: Iterable[Foreign], hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """`hidden` [B, T, width] through all of Qwen3's `layers`; `rotation`: cosines and sines [B, T, head_dim]."""
    for layer in layers:
        hidden = run_layer(layer, hidden, positions, rotation)
    return hidden


def run_layer(layer: Foreign, hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """One layer, as transformers computes it."""
    output: Tensor = layer(hidden, attention_mask=None, position_embeddings=rotation, position_ids=positions)
    return output
