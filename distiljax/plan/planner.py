"""`make_plan`: a config and the machines to run it on → what it takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from distiljax.distill.runs import kernels_in_words
from distiljax.errors import UserError
from distiljax.nn import kernels
from distiljax.plan import analytic
from distiljax.plan.compiler import Compiled, compile_step, largest_fit, tpu_devices
from distiljax.plan.machines import Topology, parse_topology
from distiljax.plan.program import Program, count, load_program
from distiljax.train.format import human_seconds

log = logging.getLogger(__name__)

MFU = 0.3

# Before compute capability 8.0: no matrix units for bfloat16.
_OLD_GPUS = ("t4", "v100-16gb", "v100-32gb")
# See `kernels.choose`, `capable`.
_WITHOUT_FUSED_ATTENTION = (*_OLD_GPUS, "v2", "v3")


def make_plan(
    config: ConfigDict,
    topologies: str | Sequence[str],
    *,
    search: bool = True,
    mfu: float = MFU,
    tokens: float = 0.0,
) -> dict[str, Any]:
    """Whether a run fits a machine, and what it takes there; nothing is run, and no weights are read.

    For TPU slices the run's own train step is compiled by the TPU compiler of the libtpu package, which needs no TPU.
    For GPUs everything is counted and estimated from the models' shapes.

    Args:
      config: of a distill or pretrain run.
      topologies: such as "v5e:4x4", "v4-32" or "h100:8", one or several.
      search: also search for the largest micro-batch that fits, by compiling.
      mfu: the share of the peak rate that the model's floating-point work is expected to get.
      tokens: of the corpus without padding, where its rows are not prepared yet; 0 = not known.

    Returns:
      `run`, what is the same on all machines, and `machines`, one dict each; bytes and seconds; JSON-ready.

    Raises:
      UserError: bad input, or no TPU compiler.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}; expected a share of one, such as {MFU}")
    if not 0 <= tokens < math.inf:
        raise UserError(f"tokens is {tokens}; expected a number of tokens, or 0 if it is not known")
    named = [topologies] if isinstance(topologies, str) else list(topologies)
    if not named:
        raise UserError("no topology; give one such as v5e:4x4 or h100:8")
    parsed = [parse_topology(text) for text in named]
    program = load_program(config, tokens)
    for topology in parsed:  # all that can be refused is refused before the first long compile
        program.share(topology.chips * topology.devices_per_chip)
        _attention(program, topology)
    devices = [tpu_devices(topology) if topology.chip.is_tpu else None for topology in parsed]
    machines = [
        _machine(program, topology, held, search, mfu) for topology, held in zip(parsed, devices, strict=True)
    ]
    return {"run": _run(program, config, mfu), "machines": machines}


def _run(program: Program, config: ConfigDict, mfu: float) -> dict[str, Any]:
    parts = analytic.step_flops(program)
    teacher = program.models.teacher
    notes = []
    if config.parallel.mode == "pmap":
        notes.append("parallel.mode is pmap; planned as jit, which does the same work")
    if program.model_axis > 1:
        notes.append(
            f"parallel.model is {program.model_axis}: the collectives in the loop are those of the spread teacher, and "
            "devices that share one may each reduce a part of the gradients"
        )
    return {
        "teacher": config.get("teacher") or None,
        "model": config.get("model") or None,
        "shape_from": program.known_from,
        "teacher_layers": teacher.config.num_layers if teacher else None,
        "teacher_parameters": count(program.teacher_params) if teacher else None,
        "layers": program.models.student.config.num_layers,
        "parameters": count(program.params),
        "batch_size": program.batch_size,
        "seq_len": program.seq_len,
        "tokens_per_step": program.batch_size * program.seq_len,
        "dtype": config.dtype,
        "ce_positions": program.recipe.ce_positions if teacher else None,
        "flops_per_step": sum(parts.values()),
        "flops_parts": parts,
        "steps": program.steps,
        "steps_from": program.steps_from or None,
        "mfu": mfu,
        "notes": notes,
    }


