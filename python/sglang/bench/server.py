"""The calls around the load: readiness, names, cache flush, profiler, server state."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import orjson

from sglang.bench.errors import BenchError
from sglang.bench.options import ProfileOptions

_CALL_TIMEOUT = aiohttp.ClientTimeout(total=10)
_PROFILE_TIMEOUT = aiohttp.ClientTimeout(total=300)  # a trace of minutes takes long to write
_POLL_S = 0.5


class ServerControl:
    def __init__(self, http: aiohttp.ClientSession, base_url: str) -> None:
        self._http = http
        self._base_url = base_url

    async def wait_ready(self, timeout_s: float) -> str:
        """Asks GET /v1/models until it answers, at least once; the first model's id.

        Raises BenchError with the last failure.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                models = await self._get("/v1/models")
                return str(models["data"][0]["id"])
            except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
                failure = f"{type(error).__name__}: {error}"
            if time.monotonic() + _POLL_S > deadline_s:
                raise BenchError(
                    f"no server is ready at {self._base_url} after "
                    f"--ready-check-timeout-sec {timeout_s:g} ({failure})"
                )
            await asyncio.sleep(_POLL_S)

    async def model_info(self) -> dict[str, Any] | None:
        """GET /model_info; None where the server has no such endpoint."""
        return await self._get_or_none("/model_info")

    async def server_info(self) -> dict[str, Any] | None:
        """GET /server_info; None where the server has no such endpoint."""
        return await self._get_or_none("/server_info")

    async def flush_cache(self, timeout_s: float) -> None:
        """Empties the prefix cache. Raises BenchError if the server does not."""
        limit = aiohttp.ClientTimeout(total=timeout_s + 10)
        try:
            async with self._http.post(
                self._base_url + "/flush_cache", params={"timeout": f"{timeout_s:g}"}, timeout=limit
            ) as response:
                text = await response.text()
                if response.status != 200:
                    raise BenchError(f"--flush-cache: HTTP {response.status}: {text}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"--flush-cache: {type(error).__name__}: {error}") from error

    async def start_profile(self, profile: ProfileOptions) -> None:
        """Starts the profiler of each server. Raises BenchError if one does not start."""
        for url in profile.urls:
            await self._profile_call(f"{url}/start_profile", dict(profile.body))

    async def stop_profile(self, profile: ProfileOptions) -> None:
        """Ends what start_profile began, unless it ends by itself. Raises BenchError."""
        if not profile.stops_itself:
            for url in profile.urls:
                await self._profile_call(f"{url}/stop_profile", {})

    async def _profile_call(self, url: str, body: dict[str, Any]) -> None:
        try:
            async with self._http.post(
                url, data=orjson.dumps(body), timeout=_PROFILE_TIMEOUT
            ) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    raise BenchError(f"--profile: {url}: HTTP {response.status}: {text[:500]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"--profile: {url}: {type(error).__name__}: {error}") from error

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._http.get(self._base_url + path, timeout=_CALL_TIMEOUT) as response:
            response.raise_for_status()
            data = orjson.loads(await response.read())
        if not isinstance(data, dict):
            raise ValueError(f"GET {path} did not return an object")
        return data

    async def _get_or_none(self, path: str) -> dict[str, Any] | None:
        try:
            return await self._get(path)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
