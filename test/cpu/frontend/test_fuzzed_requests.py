"""Every operation of the app, driven by its own OpenAPI document: no request may break the server.

Operations are taken from the document, so those added later are driven too. Each has a server of
its own: one that pauses or stops things cannot spoil the next one's requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies

from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.openapi import handlers

EXAMPLES = 8  # of requests that fit the document, and as many that do not
HANGS_S = 10
FLAGS = {"enable_metrics": True}

# What a body needs at least, by field; each body has only those of its fields.
ENOUGH: dict[str, Any] = {
    "text": "Hi",
    "prompt": "Hi",
    "messages": [{"role": "user", "content": "Hi"}],
    "tokens": [1, 2],
    "input": "Hi",
    "max_tokens": 4,
    "policy": "turns",
}
ONE_OF = (("text", "input_ids"), ("prompt", "messages"))

Serve = Callable[..., Any]


def operations(document: dict[str, Any], url: str) -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    for found in schema.get_all_operations():
        yield found.ok()


def broken(response: Any) -> str | None:
    """What is wrong with this answer, if anything is; 503 is how a server says "not now"."""
    if response.status_code >= 500 and response.status_code != 503:
        return f"HTTP {response.status_code}: {response.text[:300]}"
    if response.status_code >= 400 and response.content:
        response.json()  # every error says what it is in JSON
    return None


def with_few_fields(body: Any, known: dict[str, Any], random: Random) -> Any:
    """A body that would be served, with a few fields of the drawn one laid over it.

    Bodies drawn whole have so many odd fields that the first is refused and no other is looked at.
    """
    if not isinstance(body, dict):
        return body
    few = {name: body[name] for name in random.sample(sorted(body), min(len(body), 2))}
    nested = few.get("sampling_params")
    if isinstance(nested, dict):
        kept = random.sample(sorted(nested), min(len(nested), 2))
        few["sampling_params"] = {name: nested[name] for name in kept}
    enough = {name: value for name, value in ENOUGH.items() if name in known}
    for alternatives in ONE_OF:
        given = [name for name in alternatives if name in few] or list(alternatives)
        for name in set(alternatives) - {given[0]} if given[0] in known else ():
            enough.pop(name, None)
            few.pop(name, None)
    return {**enough, **few}


def drive(operation: Any, mode: schemathesis.GenerationMode) -> list[str]:
    """The distinct complaints about EXAMPLES requests, each with a way to send it again."""
    [media] = [*operation.definition.raw.get("requestBody", {}).get("content", {}).values()] or [{}]
    known = media.get("schema", {}).get("properties", {})
    complaints: dict[str, str] = {}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        whole=strategies.booleans(),
        random=strategies.randoms(use_true_random=False),
    )
    def send(case: Any, whole: bool, random: Random) -> None:
        if not whole:
            case.body = with_few_fields(case.body, known, random)
        try:
            problem = broken(case.call(timeout=HANGS_S))
        except (requests.RequestException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            complaints.setdefault(problem[:40], f"{problem}\n    {case.as_curl_command()}")

    try:
        send()
    except Exception as error:  # e.g. nothing violates a schema that allows everything
        if "Unsatisfiable" not in type(error).__name__:
            raise
    return list(complaints.values())


def with_every_method(base_url: str, path: str) -> list[str]:
    """Complaints about requests without a body, whatever the method."""
    complaints = []
    url = base_url + path.replace("{", "").replace("}", "")
    for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
        try:  # on a connection of its own, for one is closed behind a failure
            answer = httpx.request(method, url, timeout=HANGS_S)
        except httpx.TransportError as error:
            complaints.append(f"{method} {path} {type(error).__name__}")
            continue
        if answer.status_code >= 500 and answer.status_code != 503:
            complaints.append(f"{method} {path} HTTP {answer.status_code}: {answer.text[:300]}")
    return complaints


def test_no_request_that_the_document_describes_or_forbids_breaks_the_server(serve: Serve) -> None:
    with serve(**FLAGS) as served:
        document = served.client.get("/openapi.json").json()
    complaints: list[str] = []
    count = sum(len(methods) for methods in document["paths"].values())
    assert count >= 27
    for number in range(count):
        with serve(**FLAGS) as served:
            served.engine.says("Hello there, General Kenobi!")
            operation = list(operations(document, served.url))[number]
            for mode in schemathesis.GenerationMode:
                complaints += [f"{operation.label} {text}" for text in drive(operation, mode)]
            complaints += with_every_method(served.url, operation.path)
            assert httpx.get(f"{served.url}/v1/models").status_code == 200, operation.label
    assert not complaints, "\n".join(complaints)


def refuses_what_is_no_json(client: httpx.Client, path: str) -> bool:
    headers = {"content-type": "application/json"}
    answer = client.post(path, content=b"{", headers=headers)
    return answer.status_code == 400 and "body: not valid JSON" in answer.text


def test_every_body_is_described(serve: Serve) -> None:
    with serve(**FLAGS) as served:
        document = served.client.get("/openapi.json").json()
        for handler in handlers(build_app(served.state)):
            if "POST" in handler.methods:
                described = "requestBody" in document["paths"][handler.path]["post"]
                assert described or not refuses_what_is_no_json(served.client, handler.path)
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert {"text", "sampling_params", "image_data", "no_logs"} <= set(body["schema"]["properties"])
    assert body["schema"]["additionalProperties"] is False


def test_no_texts_have_no_tokens(server: Any) -> None:
    answer = server.client.post("/tokenize", json={"prompt": []})
    assert (answer.status_code, answer.json()["tokens"]) == (200, [])
