"""The peak of the machine: how fast its best library multiplies matrices; a worker for speed.py.

On a CPU PyTorch has two libraries for float32, MKL and oneDNN, and on some machines one is the
faster, on some the other. oneDNN is reached by the precision "medium", which allows it bfloat16;
ONEDNN_MAX_CPU_ISA=AVX512_CORE, set by speed.py before torch is imported, takes that away again, and
what is not float32 all the same does not count. On a GPU the scripts' precision is "high", TF32.
"""

from collections.abc import Callable
from typing import Literal

import torch
import tyro
from turns import rate, serve

SIZES = {"cpu": 2048, "cuda": 8192}
LIBRARIES = {
    "cpu": {"MKL": "highest", "oneDNN": "medium"},
    "cuda": {"float32": "highest", "TF32": "high"},
}


def is_float32(product: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a product of noise has float32's errors; bfloat16's are 10,000 times as large."""
    return bool((product - exact).std() < 1e-5 * exact.std())


def matrix_product(device: str, size: int) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A function whose speed is measured, and what it has to come to, in float64."""
    left, right = torch.randn(2, size, size, device=device)
    return (lambda: left @ right), left.double() @ right.double()


def main(device: Literal["cpu", "cuda"], size: int | None = None) -> None:
    """Answer with operations per second of a product of square matrices."""
    size = size or SIZES[device]
    product, exact = matrix_product(device, size)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    is_good = {}

    def answer(library: str, seconds: float) -> dict:
        torch.set_float32_matmul_precision(LIBRARIES[device][library])
        if library not in is_good:
            is_good[library] = library == "TF32" or is_float32(product(), exact)
        if not is_good[library]:
            return {"rate": 0.0}
        return {"rate": 2 * size**3 * rate(product, seconds, wait)}

    serve(answer)


if __name__ == "__main__":
    tyro.cli(main)
