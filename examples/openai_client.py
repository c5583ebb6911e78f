"""Stream an answer from a running server, and say how many drafts were accepted.

layerskip serve --model smollm2-135m-parse
python examples/openai_client.py http://127.0.0.1:8000 "wake me up at 7 am tomorrow =>"
"""

import sys

import openai


def main(url: str, prompt: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    settings = {"exit_layer": 4, "num_speculations": 4}  # fields of this server, beside the API's own
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=48, temperature=0, stream=True, extra_body=settings
    )
    timings: dict[str, float] = {}
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
        timings = (chunk.model_extra or {}).get("timings") or timings
    print(f"\n{timings.get('draft_n_accepted', 0)} of {timings.get('draft_n', 0)} drafts accepted")


if __name__ == "__main__":
    main(*sys.argv[1:])
