"""Fixtures of the GPU tests. Without a CUDA GPU every test here is skipped, with that reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--workloads",
        default=None,
        help="folder with the request traces (mooncake_conversation.jsonl.gz)",
    )
    parser.addoption(
        "--results",
        default=None,
        help="folder for the JSON of measured runs; benchmark/results if not given",
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def results_dir(request) -> Path:
    given = request.config.getoption("--results")
    return Path(given) if given else HERE.parents[1] / "benchmark" / "results"


@pytest.fixture(scope="session")
def mooncake_trace(request) -> Path:
    folder = request.config.getoption("--workloads")
    path = Path(folder or ".") / "mooncake_conversation.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs --workloads=FOLDER with mooncake_conversation.jsonl.gz")
    return path
