"""Endpoints of operations: what they pass on, what they answer, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.messages import (
    ContinueGeneration,
    FreezeGarbage,
    GetWeights,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SetInternalState,
    StartProfile,
    StopProfile,
    UpdateWeights,
)


@pytest.fixture
def operations(server: Any) -> list[Any]:
    """Those that have reached the scheduler."""
    server.engine.scheduler.operations.clear()
    found: list[Any] = server.engine.scheduler.operations
    return found


def test_pausing_and_going_on(server: Any, operations: list[Any]) -> None:
    client = server.client
    assert client.post("/pause_generation").json()["status"] == "ok"
    assert client.get("/health").status_code == 200  # at rest by wish, and it answers
    assert client.post("/continue_generation", json={}).status_code == 200
    client.post("/pause_generation", json={"mode": "retract"})
    client.post("/continue_generation", json={"torch_empty_cache": True})
    assert [type(operation) for operation in operations] == [
        PauseGeneration,
        ContinueGeneration,
        PauseGeneration,
        ContinueGeneration,
    ]
    assert [operations[i].mode for i in (0, 2)] == ["abort", "retract"]


def test_profiling_passes_its_options_on(
    server: Any, operations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", "/traces")
    assert server.client.post("/start_profile").status_code == 200
    options = {
        "output_dir": "/elsewhere",
        "num_steps": 3,
        "start_step": 7,
        "activities": ["CPU"],
        "with_stack": True,
        "record_shapes": True,
        "profile_prefix": "run-1",
        "profile_by_stage": False,
    }
    assert server.client.post("/start_profile", json=options).status_code == 200
    assert server.client.get("/stop_profile").status_code == 200
    plain, full, stop = operations
    assert (plain.output_dir, plain.activities) == ("/traces", ["CPU", "GPU"])
    assert full == StartProfile(
        call_id=full.call_id,
        output_dir="/elsewhere",
        activities=["CPU"],
        prefix="run-1",
        start_step=7,
        num_steps=3,
        with_stack=True,
        record_shapes=True,
    )
    assert isinstance(stop, StopProfile)


def test_new_weights_are_told_with_answers(server: Any, operations: list[Any]) -> None:
    client, state = server.client, server.state
    body = {"model_path": "/new", "weight_version": "v2", "abort_all_requests": True}
    reply = client.post("/update_weights_from_disk", json=body)
    assert reply.json()["success"] is True
    [update] = operations
    assert update == UpdateWeights(
        call_id=update.call_id, model_path="/new", load_format="auto", abort_all=True
    )
    assert client.get("/model_info").json()["model_path"] == "/new"
    answer = client.post("/generate", json={"text": "Hi"}).json()
    assert answer["meta_info"]["weight_version"] == "v2"
    renamed = {"new_version": "v3", "abort_all_requests": False}
    assert client.post("/update_weight_version", json=renamed).json()["new_version"] == "v3"
    assert client.get("/weight_version").json() == {"weight_version": "v3"}
    assert client.get("/model_info").json()["weight_version"] == "v3"
    state.manager.weight_version, state.controls.model_path = "default", "smollm2"


def test_parameters_are_read_by_name(server: Any, operations: list[Any]) -> None:
    scheduler = server.engine.scheduler
    scheduler.operation_data = {GetWeights: {"values": [[1.0, 2.0]]}}
    body = {"name": "model.norm.weight", "truncate_size": 1}
    got = server.client.request("GET", "/get_weights_by_name", json=body)
    scheduler.operation_data = {}
    assert got.json() == [[1.0, 2.0]]
    assert (operations[0].name, operations[0].rows) == ("model.norm.weight", 1)


def test_requests_get_503_while_memory_is_released(server: Any, operations: list[Any]) -> None:
    scheduler, client = server.engine.scheduler, server.client
    scheduler.operation_data = {
        ReleaseMemory: {"released": ["kv_cache", "weights"]},
        ResumeMemory: {"released": []},
    }
    assert client.post("/release_memory_occupation").status_code == 200
    refused = client.post("/generate", json={"text": "Hi"})
    assert refused.status_code == 503
    assert "resume_memory_occupation" in refused.json()["message"]
    assert client.get("/health").status_code == 200
    tags = {"tags": ["weights"]}
    assert client.post("/resume_memory_occupation", json=tags).status_code == 200
    scheduler.operation_data = {}
    assert client.post("/generate", json={"text": "Hi"}).status_code == 200
    release, resume = operations
    assert release.tags == ["kv_cache", "weights", "cuda_graph"]
    assert resume.tags == ["weights"]


def test_settings_change_and_show(server: Any, operations: list[Any]) -> None:
    client, args = server.client, server.state.args
    values = {"max_queued_requests": 7, "schedule_conservativeness": 0.5}
    reply = client.post("/set_internal_state", json={"server_args": values})
    assert reply.json() == {"updated": True, "server_args": values}
    [sent] = operations
    assert isinstance(sent, SetInternalState)
    assert sent.values == values
    assert client.get("/server_info").json()["max_queued_requests"] == 7
    assert client.post("/freeze_gc").status_code == 200
    assert isinstance(operations[-1], FreezeGarbage)
    server.state.args = args


def test_requests_are_logged_from_when_that_is_asked_for(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    args = server.state.args
    caplog.set_level("INFO")
    server.client.post("/generate", json={"text": "quiet"})
    body = {"log_requests": True, "log_requests_level": 3}
    assert server.client.post("/configure_logging", json=body).status_code == 200
    server.client.post("/generate", json={"text": "heard"})
    server.client.post("/configure_logging", json={"log_requests": False})
    server.client.post("/generate", json={"text": "quiet again"})
    said = [record.getMessage() for record in caplog.records if "Receive" in record.getMessage()]
    assert len(said) == 1
    assert "heard" in said[0]
    server.state.args = args


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/pause_generation", {"mode": "later"}, "mode"),
        ("/pause_generation", {"how": 1}, "how"),
        ("/continue_generation", {"mode": "abort"}, "mode"),
        ("/start_profile", {"num_steps": 0}, "num_steps"),
        ("/start_profile", {"activities": ["TPU"]}, "activities[0]"),
        ("/start_profile", {"profile_by_stage": True}, "profile_by_stage"),
        ("/start_profile", {"profile_prefix": "../up"}, "profile_prefix"),
        ("/update_weights_from_disk", {}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "x", "is_async": True}, "is_async"),
        ("/update_weights_from_disk", {"model_path": "x", "keep_pause": True}, "keep_pause"),
        ("/update_weight_version", {"new_version": 3}, "new_version"),
        ("/get_weights_by_name", {"name": "x", "truncate_size": 0}, "truncate_size"),
        ("/release_memory_occupation", {"tags": ["everything"]}, "tags[0]"),
        ("/release_memory_occupation", {"tags": []}, "tags"),
        ("/set_internal_state", {"server_args": {"port": 1}}, "port"),
        ("/set_internal_state", {"server_args": {"max_queued_requests": -1}}, "max-queued"),
        ("/set_internal_state", {}, "server_args"),
        ("/configure_logging", {"log_requests_level": 9}, "log_requests_level"),
        ("/configure_logging", {"crash_dump_folder": "/x"}, "crash_dump_folder"),
    ],
)
def test_a_bad_field_is_named(
    server: Any, operations: list[Any], path: str, body: dict[str, Any], named: str
) -> None:
    response = server.client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]
    assert not operations


@pytest.mark.parametrize(
    ("query", "named"),
    [("include=tea", "include"), ("format=xml", "format"), ("dp_rank=1", "dp_rank")],
)
def test_a_bad_query_of_the_load_is_named(server: Any, query: str, named: str) -> None:
    response = server.client.get(f"/v1/loads?{query}")
    assert response.status_code == 400
    assert named in response.json()["message"]
