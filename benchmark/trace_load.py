"""A trace replayed at a rate: the load of the benchmarks of whole servers, and how it is run.

The client is `python -m sglang.bench_serving` in a process of its own, as a user would run it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.server_process import ServerError

VOCAB_SIZE_MARGIN = 256  # special tokens sit at the end of the vocabulary
# For a client that was told to stop: time to write its report.
REPORT_LIMIT_S = 60.0
CALL_LIMIT_S = 60.0
_TAIL_LINES = 15


class LoadError(Exception):
    """The client ended without a result."""


@dataclass(frozen=True, slots=True)
class TraceLoad:
    """rate: requests/s, Poisson, for about `seconds`; inputs longer than max_input_len are left
    out. min_turns: above 1, only whole conversations of at least so many turns are replayed.
    tbt_ms and the TTFT limits are the service level that attainment is counted against."""

    trace: Path
    rate: float
    seconds: float
    max_input_len: int
    min_turns: int = 1
    seed: int = 0
    ttft_ms: float = 1000.0
    ttft_ms_per_token: float = 0.5
    tbt_ms: float = 50.0

    @property
    def requests(self) -> int:
        """Sent at most."""
        return max(1, round(self.rate * self.seconds))

    @property
    def slo(self) -> dict[str, float]:
        """As a request's body states it."""
        return {
            "ttft_ms": self.ttft_ms,
            "ttft_ms_per_token": self.ttft_ms_per_token,
            "tbt_ms": self.tbt_ms,
        }

    def bench_flags(self) -> list[str]:
        return [
            "--dataset-name=mooncake",
            f"--dataset-path={self.trace}",
            f"--mooncake-max-input-len={self.max_input_len}",
            f"--mooncake-min-turns={self.min_turns}",
            f"--request-rate={self.rate}",
            f"--num-prompts={self.requests}",
            f"--seed={self.seed}",
            "--goodput",
            f"ttft:{self.ttft_ms}",
            f"ttft_per_token:{self.ttft_ms_per_token}",
            f"itl_p99:{self.tbt_ms}",
        ]


COUNTS = ("forecasts", "overruns", "repartitions", "preemptions")


@dataclass(frozen=True, slots=True)
class LaneUse:
    """What the lanes did between two looks at /server_info. Seconds, and launches by partition.

    counts: how many launches were forecast, how many of these took longer than their worst case,
    how often the division of the device changed, and batches were pre-empted.
    """

    prefill_busy_s: float
    decode_busy_s: float
    both_busy_s: float
    fused_busy_s: float
    launches: dict[str, int]
    counts: dict[str, int]

    @classmethod
    def between(cls, before: dict[str, Any], after: dict[str, Any]) -> LaneUse:
        """before, after: `pd_multiplex` of the server's internal state."""

        def spent_s(name: str) -> float:
            return float(after[name] - before[name])

        return cls(
            prefill_busy_s=spent_s("prefill_busy_s"),
            decode_busy_s=spent_s("decode_busy_s"),
            both_busy_s=spent_s("both_busy_s"),
            fused_busy_s=spent_s("fused_busy_s"),
            launches={
                partition_name(new): new["launches"] - old["launches"]
                for old, new in zip(before["partitions"], after["partitions"], strict=True)
            },
            counts={name: after[name] - before.get(name, 0) for name in COUNTS if name in after},
        )


def partition_name(partition: dict[str, Any]) -> str:
    """As the scheduler prints it: "whole" or "p84/d48"."""
    if partition["exclusive"]:
        return "whole"
    return f"p{partition['prefill_sms']}/d{partition['decode_sms']}"


def model_flags(model: Path) -> list[str]:
    """Server flags: of a folder only its config.json is used, with random weights, for times do
    not depend on them. A GGUF file is loaded."""
    if model.suffix == ".gguf":
        return []
    return ["--load-format=dummy", "--skip-tokenizer-init"]


def vocab_size(model: Path) -> int:
    """Ids below it are ordinary tokens."""
    if model.suffix == ".gguf":
        from sglang.srt.model_config import ModelConfig
        from sglang.srt.model_source import resolve_model_source

        size = ModelConfig.load(resolve_model_source(str(model)), dtype="auto").vocab_size
    else:
        size = json.loads((model / "config.json").read_text())["vocab_size"]
    return max(1, size - VOCAB_SIZE_MARGIN)


def client_flags(base_url: str, ordinary_ids: int) -> list[str]:
    """Of bench_serving: token ids to /generate, without a tokenizer."""
    return [
        "--backend=sglang",
        f"--base-url={base_url}",
        "--tokenize-prompt",
        f"--vocab-size={ordinary_ids}",
    ]


def run_bench(flags: Sequence[str], limit_s: float, *, quiet: bool = False) -> dict[str, Any]:
    """The result of one run of bench_serving; one that takes longer than `limit_s` is stopped, and
    the result covers the requests that had ended ("interrupted").

    quiet: its output is shown only if it fails. Raises LoadError with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "result.jsonl", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "sglang.bench_serving", *flags]
        command += ["--cache-report", "--output-file", str(output)]
        with log.open("w") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink if quiet else None,
                stderr=subprocess.STDOUT if quiet else None,
            )
            code = _wait(process, limit_s)
        if not output.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            raise LoadError(f"bench_serving ended with code {code}: {tail}".rstrip(": "))
        result: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
        return result


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int:
    try:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait(REPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def call(base_url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST with a body; the JSON object of the answer, empty if it is none.

    Raises ServerError with the server's words.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        base_url + path, data, {"Content-Type": "application/json"} if data else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=CALL_LIMIT_S) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace")
        raise ServerError(f"{path}: HTTP {error.code}: {words}") from error
    except OSError as error:
        raise ServerError(f"{path}: {error}") from error
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def internal_state(base_url: str) -> dict[str, Any]:
    """The first scheduler's, from /server_info."""
    state: dict[str, Any] = call(base_url, "/server_info")["internal_states"][0]
    return state
