"""The training code: its forward equals diffusers', its pictures equal the renderer's, its run resumes."""

import numpy as np
import pytest
import torch

from demo.scenes import render, sample_scenes
from demo.training.data import QUESTIONS, pack_scenes
from demo.training.forward import denoise
from demo.training.models import make_denoiser, make_tokenizer, tokenize
from demo.training.noise import schedule
from demo.training.optimizer import orthogonalise
from demo.training.pictures import draw

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(128, 96), (96, 160)])
def test_torch_draws_what_numpy_renders(size: tuple[int, int]) -> None:
    scenes = sample_scenes(40, 0) + sample_scenes(12, 1, kind="character")
    drawn = (draw(pack_scenes(scenes, 0), size, CPU) * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()
    rendered = np.stack([render(scene, *size) for scene in scenes])
    assert np.abs(drawn - rendered).max() < 0.51 + 0.01


@pytest.mark.parametrize("size", [(16, 16), (10, 18)])
@torch.no_grad()
def test_forward_equals_diffusers(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    denoiser = make_denoiser()
    latents, caption = torch.randn(2, 16, *size), torch.randn(2, 64, 192)
    sigma, lengths = torch.tensor([0.9, 0.3]), torch.tensor([64, 40])
    ours = denoise(denoiser, latents, sigma, caption, lengths)
    words = [row[:length] for row, length in zip(caption, lengths, strict=True)]
    theirs = torch.stack(denoiser(list(latents.unsqueeze(2)), 1 - sigma, words, return_dict=False)[0]).squeeze(2)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_schedule_is_the_one_that_diffusers_visits() -> None:
    expected = [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0]
    assert torch.allclose(schedule(8), torch.tensor(expected), atol=1e-5)


def test_orthogonalise_makes_singular_values_about_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 48)).float())
    assert values.min() > 0.5 and values.max() < 1.5


def test_answers_fit_their_questions() -> None:
    answers = pack_scenes(sample_scenes(200, 4), 0).answers
    assert answers.min() >= 0
    assert (answers.max(0) < np.array(QUESTIONS)).all()


def test_every_chinese_character_is_one_token() -> None:
    prompts = pack_scenes(sample_scenes(600, 5), 0).prompts
    tokenizer = make_tokenizer(prompts, 768)
    ids, lengths = tokenize(tokenizer, prompts)
    assert lengths.max() <= 64
    chinese = {c for prompt in prompts for c in prompt if "一" <= c <= "鿿"}
    assert all(len(tokenizer.encode(character)) == 1 for character in chinese)
    assert (
        tokenizer.decode(ids[1][: lengths[1]]) == f"<|im_start|>user\n{prompts[1]}<|im_end|>\n<|im_start|>assistant\n"
    )
