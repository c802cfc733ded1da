"""Runtime: a server of the program's own, in a process beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.backend.server_connection import ANSWER_LIMIT_S, ServerConnection
from sglang.lang.chat_format import ChatTemplate
from sglang.lang.errors import BackendError

SERVER_MODULE = "sglang.launch_server"
FIRST_PORT = 30000
PORTS_TRIED = 10000
POLL_S = 0.2
HEALTH_LIMIT_S = 20.0
STOP_LIMIT_S = 30.0


class Runtime:
    """Starts a server and waits until it answers. Programs take it as a backend.

    The arguments are those of ServerArgs, the model's path first; `server_args` takes them as one
    value. The port is the first free one from `port`. log_level: of the server, which prints where
    this process does. launch_timeout: seconds; BackendError if the server leaves or is late. It is
    stopped by `shutdown`, at the end of a `with` block, when the Runtime is no longer used, and
    when this process ends in good order.
    """

    def __init__(
        self, log_level: str = "error", launch_timeout: float = 300.0, *args: Any, **kwargs: Any
    ) -> None:
        options = _options(args, kwargs, log_level)
        host = str(options.setdefault("host", "127.0.0.1"))
        options["port"] = port = free_port(host, int(options.get("port", FIRST_PORT)))
        self.model_path = str(options["model_path"])
        self.url = f"http://{host}:{port}"
        self.generate_url = f"{self.url}/generate"
        self.endpoint: RuntimeEndpoint | None = None
        process = subprocess.Popen(
            [sys.executable, "-m", SERVER_MODULE, *flags(options)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the program, which then stops the server
        )
        self.pid: int | None = process.pid
        self._stop = weakref.finalize(self, _stop, process)
        api_key = options.get("api_key")
        try:
            _wait_ready(process, self.url, api_key, launch_timeout)
            self.endpoint = RuntimeEndpoint(self.url, api_key)
            self._server = ServerConnection(self.url, api_key)
        except BaseException:
            self._stop()
            raise
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def shutdown(self) -> None:
        """Stops the server. A second time it does nothing."""
        if self.endpoint is not None:
            self.endpoint.shutdown()
            self._server.close()
        self._stop()
        self.pid = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def generate(
        self,
        prompt: str | list[str],
        sampling_params: Mapping[str, Any] | None = None,
        return_logprob: bool | list[bool] | None = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] | None = None,
        lora_path: list[str | None] | None = None,
    ) -> str:
        """The JSON text of /generate's answer."""
        body = {
            "text": prompt,
            "sampling_params": sampling_params,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "lora_path": lora_path,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return json.dumps(self._server.post("/generate", given))

    def encode(self, prompt: str | list[str]) -> str:
        """The JSON text of /encode's answer."""
        return json.dumps(self._server.post("/encode", {"text": prompt}))

    async def async_generate(
        self, prompt: str, sampling_params: Mapping[str, Any] | None = None
    ) -> AsyncIterator[str]:
        """The answer piece by piece."""
        body = {"text": prompt, "sampling_params": dict(sampling_params or {}), "stream": True}
        told = 0
        async with (
            httpx.AsyncClient(timeout=ANSWER_LIMIT_S, headers=self._headers) as client,
            client.stream("POST", self.generate_url, json=body) as response,
        ):
            if response.is_error:
                raise BackendError(f"HTTP {response.status_code}: {(await response.aread())!r}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise BackendError(str(event["error"]))
                if event["text"][told:]:
                    yield event["text"][told:]
                told = len(event["text"])

    add_request = async_generate

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, from transformers."""
        from transformers import AutoTokenizer

        path = Path(self.model_path)
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(self.model_path)

    def get_server_info(self) -> dict[str, Any]:
        return self._running().get_server_info()

    def flush_cache(self) -> bool:
        return self._running().flush_cache()

    def cache_prefix(self, prefix: str) -> None:
        self._running().cache_prefix(prefix)

    def start_profile(self) -> None:
        self._running().start_profile()

    def stop_profile(self) -> None:
        self._running().stop_profile()

    def get_chat_template(self) -> ChatTemplate:
        return self._running().get_chat_template()

    def _running(self) -> RuntimeEndpoint:
        assert self.endpoint is not None
        return self.endpoint


def _options(args: tuple[Any, ...], kwargs: dict[str, Any], log_level: str) -> dict[str, Any]:
    """Flags by field name. TypeError for what names no model."""
    options = dict(kwargs)
    given = options.pop("server_args", None)
    if given is not None:
        if args or options:
            raise TypeError("server_args: gives all arguments, there can be no others")
        return {
            field.name: value
            for field in dataclasses.fields(given)
            if (value := getattr(given, field.name)) != _default(field)
        }
    if len(args) > 1:
        raise TypeError(f"only the model's path can go without its name, got {args}")
    if args:
        options["model_path"] = args[0]
    if "model_path" not in options:
        raise TypeError("model_path: which model to serve")
    return {"log_level": log_level, **options}


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def flags(options: Mapping[str, Any]) -> list[str]:
    """The command line. True is a switch; False and None are left out."""
    line: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            line.append(flag)
        elif isinstance(value, Mapping):
            line.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            line += [flag, *map(str, value)]
        else:
            line.append(f"{flag}={value}")
    return line


def free_port(host: str, first: int) -> int:
    """The first from there on that nobody listens at; OSError if there is none."""
    last = min(first + PORTS_TRIED, 65536) - 1
    for port in range(first, last + 1):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    raise OSError(f"port: none is free from {first} to {last}")


def _wait_ready(
    process: subprocess.Popen[bytes], url: str, api_key: str | None, limit_s: float
) -> None:
    connection = ServerConnection(url, api_key)
    deadline_s = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline_s:
            code = process.poll()
            if code is not None:
                raise BackendError(f"the server left with code {code} while it started")
            with suppress(BackendError):
                connection.get("/health_generate", limit_s=HEALTH_LIMIT_S)
                return
            time.sleep(POLL_S)
    finally:
        connection.close()
    raise BackendError(f"launch_timeout: the server was not ready after {limit_s:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In good order if it can be had, but surely."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
