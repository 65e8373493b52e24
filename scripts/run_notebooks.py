"""Runs the notebooks of colab/ from top to bottom and saves them with what they gave.

    python scripts/run_notebooks.py                                   # all, in place; their runs go to runs/notebooks
    python scripts/run_notebooks.py colab/distill_your_own_bert.ipynb --out=other.ipynb --cwd=some/directory

The second notebook goes on with the models of the first where both have the same --cwd. Runs that are finished there
are not repeated: remove runs/notebooks for the outputs of a whole run. The notebooks say what the environment variable
DISTILJAX_NOTEBOOK_SETTINGS is for.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# In this order, as the second goes on with the models of the first.
NOTEBOOKS = ("colab/distill_your_own_bert.ipynb", "colab/finetune_and_compare.ipynb")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, default=[ROOT / name for name in NOTEBOOKS])
    parser.add_argument("--out", type=Path, help="where to save; in place by default")
    parser.add_argument("--cwd", type=Path, default=ROOT / "runs" / "notebooks", help="where they run")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a cell may take")
    options = parser.parse_args()
    if options.out and len(options.notebooks) != 1:
        parser.error("--out is for one notebook")
    options.cwd.mkdir(parents=True, exist_ok=True)
    for path in options.notebooks:
        print(f"running {path}", file=sys.stderr, flush=True)
        run(path, options.out or path, options.cwd, options.timeout)
    return 0


def run(path: Path, out: Path, cwd: Path, timeout: int) -> None:
    """Runs a notebook with this interpreter and saves it.

    Nothing of the user's takes part: no kernel that is installed, no profile of IPython's.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; `out` is not written.
    """
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        # Jupyter looks at these when it is imported.
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ[name] = scratch
        os.environ["JUPYTER_PLATFORM_DIRS"] = (
            "1"  # without it Jupyter warns of the places that it used before
        )
        import nbclient
        import nbformat
        from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        class ThisInterpreter(KernelSpecManager):
            def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
                argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                return KernelSpec(argv=argv, display_name="Python 3", language="python")

        notebook = nbformat.read(path, as_version=4)
        # Files in place of ports: nobody else can listen, and two at a time do not meet.
        connection = os.path.join(scratch, "kernel.json")
        kernel = AsyncKernelManager(
            kernel_spec_manager=ThisInterpreter(), transport="ipc", connection_file=connection
        )
        client = nbclient.NotebookClient(
            notebook,
            km=kernel,
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": str(cwd)}},
        )
        client.execute(cleanup_kc=True, env={**os.environ, "PYTHONPATH": python_path()})
        tidy(notebook)
        nbformat.validate(notebook)
        temporary = out.with_name(out.name + ".tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, out)


def python_path() -> str:
    """The search path of the kernel: this checkout comes first, wherever it runs."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def tidy(notebook: dict[str, Any]) -> None:
    """Joins what a cell wrote in pieces, leaves out what says nothing to a reader, and makes pictures small."""
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in notebook["cells"]:
        outputs: list[dict[str, Any]] = []
        for output in cell.get("outputs", ()):
            last = outputs[-1] if outputs else {}
            if output["output_type"] == "stream" and last.get("name") == output["name"]:
                last["text"] += output["text"]
                continue
            data = output.get("data", {})
            if len(data) > 1 and re.match(r"<(Figure|IPython)", data.get("text/plain", "")):
                del data["text/plain"]
            if "image/png" in data:
                data["image/png"] = small(data["image/png"])
            outputs.append(output)
        if "outputs" in cell:
            cell["outputs"] = outputs


def small(picture: str) -> str:
    """A PNG, base64-encoded, with a palette of 64 colours, which is plenty for a plot."""
    from PIL import Image

    written = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        flat = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        flat.save(written, format="PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
