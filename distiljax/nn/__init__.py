"""Pure-functional Flax linen modules: no input or output, no training."""

from distiljax.nn.config import EncoderConfig
from distiljax.nn.encoder import Encoder, EncoderOutput
from distiljax.nn.heads import MaskedLM, MaskedLMOutput

__all__ = ["Encoder", "EncoderConfig", "EncoderOutput", "MaskedLM", "MaskedLMOutput"]
