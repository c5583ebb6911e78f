"""The server's manners: errors with the field's name, keys, limits, clients that leave, metrics, an orderly end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.serving import bodies, http_server
from layerskip_kernels.serving.worker import EngineWorker
from support.servers import serving

PROMPT = "def fibonacci(n):"
HELLO = [{"role": "user", "content": "x"}]
ENDLESS = dict(prompt=PROMPT, max_tokens=1000, ignore_eos=True, temperature=0, strategy="autoregressive")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [10**6]}, "prompt", "token ids in 0.."),
        ({"prompt": [1, "a"]}, "prompt", "valid"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater"),
        ({"prompt": "x", "max_tokens": "7"}, "max_tokens", "valid integer"),
        ({"prompt": "x", "temperature": -1}, "temperature", "temperature must be"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "valid"),
        ({"prompt": "x", "top_p": 2}, "top_p", "top_p"),
        ({"prompt": "x", "n": 0}, "n", "greater"),
        ({"prompt": "x", "n": 10**9}, "n", "less"),
        ({"prompt": "x", "exit_layer": 99}, "exit_layer", "exit_layer"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias", "logit_bias"),
        ({"prompt": "x", "stop": ["a"] * 99}, "stop", "stop"),
        ({"prompt": "x", "bogus": 1}, "bogus", "not a field"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"prompt": "word " * 3000}, "prompt", "positions"),
        ({"prompt": "x", "model": "other"}, "model", "not served"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": [1.5]}, "prompt", "a valid string or a valid integer"),
        ({"prompt": "x", "a" * 10**5: 1}, "a" * 100, "a is not a field"),
        ({"prompt": "x", "n": 2, "stop": "must", "temperature": -1}, "temperature", "temperature must be"),
        ({"prompt": "x", "max_tokens": 10**400}, "max_tokens", "at most"),
        ({"prompt": "x", "min_tokens": -1}, "min_tokens", "min_tokens must be at least 0"),
        ({"prompt": "x", "temperature": 10**400}, "temperature", "more than 40 digits"),
        ({"prompt": "x", "logit_bias": {"5": 10**400}}, "logit_bias", "more than 40 digits"),
        ({"prompt": [10**400]}, "prompt", "more than 40 digits"),
        ({"prompt": "x", "temperature": float("nan")}, None, "NaN is no JSON number"),
        ({"prompt": "x", "top_p": float("inf")}, None, "Infinity is no JSON number"),
        ({"prompt": "x", "logit_bias": {"a" * 10**6: "b"}}, "logit_bias", "valid"),
        ({"prompt": ["x"] * 100, "n": 100}, "n", "at most"),
    ],
)
def test_a_bad_request_is_told_its_field(server, body, param, said):
    response = httpx.post(server.url + "/v1/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param and said in error["message"] and len(error["message"]) < 600
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user"}]}, "content of text"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools is not supported"),
        (
            {"messages": HELLO, "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": HELLO, "top_logprobs": 3}, "needs logprobs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content of text"),
        ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not hold messages"),
        ({"messages": HELLO, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs must not hold self"),
    ],
)
def test_a_bad_conversation_is_refused(server, body, said):
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400 and said in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"), (b"[]", "must be a JSON object"), (b"null", "must be a JSON object"),
        (b'{"prompt": NaN}', "NaN is no JSON number"), (b'{"seed": %s}' % (b"9" * 5000), "4300 digits"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(server, content, said):
    response = httpx.post(server.url + "/v1/completions", content=content)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] is None
    assert said in error["message"] and "sys." not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "bogus": 1}, 400, "bogus"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/lens", {"tokens": []}, 400, "tokens"),
        ("/lens", {"tokens": [1] * 5000}, 400, "tokens"),
    ],
)
def test_the_small_routes_name_the_field_too(server, path, body, status, param):
    response = httpx.post(server.url + path, content=json.dumps(body))
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_what_the_api_lets_be_null_is_as_if_left_out(server):
    body = dict(prompt=PROMPT, max_tokens=3, temperature=0)
    nulls = dict.fromkeys(
        ("n", "echo", "stop", "stream", "seed", "logprobs", "logit_bias", "top_p", "suffix", "best_of")
    )
    assert server.text(**body, **nulls) == server.text(**body)


def test_any_text_is_a_salt(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "cache_salt": "\ud800"}
    assert httpx.post(server.url + "/v1/completions", content=json.dumps(body)).status_code == 200


def test_unknown_routes_and_methods_answer_in_the_same_form(server):
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    wrong = httpx.get(server.url + "/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["error"]["message"]


def test_the_page_and_the_small_routes(server):
    page = httpx.get(server.url + "/")
    assert page.status_code == 200 and "<title>layerskip</title>" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # it needs no network
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(server.url + "/version").json()["version"]


DASHBOARDS = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
    "prompt_tokens", "generation_tokens", "num_preemptions", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_success", "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
}  # fmt: skip


def metrics(url: str) -> dict[str, float]:
    families = list(text_string_to_metric_families(httpx.get(url + "/metrics").text))
    assert {family.name.removeprefix("layerskip:") for family in families} >= DASHBOARDS
    return {sample.name.removeprefix("layerskip:"): sample.value for f in families for sample in f.samples}


def test_metrics_count_what_happened(server):
    before = metrics(server.url)
    server.text(prompt=PROMPT, max_tokens=7, temperature=0, exit_layer=4, num_speculations=4)
    after = metrics(server.url)
    assert after["generation_tokens_total"] == before["generation_tokens_total"] + 7
    assert after["time_to_first_token_seconds_count"] == before["time_to_first_token_seconds_count"] + 1
    assert after["spec_decode_num_accepted_tokens_total"] <= after["spec_decode_num_draft_tokens_total"]
    assert after["num_requests_running"] == 0 == after["kv_cache_usage_perc"]


def test_no_request_waits_for_ever_in_the_metrics(server, monkeypatch):
    """However late the event loop comes back to who asked: what has ended by then is neither running nor waiting."""
    submit = EngineWorker.submit

    async def late(*args: Any) -> Any:
        submissions = await submit(*args)
        await asyncio.sleep(0.3)
        return submissions

    monkeypatch.setattr(EngineWorker, "submit", late)
    before = metrics(server.url)
    assert server.text(prompt=PROMPT, max_tokens=1, temperature=0)["text"]
    after = metrics(server.url)
    assert after["num_requests_waiting"] == 0 == after["num_requests_running"]
    assert after["e2e_request_latency_seconds_count"] == before["e2e_request_latency_seconds_count"] + 1


def test_a_key_is_asked_for(tiny_code):
    with serving(tiny_code, api_key="s3cret") as server:
        body = dict(prompt=PROMPT, max_tokens=2)
        assert server.post("/v1/completions", **body).json()["error"]["code"] == "invalid_api_key"
        for key, status in (("wrong", 401), ("s3cret", 200), ("s3cr\u00e9t", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.post(server.url + "/v1/completions", json=body, headers=headers).status_code == status
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 401


def test_a_full_queue_says_come_again(tiny_code, monkeypatch):
    with serving(tiny_code, max_queue=2) as server, ThreadPoolExecutor(1) as client:
        gate, step = threading.Event(), server.engine.step
        monkeypatch.setattr(server.engine, "step", lambda: (gate.wait(60), step())[1])
        running = client.submit(server.post, "/v1/completions", prompt="a", max_tokens=2)
        while not server.engine.num_unfinished:
            time.sleep(0.005)
        response = server.post("/v1/completions", prompt=["a", "b"], max_tokens=2)
        gate.set()
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert running.result().status_code == 200
        assert server.post("/v1/completions", prompt=["a", "b"], max_tokens=2).status_code == 200
        assert server.post("/v1/completions", prompt=["a", "b", "c"], max_tokens=2).status_code == 400  # never


def test_a_body_that_is_too_large_is_refused(tiny_code):
    with serving(tiny_code, max_body=1000) as server:
        assert server.post("/v1/completions", prompt="x" * 2000).status_code == 413


def test_a_body_that_comes_too_slowly_is_refused(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"prompt": ')
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert server.text(prompt=PROMPT, max_tokens=3)["text"]


@pytest.mark.parametrize("first", [b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(server, monkeypatch, first):
    """Nor one after an answer, on a connection that was kept."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as client:
        client.sendall(first)
        if first.endswith(b"\r\n\r\n"):
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            client.sendall(b"GET /heal")
        assert client.recv(1000) == b""
    assert server.text(prompt=PROMPT, max_tokens=3)["text"]


