"""The training run's one config file, as frozen dataclasses."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Size = tuple[int, int]


@dataclass(frozen=True)
class AutoencoderConfig:
    steps: int
    limit_seconds: float
    learning_rate: float
    latent_noise: float
    latent_penalty: float
    pixels: int
    sizes: tuple[Size, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class ReaderConfig:
    steps: int
    limit_seconds: float
    learning_rate: float
    batch: int


@dataclass(frozen=True)
class Phase:
    """Batches are spread over `sizes` by `weights` until the share `until` of the run."""

    until: float
    sizes: tuple[Size, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class DenoiserConfig:
    steps: int
    limit_seconds: float
    tokens: int
    learning_rate: float
    reader_rate: float
    reader_until: float
    warmup_steps: int
    decay_from: float
    ema: float
    empty_prompts: float
    on_schedule: float
    pure_noise: float
    muon: bool
    milestones: tuple[float, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    scenes: int
    vocabulary: int
    autoencoder: AutoencoderConfig
    reader: ReaderConfig
    denoiser: DenoiserConfig
    decoder: AutoencoderConfig
    pools: dict[Size, int]


def load_config(path: Path) -> TrainConfig:
    """Read a config file; an unknown or a missing key is a TypeError that names it."""
    raw = tomllib.loads(path.read_text())
    autoencoder, denoiser, decoder = (raw.pop(stage) for stage in ("autoencoder", "denoiser", "decoder"))
    autoencoder |= _weighted_sizes(autoencoder["sizes"])
    decoder |= _weighted_sizes(decoder["sizes"])
    denoiser["milestones"] = tuple(denoiser["milestones"])
    denoiser["phases"] = tuple(_phase(phase) for phase in denoiser["phases"])
    return TrainConfig(
        autoencoder=AutoencoderConfig(**autoencoder),
        reader=ReaderConfig(**raw.pop("reader")),
        denoiser=DenoiserConfig(**denoiser),
        decoder=AutoencoderConfig(**decoder),
        pools={(w, h): count for w, h, count in raw.pop("pools")},
        **raw,
    )


def _phase(raw: dict[str, Any]) -> Phase:
    return Phase(until=raw["until"], **_weighted_sizes(raw["sizes"]))


def _weighted_sizes(rows: list[list[Any]]) -> dict[str, Any]:
    return {"sizes": tuple((w, h) for w, h, _ in rows), "weights": tuple(weight for *_, weight in rows)}
