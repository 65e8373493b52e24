"""The command line itself: help, versions, and that asking for help loads nothing heavy."""

import os
import subprocess
import sys

import pytest

from distiljax.cli import COMMANDS, main
from distiljax.version import __version__


def test_help_lists_every_command_and_loads_nothing_heavy():
    program = (
        "import sys; from distiljax.cli import main; main(['--help'])\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'datasets', 'ml_collections'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"  {name}" in done.stdout and command.summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_says_what_its_flags_and_keys_are(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(COMMANDS[name].summary) and "example:" in text and "flags:" in text


def test_help_explains_every_config_key(capsys):
    from distiljax.data.config import default_data_config
    from distiljax.distill.config import distill_config

    assert main(["distill", "--help"]) == 0
    explained, _ = capsys.readouterr().out.split("defaults:")
    for key in distill_config():
        assert key in explained, key
    for section in ("student", "loss", "masking", "eval", "checkpoint"):
        for key in distill_config()[section]:
            assert key in explained, f"{section}.{key}"
    for key in default_data_config():
        assert f"\n{key}:" in explained, f"data.{key}"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
