"""The contract through the real `vllm serve` and the real OpenAI client."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from harness.capture.http import decode
from harness.engine import EngineError
from harness.media import image
from harness.pytest_plugin.subject import KV_CACHE_BYTES, Subject
from suites import killed_server
from suites.test_contract_streaming import alive

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once, pytest.mark.clause("C13")]


@contextlib.contextmanager
def _port() -> Iterator[int]:
    """One that nobody else gets meanwhile: the server listens on it beside this socket, as both say SO_REUSEADDR."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """What `vllm serve` calls these arguments of EngineArgs."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}"


@contextlib.contextmanager
def _serving(
    subject: Subject, log: Path, *options: str, inside: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """`vllm serve`, started by the command `inside`."""
    command = [*inside, str(Path(sys.executable).parent / "vllm"), "serve", str(subject.path)]
    command += ["--served-model-name", "model", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--max-num-seqs", "8", "--enable-return-mm-embedding", *_flags(subject.user_options), *options]
    if torch.cuda.is_available():
        command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--gpu-memory-utilization", "0.15"]
    command += ["--middleware", f"{killed_server.__name__}.{killed_server.KilledAtTheFirstChunk.__name__}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    with log.open("wb") as output:
        # A process group and not a session, as in engine_process.run: the client waited until all was answered.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process
    finally:
        _end(process)


@pytest.fixture(scope="module")
def server(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`vllm serve`, and its address."""
    subject.pool.shutdown()  # their memory is needed
    log = tmp_path_factory.mktemp("server") / "log"
    with _port() as port, _serving(subject, log, "--host", "127.0.0.1", "--port", str(port)) as process:
        address = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, address, log)
        yield process, address


@pytest.fixture(scope="module")
def client(server: tuple[subprocess.Popen[bytes], str]) -> Iterator[openai.OpenAI]:
    with _client(server[1]) as api:
        yield api


def _client(address: str) -> openai.OpenAI:
    """One connection a request: the server closes one that was idle for 5 s, maybe while a request is on its way."""
    headers = {"Connection": "close"}
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, default_headers=headers)


def _end(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have died
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise EngineError(f"`vllm serve` did not come up. Its log ends:\n{log.read_text()[-3000:]}")


def ask(client: openai.OpenAI, max_completion_tokens: int = 5, picture: int | None = 101, **options: Any) -> Any:
    content: list[dict[str, Any]] = [{"type": "text", "text": "what?"}]
    if picture is not None:
        buffer = io.BytesIO()
        image(picture).content.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_completion_tokens=max_completion_tokens,
        **{"temperature": 0, **options},
    )


ASKED: dict[str, Any] = {"extra_body": {"vllm_xargs": {"return_mm_embedding": True}}}


def shown(server: tuple[subprocess.Popen[bytes], str]) -> dict[str, float]:
    """The metrics, by name."""
    families = text_string_to_metric_families(httpx.get(f"{server[1]}/metrics", timeout=None).text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def used(values: dict[str, float]) -> float:
    """Items of the requests that were captured; the image may be held from the tests before."""
    return sum(values[f"vllm:mm_embedding_{name}_total"] for name in ("hits", "misses"))


def test_the_json_is_unchanged_unless_asked(client: openai.OpenAI) -> None:
    plain, asked = ask(client).model_dump(), ask(client, **ASKED).model_dump()
    assert "mm_embedding" not in str(plain), "the JSON has mm_embedding although the request did not ask for it"
    [choice], [asked_choice] = plain["choices"], asked["choices"]
    assert set(asked_choice) - set(choice) == {"mm_embedding"}
    assert asked_choice["message"]["content"] == choice["message"]["content"]
    assert set(plain) == set(asked)


@pytest.mark.clause("C1", "C5")
def test_streaming_carries_it_on_the_last_chunk(client: openai.OpenAI) -> None:
    whole = decode(ask(client, **ASKED).choices[0].mm_embedding)
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **ASKED) if chunk.choices]
    *others, last = chunks
    assert others
    assert all(not hasattr(choice, "mm_embedding") for choice in others)
    assert last.finish_reason is not None
    torch.testing.assert_close(decode(last.mm_embedding), whole)
    assert not any(hasattr(chunk.choices[0], "mm_embedding") for chunk in ask(client, stream=True) if chunk.choices)


@pytest.mark.clause("C2", "C3")
def test_it_is_the_embedding(client: openai.OpenAI, subject: Subject) -> None:
    value = ask(client, **ASKED).choices[0].mm_embedding
    rows = decode(value)
    assert [(item["modality"], item["start"], item["num_rows"]) for item in value["items"]] == [("image", 0, len(rows))]
    truth = subject.engine().generate(subject.request(image(101), "server"))[0][0].mm_embedding
    assert truth is not None
    torch.testing.assert_close(rows.float(), truth.float(), rtol=0.1, atol=0.1)


@pytest.mark.clause("C8")
def test_levels_come_on_request(client: openai.OpenAI, subject: Subject) -> None:
    both = {"return_mm_embedding": True, "return_mm_embedding_levels": True}
    [choice] = ask(client, extra_body={"vllm_xargs": both}).choices
    request = subject.request(image(101), "server", extra_args={"return_mm_embedding_levels": True})
    truth = subject.engine().generate(request)[0][0]
    assert truth.mm_embedding is not None
    torch.testing.assert_close(decode(choice.mm_embedding).float(), truth.mm_embedding.float(), rtol=0.1, atol=0.1)
    if not subject.spec.num_levels:
        assert not hasattr(choice, "mm_embedding_levels")
        return
    assert truth.mm_embedding_levels is not None
    levels = decode(choice.mm_embedding_levels)
    torch.testing.assert_close(levels.float(), truth.mm_embedding_levels.float(), rtol=0.1, atol=0.1)
    assert not hasattr(ask(client, **ASKED).choices[0], "mm_embedding_levels"), "nobody asked for levels"


@pytest.mark.clause("C7")
def test_every_choice_carries_it(client: openai.OpenAI) -> None:
    truth = decode(ask(client, **ASKED).choices[0].mm_embedding)
    several = {"n": 3, "temperature": 1.0, "seed": 0, **ASKED}
    whole = {choice.index: choice.mm_embedding for choice in ask(client, **several).choices}
    chunks = [choice for chunk in ask(client, stream=True, **several) for choice in chunk.choices]
    last = {choice.index: choice.mm_embedding for choice in chunks if choice.finish_reason is not None}
    for found in (whole, last):
        assert sorted(found) == [0, 1, 2]
        for value in found.values():
            torch.testing.assert_close(decode(value), truth)


@pytest.mark.clause("C4")
def test_a_chat_without_media_has_null(client: openai.OpenAI) -> None:
    [choice] = ask(client, picture=None, **ASKED).choices
    *_others, last = [chunk for chunk in ask(client, picture=None, stream=True, **ASKED) if chunk.choices]
    for found in (choice, last.choices[0]):
        assert found.finish_reason is not None
        assert found.mm_embedding is None


@pytest.mark.clause("C12")
def test_beams_have_none(server: tuple[subprocess.Popen[bytes], str], client: openai.OpenAI) -> None:
    """vLLM makes their completions in the server, of a request for each token of each beam."""
    beams: dict[str, Any] = {"use_beam_search": True, "n": 2}
    new = 102  # a refused request must leave no trace of its image, which the server would take for known
    with pytest.raises(openai.BadRequestError, match="return_mm_embedding and use_beam_search are asked for"):
        ask(client, picture=new, extra_body={**beams, **ASKED["extra_body"]})
    before = shown(server)
    assert len(ask(client, picture=new, extra_body=beams).choices) == 2
    ask(client, **ASKED)  # the metrics are told when it has ended
    assert used(shown(server)) == used(before) + 1, "requests of a beam search were captured"


@pytest.mark.clause("C15")
def test_the_metrics_show_what_is_captured(server: tuple[subprocess.Popen[bytes], str], client: openai.OpenAI) -> None:
    ask(client, **ASKED)
    before = shown(server)
    rows = decode(ask(client, **ASKED).choices[0].mm_embedding)
    after = shown(server)
    assert used(after) == used(before) + 1, "/metrics does not count the item"
    captured = [values["vllm:mm_embedding_captured_items_total"] for values in (before, after)]
    assert captured[0] == captured[1] >= 1, "the image was held, and was captured again"
    assert after["vllm:mm_embedding_held_bytes"] >= rows.nbytes


@pytest.mark.clause("C11")
def test_a_killed_frontend_leaves_nothing(server: tuple[subprocess.Popen[bytes], str], client: openai.OpenAI) -> None:
    process, _address = server
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree, "the server has no processes of its own"
    with pytest.raises(openai.APIConnectionError):
        list(ask(client, stream=True, max_completion_tokens=900, extra_headers={killed_server.HEADER: ""}, **ASKED))
    assert process.wait() == -signal.SIGKILL
    # vLLM leaves its engine core running, with and without the plugin: whoever killed the one ends the other.
    _end(process)
    # The memory has no name (memfd): with the last process it is gone.
    assert not (left := alive(tree)), f"processes outlived the server: {left}"


def test_an_engine_in_another_container(subject: Subject, tmp_path: Path) -> None:
    """As `vllm serve --headless` on another host: the server cannot open the engine core's memory."""
    elsewhere = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*elsewhere, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a pid namespace of one's own is not permitted")
    subject.pool.shutdown()
    log, engine_log = tmp_path / "log", tmp_path / "engine log"
    with contextlib.ExitStack() as stack:
        port, rpc_port = (str(stack.enter_context(_port())) for _ in range(2))
        shared = ["--data-parallel-size", "1", "--data-parallel-address", "127.0.0.1"]
        shared += ["--data-parallel-rpc-port", rpc_port]
        engine = ["--headless", "--data-parallel-size-local", "1"]
        stack.enter_context(_serving(subject, engine_log, *shared, *engine, inside=elsewhere))
        api = ["--host", "127.0.0.1", "--port", port, "--data-parallel-size-local", "0"]
        process = stack.enter_context(_serving(subject, log, *shared, *api))
        address = f"http://127.0.0.1:{port}"
        client = stack.enter_context(_client(address))
        _wait_until_healthy(process, address, log)
        rows = decode(ask(client, max_completion_tokens=1, **ASKED).choices[0].mm_embedding)
    assert "Embeddings go through the sockets" in engine_log.read_text()
    truth = subject.engine().generate(subject.request(image(101), "server"))[0][0].mm_embedding
    assert truth is not None
    torch.testing.assert_close(rows.float(), truth.float(), rtol=0.1, atol=0.1)
