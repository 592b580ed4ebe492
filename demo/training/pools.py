"""Encoded pictures kept on the device, one pool a size, and the batches drawn from them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.training.autoencoder import encode
from demo.training.config import Size
from demo.training.data import LANGUAGES, SceneArrays
from demo.training.models import CAPTION_STEP, LONGEST_CAPTION, read
from demo.training.reader import Captions

CAPTION_LENGTHS = tuple(range(CAPTION_STEP, LONGEST_CAPTION + 1, CAPTION_STEP))


@dataclass(frozen=True)
class Pool:
    """The first scenes' latents at one size, float16 [n, 16, h, w], and their captions by padded length."""

    latents: Tensor
    by_length: tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # float32 [B, 16, h, w]
    ids: Tensor  # int64 [B, L]
    lengths: Tensor  # int64 [B]
    features: Tensor | None = None  # bfloat16 [B, L, HIDDEN], once the text encoder no longer learns


class Pools:
    """Makes a size's pool when it is first asked for: `counts` says of how many scenes."""

    def __init__(
        self, autoencoder: Any, scenes: SceneArrays, captions: Captions, empty: Captions, counts: dict[Size, int]
    ) -> None:
        self.autoencoder, self.scenes, self.captions, self.empty = autoencoder, scenes, captions, empty
        self.counts = counts
        self.pools: dict[Size, Pool] = {}
        self.features: Tensor | None = None
        self.empty_features: Tensor | None = None

    def remember_captions(self, reader: Any) -> None:
        """Read every caption once, for a text encoder that no longer learns."""
        self.features = torch.cat([read_captions(reader, ids) for ids in torch.split(self.captions.ids, 4096)])
        self.empty_features = read_captions(reader, self.empty.ids)

    def batch(self, size: Size, tokens: int, empty_share: float) -> Batch:
        """As many pictures of one size and one caption length as fit the tokens."""
        pool = self.pools.get(size) or self._make(size)
        shares = torch.tensor([float(len(captions)) for captions in pool.by_length])
        which = int(torch.multinomial(shares, 1))
        length, candidates = CAPTION_LENGTHS[which], pool.by_length[which]
        count = max(4, tokens // (size[0] * size[1] // 256 + length))
        chosen = candidates[torch.randint(len(candidates), (count,), device=candidates.device)]
        latents = pool.latents[chosen // len(LANGUAGES)].float()
        # The empty prompt is a short one: it never meets the longer padding.
        share = empty_share if length == CAPTION_STEP else 0.0
        dropped = torch.rand(count, device=chosen.device) < share
        lengths = torch.where(dropped, self.empty.lengths, self.captions.lengths[chosen])
        ids = torch.where(dropped[:, None], self.empty.ids[:, :length], self.captions.ids[chosen, :length])
        return Batch(latents, ids, lengths, self._features(chosen, dropped, length))

    def _features(self, chosen: Tensor, dropped: Tensor, length: int) -> Tensor | None:
        if self.features is None or self.empty_features is None:
            return None
        features = self.features[chosen, :length]
        return torch.where(dropped[:, None, None], self.empty_features[:, :length], features)

    def _make(self, size: Size) -> Pool:
        count = min(self.counts[size], len(self.scenes))
        latents = encode(self.autoencoder, self.scenes.part(np.arange(count)), size, self.captions.ids.device)
        by_length = tuple(self.captions.of_length(length, count) for length in CAPTION_LENGTHS)
        self.pools[size] = Pool(latents, by_length)
        return self.pools[size]


@torch.no_grad()
def read_captions(reader: Any, ids: Tensor) -> Tensor:
    """Caption features without gradients, bfloat16 [n, L, HIDDEN]."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        return read(reader, ids).bfloat16()
