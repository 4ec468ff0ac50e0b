"""`transformers.generate` on a left-padded batch, in which every prompt stands K times (as it expands them itself)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks import cases
from benchmarks.contestants.prompts import make_step, pad, parse
from benchmarks.worker import serve

PACKAGES = ("transformers", "torch", "numpy")


def main() -> None:
    flags = parse(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(flags.case, dtype=torch.float32, attn_implementation="sdpa").to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    rounds = cases.read_rounds(flags.case)

    def draw(index: int, temperature: float) -> np.ndarray:
        token, real = (torch.from_numpy(x).long().to(device) for x in pad(rounds[index], "left"))
        token, real = (x.repeat_interleave(flags.samples, dim=0) for x in (token, real))
        torch.manual_seed(index)
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            whole = model.generate(token, attention_mask=real, max_new_tokens=flags.new_tokens, **drawing)
        new = whole[:, token.shape[1] :].cpu().numpy()
        return new.reshape(len(rounds[index]), flags.samples, -1)

    same = {"weights": cases.weights_digest(flags.case)}
    serve(make_step(flags, draw), packages=PACKAGES, same=same, device=device)


if __name__ == "__main__":
    main()
