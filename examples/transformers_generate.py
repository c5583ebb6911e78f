"""A model of Transformers, generating on these kernels: its own code, its own weights, drafts of its first layers.

python examples/transformers_generate.py [FOLDER [EXIT_LAYER]]
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_kernels.integrations.transformers import custom_generate


def main(folder: str, exit_layer: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    ours = model.generate(
        **inputs, max_new_tokens=32, do_sample=False, custom_generate=custom_generate, exit_layer=exit_layer
    )
    print(tokenizer.decode(ours[0]))
    print("the same tokens as Transformers'" if torch.equal(ours, plain) else "other tokens than Transformers'")


if __name__ == "__main__":
    shipped = str(files("layerskip_kernels") / "checkpoints" / "layerskip-tiny-code")
    main(sys.argv[1] if len(sys.argv) > 1 else shipped, int(sys.argv[2]) if len(sys.argv) > 2 else 4)
