"""Prompts: from text to token ids as diffusers' pipeline makes them, and the cache of encoded ones."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Generic, TypeVar

from export.spec import CAPTION_MULTIPLE, MAX_PROMPT_TOKENS
from server.errors import InvalidRequestError
from server.requests import LongPrompt

TokenIds = tuple[int, ...]
T = TypeVar("T")


class PromptTokenizer:
    """The checkpoint's tokenizer with the chat template that the text encoder was trained on."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own deprecations
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")

    def encode(self, field: str, prompt: str, long_prompt: LongPrompt) -> TokenIds:
        """Token ids of the templated prompt, at most 512.

        Raises:
            InvalidRequestError: the prompt is longer and is not to be truncated.
        """
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids: list[int] = self._tokenizer(text)["input_ids"]
        if len(ids) > MAX_PROMPT_TOKENS and long_prompt is LongPrompt.REFUSE:
            raise InvalidRequestError(
                f"{field}: {len(ids)} tokens with the chat template around it are not accepted; {MAX_PROMPT_TOKENS} "
                "at most are. Shorten it, or set long_prompt to TRUNCATE (`zserve generate --truncate`) to have its "
                "end cut off"
            )
        return tuple(ids[:MAX_PROMPT_TOKENS])


def padded_length(ids: TokenIds) -> int:
    """The number of caption tokens that `ids` take: rounded up to 32, as the denoiser does."""
    return -(-len(ids) // CAPTION_MULTIPLE) * CAPTION_MULTIPLE


class PromptCache(Generic[T]):
    """The most recently used captions, by their prompts' token ids. Used by the device thread alone."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._captions: OrderedDict[TokenIds, T] = OrderedDict()

    def __contains__(self, ids: TokenIds) -> bool:
        return ids in self._captions

    def get(self, ids: TokenIds) -> T | None:
        """The caption of `ids`, if it is kept."""
        caption = self._captions.get(ids)
        if caption is not None:
            self._captions.move_to_end(ids)
        return caption

    def put(self, ids: TokenIds, caption: T) -> None:
        """Keeps `caption`, dropping the least recently used one when there are too many."""
        self._captions[ids] = caption
        if len(self._captions) > self._capacity:
            self._captions.popitem(last=False)

    def clear(self) -> None:
        """Drops everything: what a quarantined engine encoded is not to be used."""
        self._captions.clear()
