"""Which program computes attention, and those that are one kernel, which never writes the [S, S] weights to memory.

On an NVIDIA GPU that is cuDNN's, through `jax.nn.dot_product_attention`; on a TPU it is JAX's splash attention, written
in Pallas (FlashAttention: Dao et al. 2022). Neither drops attention weights as `linear.dropout` does, with draws that
depend on the example alone, and both multiply in 16 bits. On a CPU `rowwise` is the best that XLA gives. Where none of
these serves, there is the plain form of `attention.SelfAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from distiljax.nn.linear import Array, DType
from distiljax.nn.rowwise import heads_at_once, rows_at_once
from distiljax.nn.target import target, target_platform

CHOICES = ("auto", "plain", "fused")
PLAIN, ROWWISE, CUDNN, SPLASH = "plain", "rowwise", "cudnn", "splash"

_CUDNN_MAX_HEAD = 128
_CUDNN_CAPABILITY = 8.0
# For these the TPU's kernel compiler has no product of bfloat16.
_TPUS_WITHOUT = ("TPU v2", "TPU v3")
_NEEDED = {"gpu": "an NVIDIA GPU of compute capability 8.0 or above", "tpu": "a TPU v4 or a later one"}
# The kernel's blocks are multiples of a TPU's 128 lanes; with one block to a row its softmax needs no second pass.
_LANES = 128
_BLOCKS = (512, 384, 256, 128)
# What surrounds the kernel moves more memory than the plain form does where rows are shorter.
_SPLASH_FROM = 256


@struct.dataclass
class Visible:
    """Which keys a query sees: those whose number is its own.

    Attributes:
      queries: int32 [B, S], or [B, 1] where it is the same for all.
      keys: int32 [B, S].
    """

    queries: Array
    keys: Array

    @classmethod
    def of(cls, attention_mask: Array | None, segment_ids: Array | None) -> Visible | None:
        """None where every query sees all keys.

        With `segment_ids` [B, S] (0 = padding) a query sees the keys of its own segment only. With `attention_mask`
        [B, S] (1 = token, 0 = padding) every query sees all tokens, as in transformers; in a row without a token, its
        padding. So there is no query that sees nothing, of which kernels give what they like.
        """
        if segment_ids is not None:
            return cls(segment_ids, segment_ids)
        if attention_mask is not None:
            keys = (attention_mask > 0).astype(jnp.int32)
            return cls(keys.max(1, keepdims=True), keys)
        return None

    @property
    def mask(self) -> Array:
        """bool [B, 1, S, S] or [B, 1, 1, S]: for each query, the keys that it sees."""
        return self.queries[:, None, :, None] == self.keys[:, None, None, :]


class Choice(NamedTuple):
    """A kernel, and in words why it is that one.

    Attributes:
      kernel: "plain", "rowwise", "cudnn" or "splash".
      why: for the log.
    """

    kernel: str
    why: str

    @property
    def fused(self) -> bool:
        """Whether the [S, S] weights never reach the memory."""
        return self.kernel in (CUDNN, SPLASH)


def choose(
    attention: str,
    *,
    platform: str,
    dtype: DType,
    dropout: float,
    shape: tuple[int, int, int, int],
    capable: bool | None = None,
    spread: bool = False,
) -> Choice:
    """The kernel that computes attention.

    Args:
      attention: "auto" (the one that serves best), "plain" or "fused".
      platform: that the program is for: "cpu", "gpu" or "tpu".
      dtype: compute dtype.
      dropout: rate at which attention weights are dropped now; 0 in evaluation.
      shape: (B, H, S, D), that of the queries.
      capable: whether the platform's fused kernel runs on the devices; None for those that the program is for.
      spread: whether the compiler may split the program over devices; see `may_be_spread`.

    Raises:
      ValueError: an unknown choice, or "fused" where it cannot be, with what can.
    """
    if attention not in CHOICES:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(CHOICES)}")
    if attention == "plain":
        return Choice(PLAIN, "set so")
    dtype = jnp.dtype(dtype)
    obstacle = _obstacle(platform, dtype, dropout, shape, capable, spread)
    if attention == "fused" and obstacle is not None:
        raise ValueError(f"attention is fused, but {obstacle}; expected plain or auto there")
    if platform == "cpu":
        rows, heads = rows_at_once(shape), heads_at_once(shape)
        if (rows, heads) != shape[:2]:
            parts = f"{rows} of {shape[0]} rows" + (
                f", {heads} of {shape[1]} heads" if heads < shape[1] else ""
            )
            return Choice(ROWWISE, f"{parts} at once, for the CPU's cache")
        return Choice(PLAIN, "its weights fit the CPU's cache")
    if obstacle is not None:
        return Choice(PLAIN, obstacle)
    if platform == "tpu" and attention == "auto" and shape[2] < _SPLASH_FROM:
        return Choice(PLAIN, f"rows of {shape[2]} tokens are too short for a kernel to move less memory")
    return Choice(CUDNN if platform == "gpu" else SPLASH, f"fused on {platform} in {dtype.name}")


def choose_for(
    module: Any,
    *,
    platform: str,
    training: bool,
    rows: int,
    seq_lens: Sequence[int],
    capable: bool | None = None,
    spread: bool = False,
) -> Choice:
    """The kernel of a module's attention; with several row lengths that of the longest.

    Args:
      module: an `Encoder` or one with a head.
      training: whether it drops what its config says.
      rows: B, that a device computes at once.
      seq_lens: the row lengths that it will read.
      platform, capable, spread: as in `choose`.

    Raises:
      ValueError: its `attention` is unknown, or "fused" where it cannot be.
    """
    config = module.config
    dropout = config.attention_dropout if training else 0.0
    choices = [
        choose(
            module.attention,
            platform=platform,
            dtype=module.dtype,
            dropout=dropout,
            shape=(rows, config.num_heads, seq_len, config.head_size),
            capable=capable,
            spread=spread,
        )
        for seq_len in sorted(seq_lens)
    ]
    return choices[-1]


def _obstacle(
    platform: str,
    dtype: jnp.dtype,
    dropout: float,
    shape: tuple[int, int, int, int],
    capable: bool | None,
    spread: bool,
) -> str | None:
    """Why a fused kernel cannot be used; None if one can."""
    *_, S, D = shape
    if platform not in ("gpu", "tpu"):
        return f"there is no fused kernel for {platform}"
    if dropout:
        return f"no fused kernel drops attention weights (attention_dropout {dropout:g})"
    if dtype not in (jnp.bfloat16, jnp.float16) or (platform == "tpu" and dtype == jnp.float16):
        return f"the fused kernel for {platform} computes in bfloat16, not in {dtype.name}"
    if spread:
        return "the compiler cannot split a fused kernel over devices"
    if platform == "tpu" and S % _LANES:
        return f"the fused kernel for {platform} takes rows of a multiple of {_LANES} tokens, not {S}"
    if platform == "gpu" and (D % 8 or D > _CUDNN_MAX_HEAD):
        return f"cuDNN takes heads of a multiple of 8 up to {_CUDNN_MAX_HEAD}, not {D}"
    if platform == "gpu" and S % 2:
        return f"cuDNN takes rows of an even number of tokens, not {S}"
    if not (_capable(platform) if capable is None else capable):
        return f"the fused kernel for {platform} needs {_NEEDED[platform]}"
    return None


def _capable(platform: str) -> bool:
    """Whether the devices that the program under trace is for run the platform's fused kernel."""
    if platform == "tpu":
        return target().device_kind not in _TPUS_WITHOUT
    try:
        capabilities = [float(device.compute_capability) for device in jax.local_devices(backend="gpu")]
    except (RuntimeError, AttributeError, ValueError):  # none, or not NVIDIA's: theirs is a number
        return False
    return min(capabilities) >= _CUDNN_CAPABILITY