def test_a_request_that_takes_too_long_ends(tiny_code):
    with serving(tiny_code, timeout=0.2) as server:
        response = server.post("/v1/completions", **ENDLESS)
        assert response.status_code == 504
        assert server.all_pages_free()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server, stream):
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"prompt": "def f(", "max_tokens": 900, "ignore_eos": true, "temperature": 0, "stream": %s}'
    body = body % str(stream).lower().encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while not server.engine.num_unfinished:
            time.sleep(0.005)
    assert server.all_pages_free()
    assert server.text(prompt=PROMPT, max_tokens=3)["text"]


def test_an_error_of_one_request_is_not_the_others(server):
    ended = server.post("/v1/completions", prompt=PROMPT, max_tokens=900, num_speculations=1, memory=1)
    assert ended.status_code == 400
    assert server.text(prompt=PROMPT, max_tokens=3)["text"]


SECRET = "zebrafinch"
REQUESTS = [  # right ones and wrong ones, each with the secret in it
    {"prompt": f"def {SECRET}(", "max_tokens": 3},
    {"prompt": f"def {SECRET}(", "max_tokens": 3, "stream": True},
    {"prompt": SECRET * 9000},
    {"prompt": [SECRET]},
    {"prompt": f"\ud800{SECRET}"},
    {"prompt": "x", "logit_bias": {SECRET: 1}},
    {"prompt": "x", "stop": [SECRET] * 99},
    {"prompt": "x", SECRET: 1},
    {"prompt": "x", "model": SECRET},
    {"prompt": f"def {SECRET}(", "logit_bias": {str(i): float("-inf") for i in range(4096)}},
]


