"""The same heads in PyTorch.

--side=full     full logits in float32, eager
--side=trl      TRL's chunked log-probabilities, nothing asked for beside them
--side=liger    Liger's fused linear cross entropy, and its fused linear Jensen-Shannon divergence: on a GPU only
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.contestants.head_inputs import draw, parse
from benchmarks.worker import Done, serve

PACKAGES = {"full": ("torch", "numpy"), "trl": ("trl", "torch", "numpy"), "liger": ("liger-kernel", "torch", "numpy")}


def full_logps(x, w, frozen, token):
    return F.cross_entropy(F.linear(x, w).float(), token)


def full_divergence(x, w, frozen, token):
    student = torch.log_softmax(F.linear(x, w).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax(F.linear(*frozen).float(), -1)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    parts = (logp.exp() * (logp - middle) for logp in (student, teacher))
    return sum(part.sum(-1).mean() for part in parts) / 2


def trl_logps(x, w, frozen, token):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return -ChunkedLogProbFunction.apply(x, w, None, token, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0].mean()


def liger_logps(x, w, frozen, token):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, x, token)


def liger_divergence(x, w, frozen, token):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)(x, w, *frozen)


SIDES = {
    ("logps", "full"): full_logps,
    ("logps", "trl"): trl_logps,
    ("logps", "liger"): liger_logps,
    ("divergence", "full"): full_divergence,
    ("divergence", "liger"): liger_divergence,
}


def main() -> None:
    flags = parse(__doc__, ("full", "trl", "liger"))
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, flags.dtype)
    drawn, token, digest = draw(flags)
    (x, *hidden) = (torch.from_numpy(array).to(device, dtype) for array in drawn.hidden)
    (w, *kernels) = (torch.from_numpy(array).to(device, dtype).T.contiguous() for array in drawn.kernels)  # [V, D]
    del drawn
    frozen, token = (*hidden, *kernels), torch.from_numpy(token).long().to(device)
    x.requires_grad_(), w.requires_grad_()
    loss_of = SIDES[flags.what, flags.side]

    def take(index: int) -> Done:
        x.grad = w.grad = None
        loss = loss_of(x, w, frozen, token)
        loss.backward()
        norms = {
            name: torch.linalg.vector_norm(leaf.grad, dtype=torch.float64).item()
            for name, leaf in (("dhidden", x), ("dkernel", w))
        }
        return Done({"loss": loss.item()} | norms, {"targets": flags.targets}, {})

    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: None
    name = torch.cuda.get_device_name() if device == "cuda" else device
    serve(take, packages=PACKAGES[flags.side], same={"inputs": digest}, device=name, device_peak=peak)


if __name__ == "__main__":
    main()
