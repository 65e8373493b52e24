"""Stand-ins for the programs of a cloud or a cluster, which the launchers call and no test has."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("gcloud", "kubectl", "docker", "sbatch", "srun", "squeue", "scontrol", "scancel")

# Notes its arguments, each ended by a NUL and the call by an empty one, then does what the test says.
FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" '' >>"$FAKE/calls"
if [[ -f $FAKE/${0##*/}.sh ]]; then source "$FAKE/${0##*/}.sh"; fi
"""


class Cluster:
    """A shell whose PATH begins with stand-ins, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name in PROGRAMS:
            self.program(name, FAKE)
        # Nobody wants to wait.
        self.program("sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
        self.env = {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "FAKE": str(folder),
            "USER": "me",
            # Whatever else is called by mistake finds no account.
            "CLOUDSDK_CONFIG": str(folder / "none"),
            "KUBECONFIG": "/dev/null",
        }

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def behaviour(self, name: str, text: str) -> None:
        """What the stand-in of that name does once it has noted its arguments."""
        (self.folder / f"{name}.sh").write_text(text)

    def run(self, *command: str, input: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.env | env,
            timeout=60,
        )

    def launch(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(f"scripts/{script}", *arguments, **env)

    def take_calls(self) -> list[list[str]]:
        """The calls since the last time, in order."""
        path = self.folder / "calls"
        if not path.exists():
            return []
        text = path.read_text()
        os.remove(path)
        calls: list[list[str]] = [[]]
        for word in text.split("\0")[:-1]:
            if word:
                calls[-1].append(word)
            else:
                calls.append([])
        return calls[:-1]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)