def arrived(url: str) -> float:
    """How many requests the engine has had."""
    counted = ("num_requests_running", "num_requests_waiting", "e2e_request_latency_seconds_count")
    return sum(metrics(url)[name] for name in counted)


def who_reads_nothing(url: str) -> socket.socket:
    """A client that asks for more than fits on the way to it."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "stream": True, "logprobs": 20}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((host, int(port)))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return client


def test_a_server_with_streams_ends_in_order_and_has_logged_nothing(tiny_code):
    """SIGTERM in the middle of eight streams and an answer in one piece: each ends, or is cut off properly."""
    command = [sys.executable, "-m", "layerskip_kernels.cli", "serve", "--model", "layerskip-tiny-code", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--drain", "0.5", "--max-batch", "9"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split(" ")[0]
        for body in REQUESTS:
            httpx.post(url + "/v1/completions", content=json.dumps(body), timeout=30)
        before, started = arrived(url), threading.Barrier(10, timeout=60)

        def stream(number: int) -> tuple[str, str]:
            body = {**ENDLESS, "max_tokens": (40, 1000)[number % 2], "stream": True}
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                got = [next(lines)]
                started.wait()
                got += [line for line in lines if line]
            assert got[-1] == "data: [DONE]"
            choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in got[:-1]]
            return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]

        def whole() -> tuple[str, str]:
            started.wait()
            choice = httpx.post(url + "/v1/completions", json=ENDLESS, timeout=60).json()["choices"][0]
            return choice["text"], choice["finish_reason"]

        with ThreadPoolExecutor(9) as clients:
            answers = [clients.submit(stream, number) for number in range(8)] + [clients.submit(whole)]
            started.wait()
            silent = who_reads_nothing(url)
            while arrived(url) < before + 10:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            ends = [answer.result() for answer in answers]
        [free] = generate(
            tiny_code, [PROMPT], GenerationConfig("autoregressive", max_new_tokens=1000, eos_token_ids=())
        )
        assert all(free.text.startswith(text.rstrip("\ufffd")) for text, _ in ends)
        assert {reason for _, reason in ends} <= {"length", "abort"} and "abort" in {reason for _, reason in ends}
        assert process.wait(timeout=30) == 0
        silent.close()
        logged = process.stdout.read()
        assert SECRET not in logged and "Traceback" not in logged and PROMPT not in logged
    finally:
        process.kill()
