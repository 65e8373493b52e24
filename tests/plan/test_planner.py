"""Whole plans: the step compiled for a TPU that is not there, one that is too big for it, GPUs, and bad input."""

import dataclasses
import json
import math
import re
import sys

import pytest

import distiljax
from distiljax.cli import main
from distiljax.distill.step import Models
from distiljax.errors import UserError
from distiljax.plan import analytic, make_plan
from distiljax.plan.compiler import Compiled, largest_fit, parse_shortage, tpu_devices
from distiljax.plan.hlo import Program
from distiljax.plan.machines import GiB, parse_topology
from distiljax.plan.planner import _attention
from distiljax.plan.program import WELL_KNOWN, encoder_config, load_program
from distiljax.plan.table import human_flops, plan_markdown
from distiljax.programs import nothing_kept

from .conftest import write_teacher


def arguments(model, **values):
    values = {"data.seq_len": 32, "batch_size": 32, "micro_batch_size": 2, "steps": 500} | values
    values = {"student.hidden_dropout": 0.0, "student.attention_dropout": 0.0, "teacher": model} | values
    return ["plan", *(f"--config.{key}={value}" for key, value in values.items())]


def config_of(teacher, changes):
    config = distiljax.distill_config()
    changes = {"teacher": teacher, "student.attention_dropout": 0.0, "student.hidden_dropout": 0.0, **changes}
    config.update_from_flattened_dict(changes)
    return config