def may_be_spread() -> bool:
    """Whether the compiler may split the program under trace over devices, which it cannot do with a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        # Nothing is known of where the arguments are; by these JAX can split cuDNN's kernel, if all is left to it.
        return jax.device_count() > 1 and target_platform() != "gpu"
    return any(mesh.shape[name] > 1 for name in _not_manual(mesh))


def _not_manual(mesh: jax.sharding.AbstractMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def cudnn_attention(query: Array, key: Array, value: Array, visible: Visible | None) -> Array:
    """Scaled dot-product attention by cuDNN: [B, S, H, D] of each → [B, S, H, D]."""

    def run(query: Array, key: Array, value: Array, visible: Visible | None) -> Array:
        B, S = query.shape[:2]
        mask = None if visible is None else jnp.broadcast_to(visible.mask, (B, 1, S, S))
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")

    return _unpartitioned(run)(query, key, value, visible)


def splash_attention(
    query: Array, key: Array, value: Array, visible: Visible | None, *, interpret: bool = False
) -> Array:
    """Scaled dot-product attention by JAX's splash kernel: [B, H, S, D] of each → [B, H, S, D].

    Args:
      query, key, value: S is a multiple of 128.
      visible: what a query sees.
      interpret: run the kernel's operations one by one, which works on every platform.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, H, S, D = query.shape
    block = next(block for block in _BLOCKS if S % block == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((S, S))] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,  # one pass for all three gradients
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def run(query: Array, key: Array, value: Array, visible: Visible | None) -> Array:
        segments = None
        if visible is not None:
            queries = jnp.broadcast_to(visible.queries, visible.keys.shape)
            segments = splash.SegmentIds(queries, visible.keys)
        return jax.vmap(kernel)(query * D**-0.5, key, value, segments)

    return _unpartitioned(run)(query, key, value, visible)


def _unpartitioned(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run` with the mesh's axes of one device manual, too: only where all are can kernels stand as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    left = {name for name in _not_manual(mesh) if mesh.shape[name] == 1}
    if not left:
        return run
    return jax.shard_map(run, axis_names=left, in_specs=P(), out_specs=P(), check_vma=False)
