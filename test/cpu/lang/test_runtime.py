"""Runtime: starts a server of its own, waits for it, and stops it whatever happens."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import textwrap
from pathlib import Path

import psutil
import pytest

import sglang as sgl
from sglang.lang.backend import runtime as runtime_module
from sglang.lang.backend.runtime import flags, free_port
from sglang.lang.errors import BackendError

FAKE_SERVER = """
import argparse, http.server, json, sys, time
parser = argparse.ArgumentParser()
for name in ("host", "model-path", "log-level", "mode", "api-key"):
    parser.add_argument("--" + name)
parser.add_argument("--port", type=int)
args = parser.parse_args()
if args.mode == "broken":
    sys.exit(7)
if args.mode == "late":
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def log_message(self, *args): pass
    def reply(self, body, status=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        Handler.asked += 1
        if Handler.asked == 1:
            return self.reply({"error": "starting"}, 503)
        if self.path == "/health_generate":
            return self.reply(b"")
        self.reply({"model_path": args.model_path, "log_level": args.log_level, "path": self.path})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            events = ['{"text": "a"}', '{"text": "ab"}', "[DONE]"]
            self.reply("".join(f"data: {event}\\n\\n" for event in events).encode())
        else:
            self.reply({"text": "ab", "body": body, "meta_info": {}})
http.server.ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
"""


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch):
    """Runtime starts a small HTTP server with the same flags instead of a model's."""
    (tmp_path / "fake_sglang_server.py").write_text(textwrap.dedent(FAKE_SERVER))
    monkeypatch.setattr(runtime_module, "SERVER_MODULE", "fake_sglang_server")
    monkeypatch.setattr(runtime_module, "POLL_S", 0.01)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


@sgl.function
def program(s):
    s += "x" + sgl.gen("y")


def test_a_runtime_starts_serves_and_stops(fake_server):
    with sgl.Runtime(model_path="/models/Qwen2-7B-Instruct", launch_timeout=30) as runtime:
        process = psutil.Process(runtime.pid)
        assert program.run(backend=runtime)["y"] == "ab"
        assert runtime.get_chat_template().name == "qwen"
        assert runtime.get_server_info()["log_level"] == "error"
        assert json.loads(runtime.generate("hi", {"temperature": 0}))["body"] == {
            "text": "hi",
            "sampling_params": {"temperature": 0},
            "return_logprob": False,
        }

        async def read():
            return [piece async for piece in runtime.async_generate("hi")]

        assert asyncio.run(read()) == ["a", "b"]
    assert not process.is_running()
    runtime.shutdown()


def test_the_port_is_the_first_free_one(fake_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with sgl.Runtime(model_path="m", port=port, launch_timeout=30) as runtime:
            assert int(runtime.url.rsplit(":", 1)[1]) > port
        assert free_port("127.0.0.1", port) > port


def test_any_port_can_be_the_first_one_tried(monkeypatch):
    assert free_port("127.0.0.1", 50000) >= 50000
    monkeypatch.setattr(runtime_module, "PORTS_TRIED", 0)
    with pytest.raises(OSError, match="port: none is free from 50000"):
        free_port("127.0.0.1", 50000)


def test_a_runtime_that_is_no_longer_used_stops_its_server(fake_server):
    runtime = sgl.Runtime(model_path="m", launch_timeout=30)
    process = psutil.Process(runtime.pid)
    del runtime
    gc.collect()
    assert not process.is_running()


def test_a_server_that_leaves_at_start_is_an_error(fake_server):
    with pytest.raises(BackendError, match="left with code 7"):
        sgl.Runtime(model_path="m", mode="broken", launch_timeout=30)


def test_a_server_that_is_late_is_stopped(fake_server):
    before = set(psutil.Process().children())
    with pytest.raises(BackendError, match=r"launch_timeout: .* not ready after 0.2 s"):
        sgl.Runtime(model_path="m", mode="late", launch_timeout=0.2)
    assert set(psutil.Process().children()) == before


def test_arguments_become_flags():
    options = {"tp_size": 2, "enable_metrics": True, "skip": False, "revision": None}
    options |= {"json_model_override_args": {"a": 1}, "bucket": [1, 2.5]}
    assert flags(options) == [
        "--tp-size=2",
        "--enable-metrics",
        '--json-model-override-args={"a": 1}',
        "--bucket",
        "1",
        "2.5",
    ]


def test_server_args_give_all_arguments_at_once(fake_server):
    args = sgl.ServerArgs(model_path="from-args", log_level="warning")
    with sgl.Runtime(server_args=args, launch_timeout=30) as runtime:
        assert runtime.get_server_info()["model_path"] == "from-args"
        assert runtime.get_server_info()["log_level"] == "warning"


def test_a_runtime_needs_a_model():
    with pytest.raises(TypeError, match="model_path"):
        sgl.Runtime()
    with pytest.raises(TypeError, match="there can be no others"):
        sgl.Runtime(server_args=sgl.ServerArgs(model_path="m"), port=1)
