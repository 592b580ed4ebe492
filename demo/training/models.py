"""The checkpoint's parts: tokenizer, text encoder, autoencoder and denoiser, in diffusers' own classes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
HIDDEN, CHANNELS = 192, 16
CAPTION_STEP = 32  # captions are padded to a multiple of this
LONGEST_CAPTION = 64


def make_tokenizer(prompts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level pairs of words; every Chinese character stands alone, so that any wording of them is read."""
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex(r"\p{Han}|[，。、“”]"), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*prompts, *["user", "assistant", "\n"] * 200], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def tokenize(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts in their template, int64 [n, LONGEST_CAPTION], and their lengths, int64 [n]."""
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in prompts]
    coded = tokenizer(texts, padding="max_length", max_length=LONGEST_CAPTION, return_tensors="pt")
    if coded.input_ids.shape[1] > LONGEST_CAPTION:
        raise ValueError(f"a prompt has {coded.input_ids.shape[1]} tokens, more than {LONGEST_CAPTION}")
    return coded.input_ids, coded.attention_mask.sum(1)


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=16,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_reader(vocabulary: int) -> Qwen3Model:
    """The text encoder; like the real one it is read before its last layer."""
    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3Model(config)


def make_denoiser() -> ZImageTransformer2DModel:
    denoiser = ZImageTransformer2DModel(
        dim=HIDDEN,
        n_layers=8,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=HIDDEN,
        axes_dims=[16, 24, 24],
        axes_lens=[1024, 512, 512],
    )
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "adaLN_modulation" in name or name == "all_final_layer.2-1.linear.weight":
                parameter.mul_(0.1)
        denoiser.cap_pad_token.normal_(0, 0.02)
        denoiser.x_pad_token.normal_(0, 0.02)
    return denoiser


def read(reader: Qwen3Model, ids: Tensor) -> Tensor:
    """Caption features [n, length, HIDDEN]; padding on the right needs no mask, since reading is causal."""
    features: Tensor = reader(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
    return features


def save_checkpoint(folder: Path, tokenizer: Any, autoencoder: Any, reader: Any, denoiser: Any) -> None:
    """Write a ZImagePipeline folder in bfloat16."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
    pipeline = ZImagePipeline(
        scheduler=scheduler,
        vae=autoencoder.eval(),
        text_encoder=reader.eval(),
        tokenizer=tokenizer,
        transformer=denoiser.eval(),
    )
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folder)
