"""Operations on a server that works."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

GREEDY = {"temperature": 0, "ignore_eos": True}
STORY = "The lighthouse keeper climbed the stairs one last time, and"
LIMIT_S = 60.0


def test_requests_of_both_kinds_survive_a_pause_and_memory_that_goes_and_comes(
    client: Any, eventually: Callable[..., None]
) -> None:
    expected = client.generate(STORY, {**GREEDY, "max_new_tokens": 120})["text"]
    with ThreadPoolExecutor(1) as pool:
        with client.stream(STORY, {**GREEDY, "max_new_tokens": 120}) as events:
            next(events)
            paused = client.http.post("/pause_generation", json={"mode": "retract"})
            assert paused.json()["status"] == "ok"
            late = pool.submit(client.generate, STORY, {**GREEDY, "max_new_tokens": 5})
            eventually(lambda: client.state()["waiting_requests"] == 2, LIMIT_S)
            assert client.http.get("/health").status_code == 200
            for path in ("release", "resume"):
                done = client.http.post(f"/{path}_memory_occupation")
                assert done.status_code == 200, done.text
            assert not late.done()
            assert client.http.post("/continue_generation").status_code == 200
            last = list(events)[-1]
        assert last["text"] == expected
        assert last["meta_info"]["num_retractions"] == 1
        assert expected.startswith(late.result(LIMIT_S)["text"])
    client.flush_cache()


def test_the_load_is_what_runs(client: Any) -> None:
    with client.stream(STORY, {**GREEDY, "max_new_tokens": 400}) as events:
        next(events)
        loads = client.http.get("/v1/loads").json()
        prometheus = client.http.get("/v1/loads?format=prometheus&include=core").text
        client.abort("")
        client.http.post("/abort_request", json={"abort_all": True})
        list(events)
    [load] = loads["loads"]
    assert load["num_running_reqs"] == loads["aggregate"]["total_reqs"] == 1
    assert 0 < load["num_used_tokens"] < load["max_total_num_tokens"] == 24 * 1024
    assert load["memory"]["weight_gb"] > 0.5
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(prometheus)
        for sample in family.samples
    }
    assert samples["sglang_num_running_reqs"] == 1
    assert "sglang_memory_weight_gb" not in samples


def test_a_profile_ends_by_itself(
    client: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    options = {"output_dir": str(tmp_path), "num_steps": 5, "activities": ["CPU"]}
    started = client.http.post("/start_profile", json=options)
    assert started.status_code == 200, started.text
    client.generate(STORY, {**GREEDY, "max_new_tokens": 12})
    stopped = client.http.post("/stop_profile")
    [trace] = tmp_path.iterdir()
    assert str(trace) in stopped.text
    with gzip.open(trace) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert "aten::linear" in names
    assert client.http.post("/stop_profile").status_code == 200
