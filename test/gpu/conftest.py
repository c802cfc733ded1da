"""Fixtures of the GPU tests. Without a CUDA GPU every test here is skipped, with that reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from benchmark.server_process import ServerProcess
from benchmark.smollm2 import model_path

HERE = Path(__file__).parent
START_LIMIT_S = 240.0
STOP_LIMIT_S = 60.0

T = TypeVar("T")


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ask_servers():
    """ask_servers(model, {name: flags}, ask): what ask(base_url) returns of each server, by name.

    All of them run at once, for most of the time goes into starting them.
    """

    def one(name: str, model: Path, flags: Sequence[str], ask: Callable[[str], T]) -> T:
        server = ServerProcess(model, flags)
        try:
            ready_s = asyncio.run(server.wait_ready(START_LIMIT_S, lambda: None))
            asked_s = time.monotonic()
            answer = ask(server.base_url)
            answered_s = time.monotonic() - asked_s
            print(f"{name}: ready after {ready_s:.0f} s, all answered after {answered_s:.0f} more")
            server.stop(STOP_LIMIT_S)
            return answer
        except Exception:
            print(server.log_tail())
            raise
        finally:
            server.kill()

    def run(
        model: Path, servers: Mapping[str, Sequence[str]], ask: Callable[[str], T]
    ) -> dict[str, T]:
        with ThreadPoolExecutor(len(servers)) as pool:
            asked = {
                name: pool.submit(one, name, model, flags, ask) for name, flags in servers.items()
            }
            return {name: answer.result() for name, answer in asked.items()}

    return run
