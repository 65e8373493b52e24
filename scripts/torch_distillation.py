"""The distillation step of Sanh et al. 2019 in PyTorch, for scripts/benchmark_step.py to measure against.

The recipe is that of the authors' script (huggingface/transformers-research-projects, distillation/): BertForMaskedLM
teaches DistilBertForMaskedLM by 5 L_ce + 2 L_mlm + 1 L_cos on tokens that are masked afresh in every step, with AdamW,
warm-up and clipping at 5.0. It is written to be fast, where that script is not: SDPA attention, autocast, a teacher
that lies in the compute dtype, logits only of positions that count, the fused or foreach optimiser, no wait for the
device within a step, and `torch.compile` if asked. Losses are summed over micro-batches and divided once, as in
distiljax.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from distiljax.errors import UserError

ROWS = ("packed", "grouped")
WEIGHTS = {"ce": 5.0, "mlm": 2.0, "cos": 1.0}
TEMPERATURE = 2.0
MASKING_RATE, SHOWN_MASKED, SHOWN_RANDOM = 0.15, 0.8, 0.1
PEAK_LR, BETAS, EPS, CLIP = 5e-4, (0.9, 0.98), 1e-6, 5.0
WARM_UP, STEPS = 50, 1000
MULTIPLE = 8  # rows are padded to a multiple of this, as matrix units like it
VOCABULARY_MULTIPLE = 64  # the vocabulary too: a GPU's fast products take rows of a multiple of 16 bytes
NEVER = -1e4  # the logit of a word that only fills up


class Micro(NamedTuple):
    """Some rows as the models take them.

    Attributes:
      ids, positions: int64 [b, s].
      mask: what is added to the attention scores, [b, 1, 1 or s, s]; None where every query sees every key.
      tokens: int64 [n], which of the b·s positions are not padding.
      masked: int64 [k], which of the decoded positions are predicted.
      decoded: int64, which of the b·s positions are decoded; None for `tokens`.
      labels: int64 [k].
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    tokens: Tensor
    masked: Tensor
    decoded: Tensor | None
    labels: Tensor


