"""Few distinct shapes, because oneDNN compiles a kernel for each."""

import torch
from torch import Tensor


def pad_rows(x: Tensor) -> Tensor:
    """`x` with rows of zeros behind it, up to one of few numbers of rows.

    oneDNN compiles a kernel for each shape that it meets: about 0.5 ms and 0.7 MB each, four
    shapes a layer (bench/linears.py).
    """
    num_rows = len(x)
    missing = -num_rows % (8 if num_rows <= 64 else 16)
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