def _machine(
    program: Program, topology: Topology, devices: list[Any] | None, search: bool, mfu: float
) -> dict[str, Any]:
    number = topology.chips * topology.devices_per_chip
    share = program.share(number)
    configured = program.micro_batch_size or share
    plan: dict[str, Any] = {
        "topology": topology.name,
        "chip": topology.chip.title,
        "chips": topology.chips,
        "devices": number,
        "compiled": devices is not None,
        "micro_batch_size": configured,
        "rows_per_device": share,
        "chip_memory": topology.chip.memory / topology.devices_per_chip,
        "state": analytic.state_bytes(program),
        "notes": [*_notes(topology), *_attention(program, topology)],
    }
    compiled = None
    if devices is None:
        plan |= _estimated_memory(program, topology, share, configured)
        planned = configured
    else:
        compiled, facts = _compiled_memory(program, topology, devices, share, configured, search)
        plan |= facts
        planned = compiled.micro_batch_size if compiled else configured
    plan |= {"planned_micro_batch_size": planned, "micro_batches": share // planned}
    plan |= _work(program, topology, number, compiled)
    plan["times"] = _times(program, topology, plan, compiled, mfu)
    plan["compiler_parts"] = {
        part: {"products": cycles.products / topology.chip.clock, "rest": cycles.rest / topology.chip.clock}
        for part, cycles in (compiled.cycles if compiled else {}).items()
    }
    plan["run"] = {name: _whole_run(program, topology, seconds) for name, seconds in _steps(plan).items()}
    return plan


def _compiled_memory(
    program: Program, topology: Topology, devices: list[Any], share: int, configured: int, search: bool
) -> tuple[Compiled | None, dict[str, Any]]:
    """The step as it is planned with (at the configured micro-batch, or the largest that fits), and what fits."""

    def compile_at(size: int) -> Compiled:
        log.info("%s: compiling the step with micro-batches of %d rows", topology.name, size)
        result = compile_step(program, devices, size)
        verdict = "fits" if result.fits else "does not fit"
        log.info("%s: %d rows: %s (%s)", topology.name, size, verdict, human_seconds(result.seconds))
        return result

    first = compile_at(configured)
    best, tried = (first if first.fits else None), [first]
    searched = search or not first.fits
    if searched:
        best, tried = largest_fit(share, first, compile_at)
    planned = first if first.fits else best
    available = next((c.available for c in tried if c.available), None)
    return planned, {
        "fits": first.fits,
        "needed": first.needed,
        "available": available,
        "memory": planned.memory if planned else None,
        "largest_micro_batch_size": (best.micro_batch_size if best else 0) if searched else None,
        "tried": [
            {"micro_batch_size": c.micro_batch_size, "fits": c.fits, "seconds": c.seconds, "needed": c.needed}
            | ({"total": c.memory["total"]} if c.fits else {})
            for c in tried
        ],
    }


def _estimated_memory(program: Program, topology: Topology, share: int, configured: int) -> dict[str, Any]:
    """The same without a compiler."""
    state = sum(analytic.state_bytes(program).values())
    student = kernels.choose_for(program.models.student, training=True, **_attention_on(topology, program))

    def temporaries(size: int) -> int:
        return analytic.temporary_bytes(program, size, fused=student.fused)

    def total(size: int) -> int:
        return state + temporaries(size)

    sizes = [n for n in range(1, share + 1) if share % n == 0]
    fitting = [n for n in sizes if total(n) <= topology.chip.memory]
    return {
        "fits": total(configured) <= topology.chip.memory,
        "needed": total(configured),
        "available": topology.chip.memory,
        "memory": {
            "arguments": state,
            "temporaries": temporaries(configured),
            "total": total(configured),
        },
        "largest_micro_batch_size": max(fitting, default=0),
        "tried": [],
    }


def _work(program: Program, topology: Topology, devices: int, compiled: Compiled | None) -> dict[str, Any]:
    """Floating-point work, bytes and collectives of a step."""
    expected = sum(analytic.step_flops(program).values())
    gradients = analytic.gradient_bytes(program)
    if compiled is None or compiled.profile is None:
        return {
            "flops": {"analytic": expected, "compiled": None, "difference": None, "matrix": None},
            "moved_bytes": None,
            "collectives": None,
            "gradient_reductions": None,
            "collectives_in_loop": None,
            "collective_bytes": gradients if devices > 1 else 0,
        }
    profile = compiled.profile
    outside = [c for c in profile.collectives if not c.in_loop]
    reduced = sum(c.elements * c.times for c in outside if c.kind in ("all-reduce", "reduce-scatter"))
    flops = compiled.flops * devices
    return {
        "flops": {
            "analytic": expected,
            "compiled": flops,
            "difference": flops / expected - 1,
            "matrix": profile.matrix_flops * devices,
        },
        "moved_bytes": profile.moved_bytes * topology.devices_per_chip,
        "collectives": [
            {"kind": c.kind, "bytes": c.bytes, "times": c.times, "in_loop": c.in_loop}
            for c in sorted(profile.collectives, key=lambda c: -c.bytes)
        ],
        "gradient_reductions": reduced / count(program.params),
        "collectives_in_loop": sum(c.in_loop for c in profile.collectives),
        "collective_bytes": sum(c.bytes * c.times for c in profile.collectives),
    }


def _times(
    program: Program, topology: Topology, plan: dict[str, Any], compiled: Compiled | None, mfu: float
) -> dict[str, Any]:
    """Seconds of a step.

    The roofline: matrix units and memory work at once, each at its peak; the reduction of the gradients comes after
    the last micro-batch, with nothing left to do meanwhile, so its time is added.
    """
    chip, chips = topology.chip, topology.chips
    flops = plan["flops"]["compiled"] or plan["flops"]["analytic"]
    compute = flops / chips / chip.flops
    memory = plan["moved_bytes"] / chip.bandwidth if plan["moved_bytes"] else None
    sent = analytic.sent_bytes(plan["collective_bytes"], chips) if chips > 1 else 0.0
    interconnect = sent / chip.link
    bound = max(compute, memory or 0.0) + interconnect
    cycles = compiled.profile.cycles if compiled and compiled.profile else 0.0
    limits = {"compute": compute, "memory": memory or 0.0, "interconnect": interconnect}
    return {
        "compute": compute,
        "memory": memory,
        "interconnect": interconnect,
        "roofline": bound,
        "bound_by": max(limits, key=lambda name: limits[name]),
        "compiler": cycles / chip.clock + interconnect if cycles else None,
        "expected": plan["flops"]["analytic"] / chips / chip.flops / mfu + interconnect,
    }


def _steps(plan: dict[str, Any]) -> dict[str, float]:
    return {name: plan["times"][name] for name in ("roofline", "compiler", "expected") if plan["times"][name]}


def _whole_run(program: Program, topology: Topology, seconds: float) -> dict[str, float | None]:
    hours = program.steps * seconds / 3600 if program.steps else None
    return {
        "step_seconds": seconds,
        "tokens_per_second": program.batch_size * program.seq_len / seconds,
        "hours_per_1000_steps": seconds / 3.6,
        "hours": hours,
        "chip_hours": hours * topology.chips if hours is not None else None,
    }


def _attention(program: Program, topology: Topology) -> list[str]:
    """Which kernels compute attention there.

    Raises:
      UserError: fused ones where they cannot be.
    """
    return [f"attention: {kernels_in_words(program.models, **_attention_on(topology, program))}"]


def _attention_on(topology: Topology, program: Program) -> dict[str, Any]:
    """What the choice of a kernel depends on."""
    return {
        "platform": "tpu" if topology.chip.is_tpu else "gpu",
        "rows": 1,
        "seq_lens": [program.seq_len],
        "capable": topology.kind not in _WITHOUT_FUSED_ATTENTION,
        "spread": program.model_axis > 1,
    }


def _notes(topology: Topology) -> list[str]:
    if topology.chip.is_tpu:
        return []
    notes = ["no compiler for GPUs here: memory is an estimate, bytes moved are not known"]
    if topology.kind in _OLD_GPUS:
        notes.append("no bfloat16 matrix units: the peak is float16's, and bfloat16 runs far below it")
    if topology.chips > 8:
        notes.append("more than 8 GPUs are several hosts: their network, not NVLink, bounds the reduction")
    return notes
