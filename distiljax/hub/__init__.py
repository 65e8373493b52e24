"""Interchange with Hugging Face: models, tokenizers and model cards, in and out."""

from distiljax.hub.card import model_card
from distiljax.hub.pretrained import Model, check_head, from_pretrained, save_pretrained, with_head
from distiljax.hub.task_card import task_card
from distiljax.hub.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size

__all__ = [
    "Model",
    "check_head",
    "check_vocabulary",
    "from_pretrained",
    "load_tokenizer",
    "model_card",
    "save_pretrained",
    "task_card",
    "vocabulary_size",
    "with_head",
]