def split_rows(segment_ids: np.ndarray, rows: str, micro_batch: int) -> list[np.ndarray]:
    """A batch of packed rows [B, S] cut into micro-batches, each the flat indices [b, s] of its tokens, −1 for padding.

    Args:
      segment_ids: [B, S], 0 = padding.
      rows: "packed" takes the rows as they are; "grouped" puts each example into a row of its own and examples of
        like length together, as the original's batch sampler does.
      micro_batch: rows at once; of "grouped" ones, as many as have no more positions.
    """
    batch, length = segment_ids.shape
    places = np.arange(batch * length).reshape(batch, length)
    if rows == "packed":
        return np.split(np.where(segment_ids > 0, places, -1), range(micro_batch, batch, micro_batch))
    before = np.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = np.flatnonzero((segment_ids > 0) & ((segment_ids != before) | (places % length == 0)))
    after = np.pad(segment_ids, ((0, 0), (0, 1)))[:, 1:]
    ends = np.flatnonzero((segment_ids > 0) & ((segment_ids != after) | (places % length == length - 1))) + 1
    order = np.argsort(starts - ends, kind="stable")  # longest first
    starts, ends = starts[order], ends[order]
    parts, first = [], 0
    while first < len(starts):
        longest = min(math.ceil((ends[first] - starts[first]) / MULTIPLE) * MULTIPLE, length)
        chosen = slice(first, first + max(1, micro_batch * length // longest))
        source = starts[chosen, None] + np.arange(longest)
        parts.append(np.where(source < ends[chosen, None], source, -1))
        first = chosen.stop
    return parts


class Decoded(nn.Module):
    """A model's last hidden states at tokens [n, E], and its logits where they are wanted."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, tokens: Tensor, decoded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        out = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask)
        flat = out.last_hidden_state.flatten(0, 1)
        # index_select, whose backward pass is the faster one of the ways to take rows.
        hidden = flat.index_select(0, tokens)
        x = hidden if decoded is None else flat.index_select(0, decoded)
        if model.config.model_type == "bert":
            return hidden, model.cls(x)
        x = model.vocab_layer_norm(model.activation(model.vocab_transform(x)))
        return hidden, model.vocab_projector(x)


class Teacher(Decoded):
    """What the student is to follow: hidden states, and softmax(logits / T) in float32."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        hidden, logits = super().forward(*inputs)
        return hidden, F.softmax(logits / TEMPERATURE, -1, dtype=torch.float32)


class StudentLoss(nn.Module):
    """The loss of some rows, its terms times `scales` [3], and their sums [3]: L_ce, L_mlm, L_cos."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoded = Decoded(model)

    def forward(
        self, micro: Micro, hidden: Tensor, probabilities: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        student, logits = self.decoded(micro.ids, micro.positions, micro.mask, micro.tokens, micro.decoded)
        log_student = F.log_softmax(logits / TEMPERATURE, -1, dtype=torch.float32)
        ce = TEMPERATURE**2 * F.kl_div(log_student, probabilities, reduction="sum")
        mlm = F.cross_entropy(logits.index_select(0, micro.masked).float(), micro.labels, reduction="sum")
        alike = torch.ones(len(student), device=student.device)
        cos = F.cosine_embedding_loss(student.float(), hidden.float(), alike, reduction="sum")
        sums = torch.stack([ce, mlm, cos])
        return (sums * scales).sum(), sums.detach()


def pad_vocabulary(model: Any) -> None:
    """Fills a masked language model's vocabulary up with words that are never likely."""
    words = model.config.vocab_size
    model.resize_token_embeddings(pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().bias[words:] = NEVER


class TorchSide:
    """One side of the benchmark: the step in PyTorch, on the GPU if there is one.

    Args:
      directory: has `teacher` and `student`, models of transformers, and rows.npz.
      settings: `batch`, `micro_batch`, `dtype`, `dropout`, `attention_dropout`, `ce_positions`, `rows` ("packed" or
        "grouped"), `compile`, and `masks`, a file of masks to use in place of fresh ones ("" for none).
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        if int(transformers.__version__.split(".")[0]) < 5:
            raise UserError(
                f"transformers is {transformers.__version__}; expected 5 or later, for packed rows"
            )
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(0)
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, settings["dtype"])
        with np.load(directory / "rows.npz") as rows:
            self.data = dict(rows)
        self.masks = dict(np.load(settings["masks"])) if settings["masks"] else None
        self.weights = torch.from_numpy(self.data["weights"]).to(self.device)
        drops = {"dropout": settings["dropout"], "attention_dropout": settings["attention_dropout"]}
        student = self._load(transformers.DistilBertForMaskedLM, directory / "student", **drops).train()
        teacher = self._load(transformers.BertForMaskedLM, directory / "teacher").eval().to(self.dtype)
        self.student: Any = StudentLoss(student)
        self.teacher: Any = Teacher(teacher.requires_grad_(False))
        self.parameters = list(student.parameters())
        self.optimizer: torch.optim.Optimizer | None = None
        self.last: dict[str, Tensor] = {}
        if settings["compile"]:
            torch._dynamo.config.recompile_limit = 64  # grouped rows come in many shapes
            self.student, self.teacher = torch.compile(self.student), torch.compile(self.teacher)

    def _load(self, architecture: Any, directory: Path, **options: Any) -> Any:
        model = architecture.from_pretrained(
            directory, attn_implementation="sdpa", dtype=torch.float32, **options
        )
        pad_vocabulary(model)
        return model.to(self.device)

    def describe(self) -> dict[str, str]:
        """Where it runs."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return {"platform": "gpu" if cuda else "cpu", "machine": name, "versions": versions}

    def build(self) -> dict[str, Any]:
        """Everything that is done once: compilation, and the choice of the optimiser's form."""
        seconds = []
        for t in range(
            3 if self.settings["compile"] else 2
        ):  # what differs between batches is compiled as such
            began = time.perf_counter()
            self._gradients(t)
            self._wait()
            seconds.append(time.perf_counter() - began)
            if self.optimizer is None:
                form = self._choose_optimizer()
            self.optimizer.zero_grad()  # type: ignore[union-attr]
        return {"compile_seconds": sum(seconds) - len(seconds) * min(seconds), "optimizer": form}

    def run(self, first: int, count: int) -> dict[str, float]:
        """Optimiser steps `first` to `first + count - 1`, and the seconds that they take."""
        assert self.optimizer is not None
        self._wait()
        began = time.perf_counter()
        for t in range(first, first + count):
            self.last = self._gradients(t)
            self.last["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self._wait()
        return {"seconds": time.perf_counter() - began}

    def losses(self) -> dict[str, float]:
        """The terms and the gradient's norm on the first batch; nothing is updated."""
        self.last = self._gradients(0)
        # In float64: PyTorch adds up a float32 norm on CPUs so that it is off by 1e-3 for a table of words.
        norms = [p.grad.double().norm() for p in self.parameters if p.grad is not None]
        self.last["grad_norm"] = torch.stack(norms).norm()
        for parameter in self.parameters:
            parameter.grad = None
        return {name: float(value) for name, value in self.last.items()}

    def programs(self) -> int:
        """How many programs torch.compile has made."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def product(self, size: int, count: int) -> dict[str, float]:
        """FLOP/s of a product of two square matrices in the compute dtype."""
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        torch.matmul(a, b)
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            torch.matmul(a, b)
        self._wait()
        return {"flops": 2.0 * size**3 * count / (time.perf_counter() - began)}

    def device_memory(self) -> int | None:
        """Most bytes that were allocated on the GPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _choose_optimizer(self) -> str:
        """Takes the faster of AdamW's two forms, by steps that change nothing."""
        seconds = {}
        for form in ("fused", "foreach"):
            optimizer = self._adamw(form, lr=0.0)
            optimizer.step()
            self._wait()
            began = time.perf_counter()
            for _ in range(3):
                optimizer.step()
            self._wait()
            seconds[form] = time.perf_counter() - began
            optimizer.state.clear()  # the tensors, at once
        form = min(seconds, key=lambda form: seconds[form])
        self.optimizer = self._adamw(form, lr=PEAK_LR)

        def rate(step: int) -> float:
            return max(0.0, min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        return form

    def _adamw(self, form: str, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr, BETAS, EPS, weight_decay=0.0, **{form: True})

    def _gradients(self, t: int) -> dict[str, Tensor]:
        """Leaves the gradient of batch t in the parameters and returns the loss and its terms."""
        batch = self._batch(t)
        parts = split_rows(batch["segment_ids"], self.settings["rows"], self.settings["micro_batch"])
        counts = [self._count(batch, source) for source in parts]
        tokens, masked = float(sum(n for n, _ in counts)), float(sum(k for _, k in counts))
        decoded = tokens if self.settings["ce_positions"] == "all" else masked
        divisors = np.array([decoded, masked, tokens], np.float32)
        scales = self._put(np.array(list(WEIGHTS.values()), np.float32) / divisors)
        total = torch.zeros(len(WEIGHTS), device=self.device)
        for source, (_, count) in zip(parts, counts, strict=True):
            micro = self._micro(batch, source, count)
            # Not inference_mode: what it gives is kept for the student's backward pass.
            with torch.no_grad():
                hidden, probabilities = self.teacher(
                    micro.ids, micro.positions, micro.mask, micro.tokens, micro.decoded
                )
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss, sums = self.student(micro, hidden, probabilities, scales)
            loss.backward()
            total += sums
        means = total / self._put(divisors)
        terms = {f"loss_{name}": mean for name, mean in zip(WEIGHTS, means, strict=True)}
        return {"loss": (total * scales).sum()} | terms

    def _batch(self, t: int) -> dict[str, np.ndarray]:
        rows = np.arange(t * self.settings["batch"], (t + 1) * self.settings["batch"])
        names = ("input_ids", "segment_ids", "positions")
        batch = {name: self.data[name].take(rows, 0, mode="wrap") for name in names}
        if self.masks is not None:
            batch |= {name: values.take(rows, 0, mode="wrap") for name, values in self.masks.items()}
        return batch

    def _count(self, batch: dict[str, np.ndarray], source: np.ndarray) -> tuple[int, int]:
        """Tokens, and how many of them are to be predicted."""
        places = source[source >= 0]
        if self.masks is not None:
            return len(places), int((batch["labels"].ravel()[places] >= 0).sum())
        eligible = (self.data["weights"][batch["input_ids"].ravel()[places]] > 0).sum()
        return len(places), max(1, round(MASKING_RATE * float(eligible)))

    def _micro(self, batch: dict[str, np.ndarray], source: np.ndarray, count: int) -> Micro:
        real = source >= 0

        def gather(name: str) -> np.ndarray:
            return np.where(real, batch[name].ravel()[source], 0)

        ids, segments = self._put(gather("input_ids").astype(np.int64)), gather("segment_ids")
        places = np.flatnonzero(real)
        if self.masks is None:
            ids, masked, labels = self._mask(ids, self._put(real), count)
        else:
            found = np.where(real, batch["labels"].ravel()[source], -1).ravel()
            masked = self._put(np.flatnonzero(found >= 0))
            labels = self._put(found[found >= 0].astype(np.int64))
        tokens = self._put(places)
        positions = self._put(gather("positions").astype(np.int64))
        mask = self._attention_mask(segments)
        if self.settings["ce_positions"] == "masked":
            everything = torch.arange(len(masked), device=self.device)
            return Micro(ids, positions, mask, tokens, everything, masked, labels)
        if len(places) < real.size:  # from places among all positions to places among the tokens
            masked = self._put(np.cumsum(real) - 1)[masked]
        return Micro(ids, positions, mask, tokens, masked, None, labels)

    def _attention_mask(self, segments: np.ndarray) -> Tensor | None:
        if (segments == 1).all():
            return None
        placed = self._put(segments.astype(np.int32))
        if segments.max() > 1:
            visible = placed[:, None, :, None] == placed[:, None, None, :]
        else:
            visible = placed[:, None, None, :] > 0
        hidden = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return hidden.masked_fill_(~visible, float("-inf"))  # every query sees itself or a token

    def _mask(self, ids: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Masked ids [b, s], and which positions [k] are predicted as what; drawn by weight, without replacement."""
        weights = (self.weights[ids] * real).flatten()
        # torch.multinomial does the same, but waits for the device.
        masked = (weights / torch.empty_like(weights).exponential_()).topk(count).indices
        labels = ids.flatten()[masked]
        u = torch.rand(count, device=self.device)
        random = torch.randint(int(self.data["vocab_size"]), (count,), device=self.device)
        shown = torch.where(u < SHOWN_MASKED + SHOWN_RANDOM, random, labels)
        shown = torch.where(u < SHOWN_MASKED, int(self.data["mask_token_id"]), shown)
        return ids.flatten().index_copy(0, masked, shown).view_as(ids), masked, labels

    def _put(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (
            tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
        )
