"""The same in PyTorch, eager, by the official trainer's formulas (L1 distance, r = scale / 2)."""

import torch

from benchmarks.contestants.distill_inputs import BETA0, EPSILON, SCALE, digest, draw_inputs, make_parser
from benchmarks.worker import Done, serve

PACKAGES = ("torch", "numpy")


def norm(gradient: torch.Tensor) -> float:
    """In double precision: PyTorch's float32 sum over tens of millions of squares is off by 0.2%."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).item()


def main() -> None:
    flags = make_parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = draw_inputs(flags)
    (x, *hidden), (w, *kernels) = ([torch.from_numpy(part).to(device) for part in group] for group in drawn)
    x.requires_grad_(), w.requires_grad_()

    def take(index: int) -> Done:
        x.grad = w.grad = None
        student = x @ w
        with torch.no_grad():
            teacher, reverse = (h @ k for h, k in zip(hidden, kernels, strict=True))
            distance = (torch.softmax(teacher, -1) - torch.softmax(reverse, -1)).abs().sum(-1)
            weight = SCALE / 2 * distance + EPSILON
            target = torch.log_softmax(weight[:, None] * (teacher - reverse) + teacher, -1)
        logps = torch.log_softmax(student, -1)
        kl = (logps.exp() * (logps - target)).sum(-1)
        loss = (kl * BETA0 / weight).mean()
        loss.backward()
        values = {"loss": loss.item(), "dhidden": norm(x.grad), "dkernel": norm(w.grad)}
        return Done(values, {"targets": flags.targets}, {})

    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: None
    name = torch.cuda.get_device_name() if device == "cuda" else device
    serve(take, packages=PACKAGES, same={"inputs": digest(drawn)}, device=name, device_peak=peak)


if __name__ == "__main__":
    main()
