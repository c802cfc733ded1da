"""Whether answers follow the schemas and regexes that a running server was given.

    python -m benchmark.structured --base-url http://127.0.0.1:30000 --schemas 1000 --regexes 100

Sends generated JSON schemas and regexes (see structured_cases.py) to /generate, `--concurrency`
at a time, at temperature 1, so that the model's taste decides as little as possible, and checks
every answer that ended of itself: JSON schemas with jsonschema-rs, which shares nothing with the
grammar libraries, regexes with Python's re. An answer that ran into --max-new-tokens is only
counted. Prints one JSON object; exits with 1 if an answer was wrong or a request failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmark.command_line import command_line
from benchmark.structured_cases import Case, cases

ANSWER_LIMIT_S = 600.0
SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Outcome:
    """problem: of an answer that ended. error: of a request that got none."""

    case: Case
    seconds: float
    tokens: int = 0
    finished: bool = False
    problem: str | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("structured", __doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--regexes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="append the JSON object to this file")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("jsonschema_rs") is None:
        parser.error("jsonschema-rs is not installed, pip install 'sglang-drift[dev]' has it")
    summary = run(args)
    line = json.dumps(summary, ensure_ascii=False)
    print(line)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 1 if summary["invalid"] or summary["errors"] else 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON object. args: see main."""
    asked = cases(args.seed, args.schemas, args.regexes)
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=args.base_url, timeout=ANSWER_LIMIT_S, limits=limits) as client,
        ThreadPoolExecutor(args.concurrency) as pool,
    ):
        try:
            client.get("/server_info").raise_for_status()
        except httpx.HTTPError as error:
            sys.exit(f"no server answers at {args.base_url}: {error}")
        started_s = time.monotonic()
        outcomes = list(
            pool.map(
                lambda place: _ask(client, asked[place], place, args.max_new_tokens),
                range(len(asked)),
            )
        )
        seconds = time.monotonic() - started_s
        state = client.get("/server_info").json()["internal_states"][0]
    return {
        "schemas": args.schemas,
        "regexes": args.regexes,
        "seed": args.seed,
        "concurrency": args.concurrency,
        **_summary(outcomes, seconds),
        "server": {
            "grammars": state.get("grammars"),
            "policy": state.get("pd_multiplex", {}).get("policy"),
            "both_busy_s": state.get("pd_multiplex", {}).get("both_busy_s"),
        },
    }


def _summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    latencies = sorted(outcome.seconds for outcome in outcomes if not outcome.error)
    wrong = [outcome for outcome in outcomes if outcome.problem]
    failed = [outcome for outcome in outcomes if outcome.error]
    finished = sum(outcome.finished for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    return {
        "finished": finished,
        "unfinished": len(latencies) - finished,
        "valid": finished - len(wrong),
        "invalid": len(wrong),
        "errors": len(failed),
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "median_latency_s": round(statistics.median(latencies), 3) if latencies else None,
        "max_latency_s": round(latencies[-1], 3) if latencies else None,
        "error_kinds": Counter(outcome.error for outcome in failed).most_common(SHOWN_FAILURES),
        "wrong": [
            {"kind": o.case.kind, "grammar": o.case.text, "problem": o.problem}
            for o in wrong[:SHOWN_FAILURES]
        ],
    }


def _ask(client: httpx.Client, case: Case, place: int, max_new_tokens: int) -> Outcome:
    what = "JSON" if case.kind == "json_schema" else "text"
    body = {
        "text": f"Example {place} of {what} in the wanted form:\n",
        "sampling_params": {
            case.kind: case.text,
            "temperature": 1.0,
            "max_new_tokens": max_new_tokens,
        },
    }
    started_s = time.monotonic()
    try:
        response = client.post("/generate", json=body)
    except httpx.HTTPError as error:
        return Outcome(case, time.monotonic() - started_s, error=f"{type(error).__name__}: {error}")
    took_s = time.monotonic() - started_s
    if response.status_code != 200:
        return Outcome(case, took_s, error=f"{response.status_code}: {response.text[:300]}")
    answer = response.json()
    tokens = len(answer["output_ids"])
    if answer["meta_info"]["finish_reason"]["type"] != "stop":
        return Outcome(case, took_s, tokens)
    return Outcome(case, took_s, tokens, finished=True, problem=case.problem(answer["text"]))


if __name__ == "__main__":
    sys.exit(main())
