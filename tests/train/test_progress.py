from __future__ import annotations

import io
import logging
import re
import sys
from contextlib import redirect_stderr

import pytest

from distiljax.cli import set_up_logging
from distiljax.train.progress import PLAIN_INTERVAL, Progress, StageProgress, stage

VALUES = {
    "loss": 3.2145,
    "loss_ce": 2.1,
    "loss_mlm": 3.3,
    "loss_cos": 0.0513,
    "mlm_accuracy": 0.412,
    "tokens_per_second": 412_345.0,
    "learning_rate": 1e-4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_off_a_terminal_one_plain_line_an_interval_and_the_last(capsys):
    clock = Clock()
    with Progress("Distilling", 1000, clock=clock) as progress:
        for step in range(10, 110, 10):
            clock.now += PLAIN_INTERVAL / 4
            progress.update(step, VALUES)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"Distilling: step {step} of 1" for step in (10, 50, 90, 100)
    ]
    assert "\x1b" not in shown and "━" not in shown
    assert lines[-1] == (
        "Distilling: step 100 of 1,000, loss 3.21 (ce 2.10, mlm 3.30, cos 0.0513), accuracy 41.2 %, "
        "412 k tokens/s, 1 min 15 s elapsed, 11 min 15 s left"
    )


def test_the_last_line_is_not_repeated(capsys):
    with Progress("Distilling", 10) as progress:
        progress.update(10, {"loss": 1.0})
    assert capsys.readouterr().err.count("\n") == 1


def test_standard_error_is_written_to_and_standard_output_is_not(capsys):
    with Progress("Distilling", 10) as progress:
        progress.update(1, {"loss": 1.0})
    stage("Adapting the teacher", 2, 6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Distilling: step 1 of 10, loss 1.00, 0 s elapsed\n[2/6] Adapting the teacher\n"


def test_disabled_shows_nothing(terminal):
    with redirect_stderr(terminal):
        with Progress("Distilling", 10, enabled=False) as progress:
            progress.update(10, VALUES)
        with StageProgress("Preparing", enabled=False) as count:
            count.update("reading", 1, 10, 10, 100)
    assert terminal.getvalue() == ""


def test_a_terminal_gets_a_bar_and_log_lines_go_above_it(terminal, monkeypatch):
    logger = logging.getLogger("distiljax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    set_up_logging()
    with redirect_stderr(terminal), Progress("Distilling", 10_000, start_step=4_000) as progress:
        progress.update(5_000, VALUES)
        for name in ("first", "[bold]"):
            logging.getLogger("distiljax.train.loop").info("saved %s", name)
    shown = terminal.getvalue()
    for text in ("Distilling", "━", "5,000/10,000", "cos 0.0513", "412 k tokens/s"):
        assert text in shown
    # The bar is drawn below a log line and taken off its lines before the next is written.
    _, between, after = re.split(r"\d\d:\d\d:\d\d saved \S+\n", shown)
    assert "Distilling" in between and between.endswith("\x1b[2K") and "Distilling" in after


def test_the_bar_is_taken_down_when_the_work_fails(terminal):
    with redirect_stderr(terminal):
        with pytest.raises(RuntimeError, match="boom"), Progress("Distilling", 10):
            assert sys.stderr is not terminal
            raise RuntimeError("boom")
        assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), Progress("Distilling", 10) as progress:
        progress.update(1, {"loss": 1.0})
    assert terminal.getvalue() == "Distilling: step 1 of 10, loss 1.00, 0 s elapsed\n"


def test_time_left_counts_from_the_first_update_of_a_resumed_run(capsys):
    clock = Clock()
    with Progress("Distilling", 1000, start_step=500, clock=clock) as progress:
        clock.now += 300  # compilation
        progress.update(510, {})
        clock.now += 40
        progress.update(550, {})
    assert capsys.readouterr().err.endswith("7 min 30 s left\n")


def test_stages_follow_one_another_each_with_its_own_rate_and_time_left(capsys):
    clock = Clock()
    with StageProgress("preparing text", clock=clock) as progress:
        progress.update("reading", 1, 4, 0, 0)
        clock.now += PLAIN_INTERVAL
        progress.update("reading", 3, 4, 0, 0)
        clock.now += PLAIN_INTERVAL
        progress.update("tokenising", 1, 40, 10, 1000)
        clock.now += PLAIN_INTERVAL
        progress.update("tokenising", 11, 40, 1_234, 1_500_000)
    assert capsys.readouterr().err.splitlines() == [
        "preparing text: reading: 1/4 parts, 0 s elapsed",
        "preparing text: reading: 3/4 parts, 30 s elapsed, 15 s left",
        "preparing text: tokenising: 1/40 parts, 10 documents, 1.00 k tokens, 1 min elapsed",
        "preparing text: tokenising: 11/40 parts, 1,234 documents, 1.50 M tokens, 50.0 k tokens/s, 1 min 30 s elapsed, "
        "1 min 27 s left",
    ]


def test_stages_on_a_terminal(terminal):
    with redirect_stderr(terminal), StageProgress("preparing text") as progress:
        progress.update("tokenising", 3, 8, 1_234, 500_000)
    assert "3/8 parts" in terminal.getvalue() and "500 k tokens" in terminal.getvalue()


def test_a_stage_heading_keeps_its_brackets_on_a_terminal(terminal):
    with redirect_stderr(terminal):
        stage("Adapting the teacher", 2, 6)
    assert "[2/6] Adapting the teacher" in terminal.getvalue()


def test_losses_that_are_not_finite_show_as_a_dash(capsys):
    with Progress("Distilling", 10) as progress:
        progress.update(1, {"loss": float("nan")})
    assert "loss –" in capsys.readouterr().err
