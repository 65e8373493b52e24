"""The memory that a process is said to have held."""

import subprocess
import sys

import numpy as np

from distiljax.train.memory import peak_memory

HELD = """
from distiljax.train.memory import peak_memory
before = peak_memory()
bytearray(b"x") * (100 << 20)
print(before, peak_memory())
"""


def test_the_peak_is_that_of_the_process_itself_and_stays():
    held = np.ones(200 << 20, np.uint8)
    assert peak_memory() > held.nbytes
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 100 << 20  # whatever this process holds
    assert before + (90 << 20) < after < 200 << 20
