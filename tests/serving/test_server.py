"""The server's manners: errors with the field's name, keys, limits, clients that leave, metrics, an orderly end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

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
        ({"prompt": "\ud800"}, None, "surrogate"),
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
    ],
)
def test_a_bad_conversation_is_refused(server, body, said):
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400 and said in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'"x"', b'{"prompt": NaN}'])
def test_what_is_no_request_is_refused(server, content):
    response = httpx.post(server.url + "/v1/completions", content=content)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_unknown_routes_and_methods_answer_in_the_same_form(server):
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(server.url + "/v1/completions").status_code == 405


def test_the_page_and_the_small_routes(server):
    page = httpx.get(server.url + "/")
    assert page.status_code == 200 and "<title>layerskip</title>" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # it needs no network
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(server.url + "/version").json()["version"]


def test_metrics_count_what_happened(server):
    def value(name: str) -> float:
        text = httpx.get(server.url + "/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(f"layerskip:{name} ")).split()[1])

    before = value("generation_tokens_total")
    server.text(prompt=PROMPT, max_tokens=7, temperature=0, exit_layer=4, num_speculations=4)
    assert value("generation_tokens_total") == before + 7
    assert value("spec_decode_num_accepted_tokens_total") <= value("spec_decode_num_draft_tokens_total")
    assert value("num_requests_running") == 0 == value("kv_cache_usage_perc")


def test_a_key_is_asked_for(tiny_code):
    with serving(tiny_code, api_key="s3cret") as server:
        body = dict(prompt=PROMPT, max_tokens=2)
        assert server.post("/v1/completions", **body).json()["error"]["code"] == "invalid_api_key"
        for key, status in (("wrong", 401), ("s3cret", 200), ("s3cr\u00e9t", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.post(server.url + "/v1/completions", json=body, headers=headers).status_code == status
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 401


def test_a_full_queue_says_come_again(tiny_code):
    with serving(tiny_code, max_queue=2) as server:
        response = server.post("/v1/completions", prompt=["a", "b", "c"], max_tokens=2)
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert server.post("/v1/completions", prompt=["a", "b"], max_tokens=2).status_code == 200


def test_a_body_that_is_too_large_is_refused(tiny_code):
    with serving(tiny_code, max_body=1000) as server:
        assert server.post("/v1/completions", prompt="x" * 2000).status_code == 413


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


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_lets_streams_end_properly():
    command = [sys.executable, "-m", "layerskip_kernels.cli", "serve", "--model", "layerskip-tiny-code", "--port", "0"]
    process = subprocess.Popen([*command, "--threads", "1", "--drain", "0.3"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split(" ")[0]
        body = {**ENDLESS, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "abort"' in rest[-2] or '"finish_reason": "length"' in rest[-2]
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
