"""Pure-functional Flax linen modules: no input or output, no training."""

from distiljax.nn.config import EncoderConfig
from distiljax.nn.encoder import Encoder, EncoderOutput
from distiljax.nn.heads import HeadConfig, MaskedLM, MaskedLMOutput, TaskModel

__all__ = [
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "HeadConfig",
    "MaskedLM",
    "MaskedLMOutput",
    "TaskModel",
]
