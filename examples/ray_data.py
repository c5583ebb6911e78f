"""Continue the prompts of a JSON-lines file on all cores of a Ray cluster (pip install "ray[data]").

    python examples/ray_data.py prompts.jsonl generated 2

Each line has a "prompt"; the folder gets the lines with "generated" added. On several machines: `ray start --head` on
one, `ray start --address=HEAD:6379` on the others, and this program on any of them.
"""

import sys

import ray

from layerskip_kernels.integrations.ray import Generator


def main(source: str, folder: str, actors: int) -> None:
    settings = {"source": "layerskip-tiny-code", "max_new_tokens": 32}
    texts = ray.data.read_json(source, lines=True)
    done = texts.map_batches(Generator, fn_constructor_kwargs=settings, batch_size=32, concurrency=actors, num_cpus=1)
    done.write_json(folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
