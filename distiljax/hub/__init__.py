"""Interchange with Hugging Face: models, tokenizers and model cards, in and out."""

from distiljax.hub.card import model_card
from distiljax.hub.pretrained import from_pretrained, save_pretrained
from distiljax.hub.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size

__all__ = [
    "check_vocabulary",
    "from_pretrained",
    "load_tokenizer",
    "model_card",
    "save_pretrained",
    "vocabulary_size",
]
