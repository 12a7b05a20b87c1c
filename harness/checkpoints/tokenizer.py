"""A byte-level tokenizer made offline: every byte is a token, a few merges, and the family's own named tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
"""Ends generation."""

VOCABULARY = 320
"""Size of the models' embedding tables: the tokens, padded to a multiple of 64."""

_TEXT = ["describe the image and the video and what the audio says in one or two words"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type in placeholders %}{{ placeholders[part.type] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(placeholders: dict[str, str]) -> str:
    """A chat template that puts the placeholder where an image, a video or audio stands in a message."""
    return "{% set placeholders = " + repr(placeholders) + " %}" + CHAT_TEMPLATE


def build(special_tokens: Sequence[str] = (), **named_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer.

    Args:
        special_tokens: tokens of the family beside those below.
        named_tokens: those that its processor asks for by name, such as image_token="<|image_pad|>".
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = dict.fromkeys(["<|endoftext|>", "<|im_start|>", END_OF_TURN, *special_tokens, *named_tokens.values()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        extra_special_tokens=named_tokens,
    )
