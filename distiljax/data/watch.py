"""Preparing while a person watches."""

from __future__ import annotations

import os
from typing import Any

from distiljax.data.metadata import Metadata
from distiljax.data.prepare import Progress, prepare
from distiljax.errors import Stopped
from distiljax.train.progress import StageProgress
from distiljax.train.signals import stop_signals


def prepare_watched(
    config: Any, tokenizer: Any, out_dir: str | os.PathLike[str], *, show: bool = True, **options: Any
) -> dict[str, Metadata]:
    """`prepare` with a progress bar; SIGTERM and SIGINT end it between two units at the latest.

    Args:
      config: a data config.
      tokenizer: a transformers tokenizer.
      out_dir: where the corpora go.
      show: whether to show the bar.
      **options: of `prepare`.

    Raises:
      UserError: as `prepare`.
      Stopped: a signal came; what is finished stays, and the same call goes on.
    """
    with stop_signals("stopping") as received, StageProgress("preparing text", enabled=show) as bar:

        def update(state: Progress) -> None:
            bar.update(state.stage, state.done, state.units, state.documents, state.tokens)
            if received:
                raise Stopped(
                    received[0], "stopped while preparing text; the same command goes on from there"
                )

        return prepare(config, tokenizer, out_dir, progress=update, **options)
