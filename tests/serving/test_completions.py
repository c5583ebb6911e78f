"""The server's answers: those of ``generate`` for that prompt alone, whole or streamed, alone or in company."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.decoding.exits import each_exit

PROMPT = "def fibonacci(n):"


def streamed(url: str, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", url + path, json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def alone(model: Any, prompt: str, **settings: Any) -> Any:
    return generate(model, [prompt], GenerationConfig(**settings))[0]


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_greedy_text_is_that_of_generate(server, strategy):
    expected = alone(server.model, PROMPT, max_new_tokens=24)
    choice = server.text(prompt=PROMPT, max_tokens=24, temperature=0, strategy=strategy, return_token_ids=True)
    assert choice["token_ids"] == expected.token_ids and choice["text"] == expected.text
    assert choice["finish_reason"] == "length"


def test_drafts_are_counted_and_change_nothing(server):
    body = dict(prompt=PROMPT, max_tokens=48, temperature=0, exit_layer=4, num_speculations=4)
    answer = server.post("/v1/completions", **body).json()
    assert answer["timings"]["draft_n_accepted"] > 0
    assert answer["choices"][0]["text"] == alone(server.model, PROMPT, max_new_tokens=48).text


def test_many_clients_at_once_get_what_they_would_get_alone(server):
    bodies = [
        dict(prompt=f"def f{i}(x):", max_tokens=10 + 3 * i, temperature=0.8 * (i % 2), seed=i, exit_layer=3 + i % 3)
        for i in range(12)
    ]

    def ask(i: int) -> str:
        if i % 3:
            return server.text(**bodies[i])["text"]
        return "".join(chunk["choices"][0]["text"] for chunk in streamed(server.url, **bodies[i]))

    with ThreadPoolExecutor(12) as clients:
        texts = list(clients.map(ask, range(12)))
    for body, text in zip(bodies, texts, strict=True):
        settings = {name: body[name] for name in ("temperature", "seed", "exit_layer")}
        assert text == alone(server.model, body["prompt"], max_new_tokens=body["max_tokens"], **settings).text
    assert server.all_pages_free()


def test_a_stream_adds_up_and_ends_with_its_usage(server):
    body = dict(prompt=PROMPT, max_tokens=30, temperature=0.9, seed=3)
    chunks = streamed(server.url, **body, stream_options={"include_usage": True})
    whole = server.post("/v1/completions", **body).json()
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 30
    assert chunks[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_and_samples_stand_in_order(server):
    body = dict(prompt=["def a(", "def b("], n=2, max_tokens=8, temperature=1.0, seed=5)
    choices = server.post("/v1/completions", **body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for prompt, pair in (("def a(", choices[:2]), ("def b(", choices[2:])):
        config = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=5, num_samples=2)
        assert [choice["text"] for choice in pair] == [g.text for g in generate(server.model, [prompt], config)]


def test_a_stop_string_is_never_shown_unless_asked(server):
    free = alone(server.model, PROMPT, max_new_tokens=30).text
    stop = free[20:24]
    body = dict(prompt=PROMPT, max_tokens=30, temperature=0, stop=stop)
    choice = server.text(**body)
    assert choice["text"] == free[: free.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert "".join(c["choices"][0]["text"] for c in streamed(server.url, **body)) == choice["text"]
    assert server.text(**body, include_stop_str_in_output=True)["text"] == choice["text"] + stop


def test_a_stop_token_is_named(server):
    ids = alone(server.model, PROMPT, max_new_tokens=8).token_ids
    choice = server.text(prompt=PROMPT, max_tokens=8, temperature=0, stop_token_ids=[ids[3]])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[3])


def test_log_probabilities_of_prompt_and_text(server):
    ids = server.model.tokenizer.encode(PROMPT)
    choice = server.text(prompt=ids, max_tokens=0, echo=True, logprobs=2)
    scores = choice["logprobs"]
    assert choice["text"] == PROMPT and scores["token_logprobs"][0] is None
    [rows] = each_exit(server.model, ids, exits=[server.model.config.num_layers])
    expected = rows.logits.double().log_softmax(-1)
    for i, token in enumerate(ids[1:]):
        assert scores["token_logprobs"][i + 1] == pytest.approx(float(expected[i, token]), abs=1e-5)
        assert len(scores["top_logprobs"][i + 1]) == 2
    assert [scores["text_offset"][-1] + len(scores["tokens"][-1])] == [len("".join(scores["tokens"]))]


def test_streamed_log_probabilities_are_those_of_the_whole(server):
    body = dict(prompt=PROMPT, max_tokens=9, temperature=0, logprobs=1, echo=True)
    whole = server.text(**body)["logprobs"]
    parts = [c["choices"][0]["logprobs"] for c in streamed(server.url, **body)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts if part for value in part[name]] == whole[name]


def test_chat_through_the_openai_client(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    messages = [{"role": "user", "content": "sort a list"}]
    settings = dict(model="tiny", messages=messages, temperature=0, max_tokens=12)
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    text = server.model.tokenizer.chat_template.render(messages)
    ids = server.model.tokenizer.encode(text, add_special_tokens=False)
    [expected] = generate(server.model, [ids], GenerationConfig(max_new_tokens=12))
    assert answer.choices[0].message.content == expected.text
    assert len(answer.choices[0].logprobs.content) == 12
    assert answer.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text


def test_completions_through_the_openai_client(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    drawn = dict(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0.9, seed=11)
    answer = client.completions.create(**drawn, n=2, logprobs=2)
    config = GenerationConfig(max_new_tokens=20, temperature=0.9, seed=11, num_samples=2, logprobs=2)
    expected = generate(server.model, [PROMPT], config)
    assert [choice.text for choice in answer.choices] == [generation.text for generation in expected]
    assert answer.usage.completion_tokens == 40
    for choice, generation in zip(answer.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == [score.logprob for score in generation.logprobs]
    stop = expected[0].text[8:12]
    stopped = client.completions.create(**drawn, stop=[stop], stream=True, stream_options={"include_usage": True})
    *chunks, usage = list(stopped)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0].text[: expected[0].text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop" and usage.usage.prompt_tokens > 0


def test_a_stream_that_the_openai_client_cancels(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    body = dict(model="tiny", prompt=PROMPT, max_tokens=900, temperature=0, extra_body={"ignore_eos": True})
    with client.completions.create(**body, stream=True) as stream:
        next(iter(stream))
        assert server.engine.num_unfinished == 1
    assert server.all_pages_free()
    assert (
        server.text(prompt=PROMPT, max_tokens=6, temperature=0)["text"]
        == alone(server.model, PROMPT, max_new_tokens=6).text
    )


def test_through_litellm(server):
    litellm = pytest.importorskip("litellm", reason="needs litellm (pip install litellm)")
    settings = dict(api_base=server.url + "/v1", api_key="none", temperature=0, max_tokens=12)
    messages = [{"role": "user", "content": "sort a list"}]
    ids = server.model.tokenizer.encode(server.model.tokenizer.chat_template.render(messages), add_special_tokens=False)
    [expected] = generate(server.model, [ids], GenerationConfig(max_new_tokens=12))
    answer = litellm.completion("openai/tiny", messages, **settings)
    assert answer.choices[0].message.content == expected.text and answer.usage.completion_tokens == 12
    chunks = litellm.completion("openai/tiny", messages, stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt=PROMPT, **settings).choices[0].text
    assert text == alone(server.model, PROMPT, max_new_tokens=12).text
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion("openai/tiny", messages, **{**settings, "temperature": -1})


def test_a_last_message_can_be_continued(server):
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add("}]
    body = dict(messages=messages, continue_final_message=True, temperature=0, max_tokens=6)
    answer = server.post("/v1/chat/completions", **body)
    ids = server.model.tokenizer.encode("# user: add\n# assistant: def add(", add_special_tokens=False)
    expected = generate(server.model, [ids], GenerationConfig(max_new_tokens=6))[0].text
    assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.fixture
def computed(server, monkeypatch):
    """Empties itself on a call, and gives the number of prompt tokens that went through the model since the last."""
    rows: list[int] = []
    plan = server.engine._scheduler.plan

    def counted():
        made = plan()
        rows.append(sum(work.rows for work in made if not work.decodes))
        return made

    def count():
        found = sum(rows)
        rows.clear()
        return found

    monkeypatch.setattr(server.engine._scheduler, "plan", counted)
    return count


def test_a_second_turn_computes_what_is_new(server, computed):
    """After 1,000 tokens of history: a fifth of the work at most, and so of the time to the first token."""
    words = server.model.tokenizer.encode("# a history of words, " * 400)
    answer = server.text(prompt=words[:1000], max_tokens=8, temperature=0, return_token_ids=True)
    assert computed() == 1000
    turn = [*words[:1000], *answer["token_ids"], *words[1000:1012]]
    for salt, most in ((None, 200), ("me", len(turn))):  # another salt finds nothing
        body = dict(prompt=turn, max_tokens=4, temperature=0, cache_salt=salt)
        used = server.post("/v1/completions", **body).json()["usage"]
        count = computed()
        assert count == len(turn) - used["prompt_tokens_details"]["cached_tokens"] <= most
    assert count == len(turn)


def test_a_conversations_second_turn_computes_what_is_new(server, computed):
    def said(messages):
        body = dict(messages=messages, max_tokens=8, temperature=0)
        return server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]

    messages = [{"role": "user", "content": "a long story of many words " * 80}]
    answer = said(messages)
    first = computed()
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and then?"}]
    again = said(messages)
    assert first > 500 and computed() <= 0.2 * first
    ids = server.model.tokenizer.encode(server.model.tokenizer.chat_template.render(messages), add_special_tokens=False)
    assert again == generate(server.model, [ids], GenerationConfig(max_new_tokens=8))[0].text


def test_parts_of_text_are_one_text(server):
    def said(content):
        body = dict(messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0)
        return server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]

    assert said([{"type": "text", "text": "sort"}, {"type": "text", "text": "a list"}]) == said("sort\na list") != ""


def test_tokens_there_and_back(server):
    ids = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert ids == server.model.tokenizer.encode(PROMPT)
    assert server.post("/detokenize", tokens=ids).json() == {"prompt": PROMPT}
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "x"}]).json()["tokens"]
    assert server.model.tokenizer.decode(chat) == "# user: x\n# assistant:"


def test_what_each_layer_would_say(server):
    ids = server.model.tokenizer.encode(PROMPT)
    layers = server.post("/lens", tokens=ids).json()["layers"]
    assert [layer["layer"] for layer in layers] == list(range(1, server.model.config.num_layers + 1))
    assert layers[-1]["id"] == alone(server.model, PROMPT, max_new_tokens=1).token_ids[0]
