"""What is told of compilations."""

import threading

import jax
import jax.numpy as jnp

from distiljax.train.compilation import compilations


def compile_another(factor):
    jax.jit(lambda x: x * factor + 1).lower(jnp.zeros(3)).compile()


def test_what_this_thread_compiles_is_told_once():
    with compilations() as compiled:
        thread = threading.Thread(target=compile_another, args=(2,))
        thread.start()
        thread.join()
        assert compiled.take() == (0, 0.0)
        compile_another(3)
        programs, seconds = compiled.take()
        assert programs == 1 and seconds > 0
        assert compiled.take() == (0, 0.0)
