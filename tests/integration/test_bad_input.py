"""Bad input: one line that names the value and the fix, exit status 2, nothing half-written."""

import json
import shutil

import numpy as np
import pytest

import distiljax
from distiljax.cli import main
from distiljax.train.run import hold


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused and gives its one line."""

    def run(*arguments, status=2):
        ended = main([str(a) for a in arguments])
        kind = {2: "error", 1: "failed"}[status]
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith(f"distiljax: {kind}: ")
        ]
        assert ended == status
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def teacher_copy(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "teacher")


def distill(refused, teacher, flags, workdir, **options):
    return refused("distill", f"--config.teacher={teacher}", *flags, f"--workdir={workdir}", **options)


def test_missing_weights(refused, teacher_copy, flags, tmp_path):
    (teacher_copy / "model.safetensors").unlink()
    assert "model.safetensors" in distill(refused, teacher_copy, flags(), tmp_path / "run")


def test_truncated_weights(refused, teacher_copy, flags, tmp_path):
    file = teacher_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "model.safetensors" in distill(refused, teacher_copy, flags(), tmp_path / "run")


def test_another_architecture(refused, teacher_copy, flags, tmp_path):
    config = json.loads((teacher_copy / "config.json").read_text())
    (teacher_copy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    message = distill(refused, teacher_copy, flags(), tmp_path / "run")
    assert "gpt2" in message and "bert" in message


def test_a_teacher_without_a_head_says_how_to_make_one(refused, teacher, tokenizer, flags, tmp_path):
    encoder, params = distiljax.from_pretrained(teacher, head=None)
    distiljax.save_pretrained(encoder, params, tmp_path / "headless", tokenizer=tokenizer)
    message = distill(refused, tmp_path / "headless", flags(), tmp_path / "run")
    assert "distiljax pretrain" in message


def test_a_teacher_that_is_not_there(refused, flags, tmp_path):
    assert "nowhere" in distill(refused, tmp_path / "nowhere", flags(), tmp_path / "run")


def test_vocabularies_that_differ(refused, teacher_copy, flags, tmp_path):
    tokenizer = json.loads((teacher_copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(7)}
    (teacher_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = distill(refused, teacher_copy, flags(), tmp_path / "run")
    assert "607" in message and "600" in message


def test_a_corpus_prepared_with_another_vocabulary(refused, distilled, teacher_copy, flags, tmp_path):
    text = (teacher_copy / "tokenizer.json").read_text()
    (teacher_copy / "tokenizer.json").write_text(text.replace('"the"', '"teh"'))
    options = flags(data_dir=distilled / "data")
    assert "vocabular" in distill(refused, teacher_copy, options, tmp_path / "run")


def test_an_empty_corpus(refused, teacher, flags, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    message = distill(refused, teacher, flags(data__source=tmp_path / "empty.txt"), tmp_path / "run")
    assert "empty.txt" in message


def test_a_corpus_smaller_than_one_batch(refused, teacher, flags, tmp_path):
    message = distill(refused, teacher, flags(batch_size=100_000), tmp_path / "run")
    assert "100000" in message.replace(",", "")


def test_a_glob_that_matches_nothing(refused, teacher, flags, tmp_path):
    assert "*.txt" in distill(refused, teacher, flags(data__source=tmp_path / "*.txt"), tmp_path / "run")


def test_an_unwritable_workdir(refused, teacher, flags, tmp_path):
    (tmp_path / "file").write_text("")
    message = distill(refused, teacher, flags(), tmp_path / "file" / "run")
    assert "file/run" in message and "--workdir" in message


def test_a_workdir_of_another_config(refused, distilled, teacher, flags):
    before = (distilled / "config.json").read_bytes()
    message = distill(refused, teacher, flags(seed=1), distilled)
    assert "seed was 0 and is now 1" in message
    assert (distilled / "config.json").read_bytes() == before


def test_settings_that_do_not_change_the_result_may_change(distilled, teacher, flags):
    options = flags(log_every=1, micro_batch_size=1, checkpoint__keep=1)
    assert main(["distill", f"--config.teacher={teacher}", *options, f"--workdir={distilled}"]) == 0


def test_an_unknown_config_key(refused, tmp_path, flags):
    message = refused("distill", "--config.loss.tempreature=3", f"--workdir={tmp_path / 'run'}")
    assert "loss.tempreature" in message and "loss.temperature" in message
    config = tmp_path / "config.py"
    config.write_text(
        "import distiljax\ndef get_config():\n    c = distiljax.distill_config()\n    c.btch = 1\n    return c\n"
    )
    message = refused("distill", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert "btch" in message and str(config) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 12}, ("12", "8 devices")),
        ({"micro_batch_size": 3}, ("16", "8 devices", "3")),
        ({"batch_size": 0}, ("batch_size is 0",)),
        ({"data.seq_len": 128}, ("128", "64")),
        ({"student.layers": 5}, ("5", "4")),
        ({"student.num_heads": 5}, ("32", "5")),
        ({"loss.temperature": 0.0}, ("temperature is 0.0",)),
        ({"masking.rate": 1.5}, ("1.5",)),
        ({"optimizer.peak_lr": -1.0}, ("-1.0",)),
        ({"dtype": "float16"}, ("float16", "bfloat16")),
        ({"parallel.mode": "xmap"}, ("xmap", "pmap")),
        ({"steps": -1}, ("steps is -1",)),
        ({"steps": 0, "epochs": -1.0}, ("epochs -1.0",)),
        ({"seed": -1}, ("seed is -1",)),
        ({"log_every": -1}, ("log_every is -1",)),
        ({"checkpoint.keep": 0}, ("checkpoint.keep is 0", "at least 1")),
        ({"eval.rows": -1}, ("eval.rows is -1",)),
        ({"eval.batch_size": -3}, ("eval.batch_size is -3",)),
        ({"optimizer.clip_norm": -1.0}, ("optimizer.clip_norm is -1.0",)),
        ({"optimizer.b1": 1.5}, ("optimizer.b1 is 1.5",)),
        ({"optimizer.b2": 1.0}, ("optimizer.b2 is 1.0",)),
        ({"optimizer.eps": 0.0}, ("optimizer.eps is 0.0",)),
        ({"optimizer.weight_decay": "nan"}, ("optimizer.weight_decay is nan",)),
        ({"masking.smoothing": -0.7}, ("masking.smoothing is -0.7",)),
        ({"masking.rate": "nan"}, ("masking.rate is nan",)),
        ({"loss.ce": "inf"}, ("loss.ce is inf",)),
        ({"data.holdout": "nan"}, ("data.holdout is nan",)),
        ({"data.source": 5}, ("data.source is 5",)),
        ({"data_dir": "s3://bucket/rows"}, ("s3://bucket/rows", "gs://")),
        ({"student.layers": "'abc'"}, ("abc", "layer indices")),
        ({"student.layers": "(0,1.7)"}, ("1.7", "layer indices")),
        ({"student.layers": "()"}, ("()", "indices")),
        ({"data.text_field": "body", "data.unit": "chapter"}, ("chapter",)),
    ],
)
def test_values_outside_their_range(refused, teacher, flags, tmp_path, options, words):
    changes = {key.replace(".", "__"): value for key, value in options.items()}
    message = distill(refused, teacher, flags(**changes), tmp_path / "run")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "data").exists()  # refused before the text is prepared


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["distil"], "distill"),
        (["distill"], "--workdir"),
        (["distill", "--workdir=x", "--config=nope.py"], "nope.py"),
        (["distill", "--workdir=x", "--steps=3"], "steps"),
        (["distill", "--workdir=x", "stray"], "stray"),
        (["evaluate"], "--workdir"),
        (["evaluate", "--workdir=nowhere"], "nowhere"),
        (["export", "--workdir=nowhere", "--out=x"], "nowhere"),
        (["report", "--workdir=nowhere"], "nowhere"),
        (["predict", "--model=./nowhere", "a [MASK]"], "nowhere"),
    ],
)
def test_command_lines_that_do_not_make_sense(refused, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in refused(*arguments)
    assert not list(tmp_path.iterdir())


def test_predicting_without_a_mask_or_with_a_bad_file(refused, teacher, tmp_path):
    assert "[MASK]" in refused("predict", f"--model={teacher}", "no mask here")
    assert "missing.txt" in refused("predict", f"--model={teacher}", f"--file={tmp_path / 'missing.txt'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 [MASK]\n")
    assert "UTF-8" in refused("predict", f"--model={teacher}", f"--file={tmp_path / 'latin.txt'}")
    assert "batch_size is 0" in refused("predict", f"--model={teacher}", "--batch_size=0", "a [MASK]")
    assert "top_k is 0" in refused("predict", f"--model={teacher}", "--top_k=0", "a [MASK]")


def test_a_run_that_was_refused_leaves_no_claim_on_its_directory(refused, teacher, flags, tmp_path):
    distill(refused, tmp_path / "nowhere", flags(), tmp_path / "run")
    options = flags(steps=1, seed=3)
    assert main(["distill", f"--config.teacher={teacher}", *options, f"--workdir={tmp_path / 'run'}"]) == 0


def test_a_loss_that_is_not_finite(refused, teacher, flags, tmp_path):
    options = flags(optimizer__peak_lr=1e30, optimizer__clip_norm=0.0)
    # The input was good: it is the run that failed.
    message = distill(refused, teacher, options, tmp_path / "run", status=1)
    assert "nan" in message and "peak_lr" in message
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_evaluating_a_negative_number_of_rows(refused, distilled):
    assert "rows is -1" in refused("evaluate", f"--workdir={distilled}", "--rows=-1")


def test_an_export_never_destroys_a_run(refused, distilled):
    before = sorted(distilled.rglob("*"))
    for out in (distilled, distilled.parent / "run"):
        message = refused("export", f"--workdir={distilled}", f"--out={out}", "--overwrite")
        assert "holds a run" in message
    assert sorted(distilled.rglob("*")) == before


def test_a_workdir_that_another_process_uses(refused, teacher, flags, tmp_path):
    rows = tmp_path / "run" / "data" / "train" / "rows"
    rows.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"kind": "distill", "data": {}}')
    with hold(tmp_path / "run"):
        assert "in use" in distill(refused, teacher, flags(), tmp_path / "run")
    # What the other process is preparing stays, although its config is another one.
    assert rows.exists()
    assert (tmp_path / "run" / "config.json").read_text() == '{"kind": "distill", "data": {}}'


def test_a_workdir_of_another_command(refused, distilled, teacher, flags):
    message = refused("pretrain", f"--config.model={teacher}", *flags(), f"--workdir={distilled}")
    assert "distill run" in message and "pretrain run" in message


def test_weights_that_are_not_finite(refused, teacher_copy, flags, tmp_path):
    module, params = distiljax.from_pretrained(teacher_copy)
    params["head"]["bias"] = params["head"]["bias"].copy()
    params["head"]["bias"][3] = np.nan
    tokenizer = distiljax.load_tokenizer(teacher_copy)
    distiljax.save_pretrained(module, params, tmp_path / "nan", tokenizer=tokenizer)
    assert "head/bias" in distill(refused, tmp_path / "nan", flags(), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 32.0), ("hidden_size", "32"), ("layer_norm_eps", "x"), ("layer_norm_eps", -1)],
)
def test_a_config_json_with_values_of_the_wrong_kind(refused, teacher_copy, flags, tmp_path, key, value):
    config = json.loads((teacher_copy / "config.json").read_text())
    (teacher_copy / "config.json").write_text(json.dumps({**config, key: value}))
    message = distill(refused, teacher_copy, flags(), tmp_path / "run")
    assert key in message and str(value) in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"encoder": {"width": 3}}', "not json"])
def test_a_damaged_run_directory(refused, distilled, tmp_path, content):
    run = tmp_path / "run"
    shutil.copytree(distilled, run)
    (run / "model.json").write_text(content)
    assert "model.json" in refused("predict", f"--model={run}", "a [MASK]")


def test_a_damaged_checkpoint_of_a_finished_run(refused, distilled, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(distilled, run)
    for file in (run / "best").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refused("export", f"--workdir={run}", f"--out={tmp_path / 'out'}")
    assert "best" in message and "damaged" in message
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_directory(refused, teacher, tmp_path):
    assert "no run directory" in refused("report", f"--workdir={teacher}", f"--out={tmp_path}")


@pytest.mark.parametrize(
    "arguments",
    [["--config.=1"], ["--config.loss=3"], ["--config.batch_size=x"]],
)
def test_overrides_that_cannot_be_read(refused, arguments, tmp_path):
    assert "config" in refused("distill", *arguments, f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "body", ["import sys; sys.exit(3)", "return None", "raise KeyError('x')", "return 1 +"]
)
def test_config_files_that_fail(refused, tmp_path, body):
    file = tmp_path / "config.py"
    file.write_text(f"def get_config():\n    {body}\n")
    assert str(file) in refused("distill", f"--config={file}", f"--workdir={tmp_path / 'run'}")


def test_one_name_for_two_models(refused, teacher, distilled):
    models = [f"--model=a={teacher}", f"--model=a={distilled}"]
    assert "each name once" in refused("evaluate", *models, f"--data={distilled / 'data' / 'validation'}")


def test_an_export_never_overwrites_silently(refused, distilled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "not empty" in refused("export", f"--workdir={distilled}", f"--out={tmp_path / 'out'}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
