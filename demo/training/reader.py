"""Stage two: the text encoder learns to tell from a prompt what is to be drawn where."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.training.config import ReaderConfig
from demo.training.data import LANGUAGES, QUESTIONS
from demo.training.models import CAPTION_STEP, HIDDEN, read
from demo.training.progress import Progress


@dataclass(frozen=True)
class Captions:
    """Tokens of every scene's prompts, scene by scene and language by language, on the device."""

    ids: Tensor  # int64 [n * len(LANGUAGES), LONGEST_CAPTION]
    lengths: Tensor  # int64 [n * len(LANGUAGES)]

    def of_length(self, length: int, scenes: int) -> Tensor:
        """Which captions of the first `scenes` scenes are padded to `length`, int64 [m]."""
        lengths = self.lengths[: scenes * len(LANGUAGES)]
        padded = (lengths + CAPTION_STEP - 1) // CAPTION_STEP * CAPTION_STEP
        return torch.nonzero(padded == length)[:, 0]


def train_reader(reader: Any, captions: Captions, answers: Tensor, config: ReaderConfig) -> None:
    """Train in place with one classifier a question on the last token's features."""
    device = captions.ids.device
    classifiers = torch.nn.Linear(HIDDEN, sum(QUESTIONS)).to(device)
    trained = [*reader.to(device).train().parameters(), *classifiers.parameters()]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, betas=(0.9, 0.98))
    progress = Progress.of("reader", config)
    while progress.share < 1:
        fall = max(0.02, min(1, (1 - progress.share) / 0.5))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (progress.step + 1) / 100) * fall
        chosen = torch.randint(len(captions.ids), (config.batch,), device=device)
        told = _answers(reader, classifiers, captions.ids[chosen], captions.lengths[chosen])
        right = answers[chosen // len(LANGUAGES)]
        loss = torch.stack([F.cross_entropy(t, right[:, q]) for q, t in enumerate(told)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.step += 1
        if progress.step % 250 == 0 or progress.share >= 1:
            progress.report(loss=loss.item(), all_right=_share_right(told, right))


def _answers(reader: Any, classifiers: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast(ids.device.type, torch.bfloat16):
        features = read(reader, ids)
    last = features[torch.arange(len(ids), device=ids.device), lengths - 1].float()
    scores: Tensor = classifiers(F.rms_norm(last, (HIDDEN,)))
    return torch.split(scores, list(QUESTIONS), dim=1)


def _share_right(told: tuple[Tensor, ...], right: Tensor) -> float:
    named = torch.stack([t.argmax(1) for t in told], 1)
    return (named == right).all(1).float().mean().item()
