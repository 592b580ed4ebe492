"""Train the demo checkpoint: `python -m demo.train RUN_FOLDER`, resumed by the same command.

RUN_FOLDER gets the state of each stage to resume from (`autoencoder.pt`, `reader.pt`, `denoiser.pt`,
`decoder.pt`), `sheet.png` and `checkpoint/`, a ZImagePipeline folder in bfloat16, remade at every milestone.
With `--start CHECKPOINT` the first two stages are skipped and the denoiser goes on from that checkpoint.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline

from demo.training.autoencoder import sharpen_decoder, train_autoencoder
from demo.training.config import TrainConfig, load_config
from demo.training.data import make_scenes
from demo.training.denoiser import DenoiserTraining
from demo.training.models import (
    make_autoencoder,
    make_denoiser,
    make_reader,
    make_tokenizer,
    save_checkpoint,
    tokenize,
)
from demo.training.pools import Pools
from demo.training.reader import Captions, train_reader
from demo.training.samples import report_samples

PROBES = {(256, 256): 96, (512, 512): 32, (1024, 1024): 16, (768, 1344): 16, (1280, 720): 32}
STAGES = ("autoencoder", "reader", "denoiser", "decoder")


class Run:
    """The four stages over one folder; a stage whose state lies there is loaded instead of repeated."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device, start: Path | None) -> None:
        torch.manual_seed(config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.device = config, folder, device
        self.scenes = make_scenes(config.scenes, config.seed)
        if start:
            pipeline = ZImagePipeline.from_pretrained(str(start), dtype=torch.float32)
            self.tokenizer, self.autoencoder = pipeline.tokenizer, pipeline.vae
            self.reader, self.denoiser = pipeline.text_encoder, pipeline.transformer
        else:
            self.tokenizer = make_tokenizer(self.scenes.prompts[:60000], config.vocabulary)
            self.autoencoder, self.denoiser = make_autoencoder(), make_denoiser()
            self.reader = make_reader(len(self.tokenizer))
        for model in (self.autoencoder, self.reader, self.denoiser):
            model.to(device)
        print(f"{len(self.scenes)} scenes, {len(self.tokenizer)} tokens", flush=True)

    def autoencoder_stage(self) -> None:
        def train() -> None:
            train_autoencoder(self.autoencoder, self.scenes, self.config.autoencoder, self.device)

        self._once("autoencoder", self.autoencoder, train)

    def reader_stage(self) -> None:
        def train() -> None:
            answers = torch.from_numpy(self.scenes.answers).to(self.device)
            train_reader(self.reader, self._captions(self.scenes.prompts), answers, self.config.reader)

        self._once("reader", self.reader, train)

    def denoiser_stage(self) -> None:
        torch.manual_seed(self.config.seed + 1)
        training = DenoiserTraining(self.denoiser, self.reader, self.config.denoiser)
        if (self.folder / "denoiser.pt").exists():
            training.load(self.folder / "denoiser.pt")
        captions, empty = self._captions(self.scenes.prompts), self._captions([""])
        self.autoencoder.eval().requires_grad_(False)
        training.run(Pools(self.autoencoder, self.scenes, captions, empty, self.config.pools), self._milestone)
        training.swap_average()

    def decoder_stage(self) -> None:
        def train() -> None:
            sharpen_decoder(self.autoencoder, self.scenes, self.config.decoder, self.device)

        self._once("decoder", self.autoencoder, train)
        self._publish()

    def _captions(self, prompts: list[str]) -> Captions:
        ids, lengths = tokenize(self.tokenizer, prompts)
        return Captions(ids.to(self.device), lengths.to(self.device))

    def _once(self, stage: str, model: Any, train: Callable[[], None]) -> None:
        path = self.folder / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            model.load_state_dict(state["weights"])
            if state["scale"]:
                model.register_to_config(**state["scale"])
            return
        train()
        scaled = {name: model.config[name] for name in ("scaling_factor", "shift_factor") if hasattr(model, "encoder")}
        torch.save({"weights": model.state_dict(), "scale": scaled}, path)

    def _milestone(self, training: DenoiserTraining) -> None:
        """Save the state, then score and publish the averaged weights."""
        training.save(self.folder / "denoiser.pt")
        training.swap_average()
        self._publish()
        training.swap_average()

    def _publish(self) -> None:
        models = self.tokenizer, self.autoencoder, self.reader, self.denoiser
        print(f"all correct: {report_samples(models, PROBES, self.folder / 'sheet.png')}", flush=True)
        fresh = [copy.deepcopy(model) for model in models[1:]]
        partial, published = self.folder / "checkpoint.partial", self.folder / "checkpoint"
        save_checkpoint(partial, self.tokenizer, *fresh)
        shutil.rmtree(published, ignore_errors=True)
        partial.rename(published)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("train.toml"))
    parser.add_argument("--start", type=Path, help="go on from this checkpoint")
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    run = Run(load_config(arguments.config), arguments.run, device, arguments.start)
    for stage in arguments.stages or (STAGES[2:] if arguments.start else STAGES):
        getattr(run, f"{stage}_stage")()


if __name__ == "__main__":
    main()
