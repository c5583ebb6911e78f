"""Ray on this machine: the server as a deployment, texts through Ray Data."""

import json
import urllib.request
from collections.abc import Iterator

import pytest

ray = pytest.importorskip("ray", reason="needs Ray (pip install 'ray[serve,data]')")
serve = pytest.importorskip("ray.serve", reason="needs Ray Serve")

from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.integrations.ray import Generator, deployment
from support.servers import serving

PORT = 18_231
PROMPTS = ["def add(", "import ", "class A:", "for i in"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", object_store_memory=80 << 20)
    yield
    serve.shutdown()
    ray.shutdown()


def test_the_server_as_a_deployment(cluster, tiny_code):
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(deployment("layerskip-tiny-code", threads=1, ray_actor_options={"num_cpus": 1}), route_prefix="/tiny")
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/tiny/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    [expected] = generate(tiny_code, PROMPTS[:1], GenerationConfig(max_new_tokens=8))
    assert answer["choices"][0]["text"] == expected.text
    serve.delete("default")


def test_texts_through_ray_data(cluster, tiny_code):
    data = pytest.importorskip("ray.data", reason="needs Ray Data")
    settings = {"source": "layerskip-tiny-code", "max_new_tokens": 6}
    rows = (
        data.from_items([{"prompt": prompt} for prompt in PROMPTS])
        .map_batches(Generator, fn_constructor_kwargs=settings, batch_size=2, concurrency=1, num_cpus=1)
        .take_all()
    )
    expected = generate(tiny_code, PROMPTS, GenerationConfig(max_new_tokens=6))
    assert {row["prompt"]: row["generated"] for row in rows} == {
        p: g.text for p, g in zip(PROMPTS, expected, strict=True)
    }


def test_ray_datas_http_processor(cluster, tiny_code):
    llm = pytest.importorskip("ray.data.llm", reason="needs Ray Data's LLM part")
    data = pytest.importorskip("ray.data", reason="needs Ray Data")
    with serving(tiny_code) as server:
        config = llm.HttpRequestProcessorConfig(url=server.url + "/v1/completions", batch_size=2, concurrency=1)
        asked = {"max_tokens": 6, "temperature": 0}
        process = llm.build_processor(
            config,
            preprocess=lambda row: {"payload": {"prompt": row["prompt"], **asked}},
            postprocess=lambda row: {"prompt": row["prompt"], "text": row["http_response"]["choices"][0]["text"]},
        )
        rows = process(data.from_items([{"prompt": prompt} for prompt in PROMPTS])).take_all()
    expected = generate(tiny_code, PROMPTS, GenerationConfig(max_new_tokens=6))
    assert {row["prompt"]: row["text"] for row in rows} == {p: g.text for p, g in zip(PROMPTS, expected, strict=True)}
