"""A real vLLM server in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

START_S = 180.0
_TAIL_LINES = 40


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def vllm_server(
    folder: Path, *, name: str, log: Path, max_model_len: int = 512, options: Sequence[str] = ()
) -> Iterator[str]:
    """Run vLLM's own server on a model folder and yield its base URL, up to and including `/v1`.

    `options` are added to its command line.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; `make test-engines` makes an environment with it")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("vLLM's CPU build is for Linux on x86_64")
    port = free_port()
    # `vllm serve` of the CPU build looks for a distribution named vllm and dies; its module does not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(max_model_len), "--max-num-seqs", "16"]
    # Else the model's generation_config.json would fill in what a request leaves out.
    command += ["--generation-config", "vllm", *options]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not _is_healthy(url):
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            what = f"ended with code {code}" if code is not None else f"did not answer within {START_S:g} s"
            pytest.fail(f"the vLLM server {what}; the end of {log}:\n{tail}", pytrace=False)
        time.sleep(0.5)