def test_a_plan_for_a_tpu_slice(teacher, config, capsys):
    assert main([*arguments(teacher), "--topology=v5e:2x2", "--nosearch", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    program = load_program(config)
    run, (machine,) = plan["run"], plan["machines"]
    assert (run["steps"], run["layers"], run["teacher_layers"]) == (500, 1, 2)
    assert (machine["chips"], machine["devices"], machine["micro_batches"]) == (4, 4, 4)
    assert machine["fits"] and machine["largest_micro_batch_size"] is None

    memory = machine["memory"]
    state = analytic.state_bytes(program)
    assert memory["arguments"] >= sum(state.values())
    assert 2 * state["parameters"] < memory["total"] < machine["chip_memory"]
    assert memory["aliased"] > 0.9 * memory["outputs"]  # the state is donated

    # Every matrix product of the step is counted, once for each of the four micro-batches.
    assert machine["flops"]["matrix"] == pytest.approx(machine["flops"]["analytic"], rel=1e-6)
    assert machine["flops"]["compiled"] > machine["flops"]["matrix"]
    assert machine["gradient_reductions"] == pytest.approx(1.0, abs=0.01)
    assert machine["collectives_in_loop"] == 0
    assert {c["kind"] for c in machine["collectives"]} == {"all-reduce"}
    assert machine["collective_bytes"] == pytest.approx(4 * run["parameters"], rel=0.01)

    times = machine["times"]
    assert times["roofline"] == max(times["compute"], times["memory"]) + times["interconnect"]
    assert times["compiler"] > times["compute"] and times["expected"] > 0
    parts = machine["compiler_parts"]
    assert sum(sum(x.values()) for x in parts.values()) == pytest.approx(
        times["compiler"] - times["interconnect"]
    )
    for part in ("teacher, feed-forward", "student, attention", "losses over the vocabulary, L_cos"):
        assert parts[part]["products"] > 0, part
    whole = machine["run"]["roofline"]
    assert whole["hours"] == pytest.approx(500 * times["roofline"] / 3600)
    assert whole["chip_hours"] == pytest.approx(4 * whole["hours"])
    assert whole["tokens_per_second"] == pytest.approx(32 * 32 / times["roofline"])


def test_a_batch_that_is_too_big_is_said_to_be_with_the_largest_that_fits(tmp_path, capsys):
    teacher = write_teacher(tmp_path / "wide", intermediate_size=2**16, num_hidden_layers=1)
    share = 2039  # a prime: there is only one other size to try
    command = arguments(teacher, batch_size=4 * share, micro_batch_size=0, steps=0)
    assert main([*command, "--config.student.layers=1", "--topology=v5e-4", "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    (machine,) = plan["machines"]
    assert machine["fits"] is False and machine["micro_batch_size"] == machine["rows_per_device"] == share
    assert machine["needed"] > machine["available"] > 15 * GiB
    assert machine["largest_micro_batch_size"] == machine["planned_micro_batch_size"] == 1
    assert [(tried["micro_batch_size"], tried["fits"]) for tried in machine["tried"]] == [
        (share, False),
        (1, True),
    ]
    assert machine["micro_batches"] == share and machine["memory"]["total"] < machine["available"]
    # The loop that runs 2,039 times is counted 2,039 times.
    assert machine["flops"]["matrix"] == pytest.approx(machine["flops"]["analytic"], rel=1e-6)
    assert "does not fit" in captured.err and "1 rows: fits" in captured.err
    assert "set --config.micro_batch_size=1." in plan_markdown(plan)


def test_attention_is_fused_in_the_program_and_its_work_is_counted(tmp_path, capsys):
    """Forward in the teacher, forward and backward in the student, and no matrix of [S, S] weights is left."""
    S = 256
    teacher = write_teacher(tmp_path / "long", max_position_embeddings=S, num_hidden_layers=1)
    changes = {"data.seq_len": S, "batch_size": 4, "student.layers": 1, "dtype": "bfloat16"}
    program = load_program(config_of(teacher, changes))
    devices = tpu_devices(parse_topology("v5e:1"))
    found, text = [], {}
    for attention in ("fused", "plain"):
        models = Models(
            *(m.clone(attention=attention) for m in (program.models.student, program.models.teacher))
        )
        lowered = dataclasses.replace(program, models=models).lower(devices, 2)
        with nothing_kept():
            text[attention] = lowered.compile().as_text()
        found.append(Program(text[attention]).profile())
    fused, plain = found
    names = set(re.findall(r"%(splash_mha_[a-z]+)", text["fused"]))
    assert names == {"splash_mha_fwd", "splash_mha_dkv"}
    assert "splash" not in text["plain"] and plain.kernel_flops_once == 0
    products = 2.0 * 2 * S * S * 32  # of two rows
    assert fused.kernel_flops_once == (2 + 2 + 5) * products
    # The backward kernel makes the scores again, once for each of the two micro-batches.
    assert fused.matrix_flops == plain.matrix_flops + 2 * products
    assert f"[2,2,{S},{S}]" in text["plain"] and f"[2,2,{S},{S}]" not in text["fused"]


@pytest.mark.parametrize(
    ("topology", "kernel"),
    [
        ("v5e:1", "splash (fused on tpu"),
        ("v3:1", "plain (the fused kernel for tpu needs a TPU v4"),
        ("a100:1", "cudnn (fused on gpu"),
        ("v100:1", "plain (the fused kernel for gpu needs an NVIDIA GPU of compute capability 8.0"),
    ],
)
def test_which_kernel_computes_attention_there_is_said(tmp_path, topology, kernel):
    teacher = write_teacher(tmp_path / "long", max_position_embeddings=256)
    program = load_program(config_of(teacher, {"data.seq_len": 256, "dtype": "bfloat16"}))
    (note,) = _attention(program, parse_topology(topology))
    assert note.startswith(f"attention: student {kernel}") and f"teacher {kernel}" in note


def test_fused_attention_takes_no_matrices_of_weights():
    changes = {"student.attention_dropout": 0.0, "micro_batch_size": 16}
    config = config_of("bert-base-uncased", changes)
    held = {
        m["topology"]: m["memory"]["temporaries"] for m in make_plan(config, ["a100:8", "v100:8"])["machines"]
    }
    assert held["v100-16gb:8"] - held["a100-40gb:8"] == 16 * 512 * 6 * 2 * 12 * 512 * 2


def search(share, first, limit, needed=True):
    """The search with a machine that has room for `limit` rows."""

    def compile_at(size):
        if size <= limit:
            return Compiled(size, True, 0.0)
        return Compiled(size, False, 0.0, *((float(size), float(limit)) if needed else (None, None)))

    best, tried = largest_fit(share, compile_at(first), compile_at)
    return best and best.micro_batch_size, [c.micro_batch_size for c in tried]


@pytest.mark.parametrize("needed", [True, False])
def test_the_search_finds_the_largest_divisor_that_fits(needed):
    for share in (1, 7, 12, 256, 1000):
        sizes = [n for n in range(1, share + 1) if share % n == 0]
        for limit in (0, 1, 5, 16, 17, 250, 1000):
            for first in sizes:
                found, tried = search(share, first, limit, needed)
                assert found == max((n for n in sizes if n <= limit), default=None)
                assert len(tried) == len(set(tried))


def test_the_search_compiles_little():
    # One too many, one that fits by the bytes that were said to be missing, and the next one for certainty.
    assert search(256, 16, 70)[1] == [16, 256, 64, 128]
    assert search(4096, 16, 70)[1] == [16, 4096, 64, 128]
    assert search(16, 16, 70)[1] == [16]


def test_what_the_compiler_says_of_a_shortage_is_read():
    said = "total memory required for HLO temporaries (65.25G) exceeds available HBM (15.75G). HLO module: x"
    assert parse_shortage(said) == (65.25 * GiB, 15.75 * GiB)
    said = "Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. Exceeded hbm capacity by 1.45G."
    assert parse_shortage(said) == (17.2 * GiB, 15.75 * GiB)
    assert parse_shortage("something else") == (None, None)


def test_gpus_are_counted_and_estimated(capsys):
    plan = make_plan(distiljax.distill_config(), ["a100:8", "v100:8", "a100:1"], tokens=1e9)
    eight, volta, one = plan["machines"]
    assert plan["run"]["parameters"] == 66_985_530 and plan["run"]["teacher_parameters"] == 109_514_298
    assert "table" in plan["run"]["shape_from"]
    assert plan["run"]["steps"] == math.ceil(3 * round(1e9 / (0.998 * 512)) / 4096)
    # A device's whole share is too much for either; what is left fits.
    assert not eight["fits"] and eight["largest_micro_batch_size"] == 128
    assert not volta["fits"] and volta["largest_micro_batch_size"] == 64
    assert eight["flops"] == {"analytic": plan["run"]["flops_per_step"]} | dict.fromkeys(
        ("compiled", "difference", "matrix")
    )
    assert eight["moved_bytes"] is None and eight["collectives"] is None
    assert eight["collective_bytes"] == 4 * 66_985_530 and one["collective_bytes"] == 0
    assert eight["times"]["compute"] == pytest.approx(one["times"]["compute"] / 8)
    assert one["times"]["expected"] == pytest.approx(one["times"]["compute"] / 0.3)
    assert any("no bfloat16" in note for note in volta["notes"])


def test_the_table_has_a_column_a_machine_and_says_what_is_not_known(teacher, capsys):
    command = [*arguments(teacher, steps=0), "--topology=h100:8", "--topology=a100-80gb:4"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "h100:8" in text and "a100-80gb:4" in text and "…" not in text.replace("…  ", "")
    for part in ("Fits", "1,000 steps", "--tokens", "estimate", "At 30 % of the peak"):
        assert part in text, part
    assert main([*command, "--tokens=1e6", "--mfu=0.5"]) == 0
    text = capsys.readouterr().out
    assert "At 50 % of the peak" in text and "tokens in rows that are 99.8 % filled" in text


def test_pmap_is_planned_as_jit_and_says_so(config):
    config.parallel.mode = "pmap"
    plan = make_plan(config, "h100:2")
    assert "planned as jit" in plan["run"]["notes"][0]


def test_a_run_directory_and_a_hub_name_give_a_models_shape(tmp_path, teacher):
    assert encoder_config(teacher)[0].num_layers == 2
    assert encoder_config("google-bert/bert-base-cased")[0].vocab_size == 28_996
    encoder = WELL_KNOWN["distilbert-base-uncased"]
    (tmp_path / "model.json").write_text(json.dumps({"encoder": dataclasses.asdict(encoder)}))
    assert encoder_config(str(tmp_path)) == (encoder, str(tmp_path / "model.json"))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        encoder_config(str(tmp_path))


def test_well_known_shapes_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from distiljax.nn import EncoderConfig

    bert = EncoderConfig.from_hf(
        transformers.BertConfig().to_dict() | {"position_embedding_type": "absolute"}
    )
    assert WELL_KNOWN["bert-base-uncased"] == bert
    distilbert = EncoderConfig.from_hf(transformers.DistilBertConfig().to_dict())
    assert WELL_KNOWN["distilbert-base-uncased"] == distilbert


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({}, [], "--topology is missing"),
        ({}, ["--topology=v9:2x2"], "unknown kind 'v9'"),
        ({"batch_size": 30}, ["--topology=v5e:3x5"], "the TPU compiler refuses it"),
        ({}, ["--topology=v5e:8x8"], "does not divide by 64 devices"),
        ({"micro_batch_size": 3}, ["--topology=v5e:2x2"], "choose a micro_batch_size that divides 8"),
        ({"data.seq_len": 128}, ["--topology=h100:8"], "expected at most 64"),
        ({"batch_size": 0}, ["--topology=h100:8"], "batch_size is 0"),
        ({"loss.temperature": 0.0}, ["--topology=h100:8"], "temperature"),
        ({"dtype": "float64"}, ["--topology=h100:8"], "float64"),
        ({}, ["--topology=h100:8", "--mfu=1.5"], "mfu is 1.5"),
        ({}, ["--topology=h100:8", "--tokens=-1"], "tokens is -1"),
        ({"teacher": "/no/such/place"}, ["--topology=h100:8"], "no such directory"),
        ({"attention": "fused"}, ["--topology=v5e:2x2"], "multiple of 128 tokens, not 32"),
    ],
)
def test_bad_input_is_one_line(teacher, capsys, changes, flags, words):
    command = arguments(teacher, **changes)
    assert main([*command, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert words in captured.err


def test_without_the_compiler_it_says_what_to_install(teacher, capsys, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "libtpu", None
    )  # what Python holds of a module that must not be imported
    assert main([*arguments(teacher), "--topology=v5e:2x2"]) == 2
    assert "pip install 'distiljax[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(1.4534e15, "1.45 PFLOP"), (2e18, "2.00 EFLOP"), (5e6, "5.00 MFLOP"), (None, "–")]
)
def test_floating_point_work_in_words(value, text):
    assert human_flops(value) == text
