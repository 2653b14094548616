"""Makes a virtual environment with MLflow, for the tests of `--track`.

    python tools/make_mlflow_environment.py FOLDER
    MMCOMPRESS_MLFLOW=FOLDER python -m pytest tests/test_tracking.py

MLflow asks for other versions of some packages than the project has. So it has a folder of its own.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

MLFLOW = "mlflow>=3.0"


def make_environment(folder: Path) -> None:
    """Make the environment, or leave one that is whole as it is."""
    if (folder / "bin" / "mlflow").exists():
        return
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, MLFLOW], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_environment(Path(sys.argv[1]))
