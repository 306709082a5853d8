"""Initial values of LoRA's factors that are computed from the weight they stand beside."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from peftcli.errors import UsageError
from peftcli.methods.base import Context
from peftcli.methods.lora_layers import LoraLayer, ShiftedLoraLayer, weight_of
from peftcli.quantization import is_quantized

_ITERATIONS = re.compile(r"pissa_niter_(\d+)")


def set_start(layer: LoraLayer, kind: str, name: str, ctx: Context, generator: torch.Generator) -> None:
    """Give a fresh layer its initial values.

    Args:
        kind: ``default`` (as the layer was made), ``gaussian``, ``orthogonal``, ``pissa``, ``pissa_niter_N``, ``olora`` or ``loftq``.
        name: of the module, for messages.
    """
    if kind == "gaussian":
        layer.lora_A.data.normal_(std=1.0 / layer.rank, generator=generator)
    elif kind == "orthogonal":
        if layer.rank % 2:
            raise UsageError(f"method.rank: orthogonal takes even ranks, and {name} has {layer.rank}")
        layer.lora_A.data, layer.lora_B.data = orthogonal(layer.rank, layer.lora_A.shape[1], len(layer.lora_B), generator)
    elif kind == "loftq":
        if is_quantized(layer.base) and not ctx.from_file:
            narrow, wide = loftq(ctx.dense_weights[name], weight_of(layer.base), layer.rank, layer.scaling)
            layer.lora_A.data[: len(narrow)], layer.lora_B.data[:, : len(narrow)] = narrow, wide
    elif isinstance(layer, ShiftedLoraLayer):
        weight = weight_of(layer.base).float()
        if layer.rank > min(weight.shape):
            raise UsageError(f"method.rank: {kind} takes at most {min(weight.shape)} for {name}, whose weight is {tuple(weight.shape)}")
        narrow, wide = olora(weight, layer.rank) if kind == "olora" else pissa(weight, layer.rank, layer.scaling, kind, generator)
        layer.begin(narrow.contiguous(), wide.contiguous())


def pissa(weight: Tensor, rank: int, scaling: float, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """PiSSA (https://arxiv.org/abs/2404.02948): the principal singular directions of ``weight`` [out, in].

    Args:
        kind: ``pissa`` for the exact decomposition, ``pissa_niter_N`` for N subspace iterations: seconds instead of minutes
            for large models.

    Returns:
        A [rank, in] and B [out, rank] with ``scaling * B A`` the best approximation of ``weight`` of this rank.
    """
    found = _ITERATIONS.fullmatch(kind)
    if found:
        left, values, right = thin_svd(weight, rank + 8, int(found[1]), generator)
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def thin_svd(matrix: Tensor, directions: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular directions of ``matrix`` [m, n], by subspace iteration (Halko et al., https://arxiv.org/abs/0909.4061).

    Args:
        directions: how many are sought; a few more than are needed, for the last ones come out worst.

    Returns:
        Left vectors [m, directions], singular values, and right vectors [directions, n].
    """
    start = torch.randn(matrix.shape[1], min(directions, *matrix.shape), generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, values, right


def orthogonal(rank: int, width_in: int, width_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors away from zero whose product is zero (https://datta0.github.io/posts/rethink-lora-init).

    Returns:
        A [rank, width_in] and B [width_out, rank], made from different rows of one orthogonal matrix.
    """
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    narrow = torch.randn(width_in, rank // 2, generator=generator) @ mix[0::2]
    wide = torch.randn(width_out, rank // 2, generator=generator) @ mix[1::2]
    return narrow.t().contiguous() / 10.0, wide / 10.0


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA (https://arxiv.org/abs/2406.01775): the first rows and columns of the QR decomposition of ``weight`` [out, in].

    Returns:
        A [rank, in], upper triangular, and B [out, rank], orthonormal.
    """
    basis, triangle = torch.linalg.qr(weight)
    return triangle[:rank], basis[:, :rank]


def loftq(dense: Tensor, quantized: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """LoftQ (https://arxiv.org/abs/2310.08659) in one step, over a base that stays as it was quantized: the adapter starts as
    what the quantization lost.

    Args:
        dense: the weight [out, in] before, ``quantized``: the weight that the layer computes with.

    Returns:
        A [rank, in] and B [out, rank] with ``scaling * B A`` the best approximation of ``dense - quantized`` of this rank.
    """
    return pissa(dense.to(quantized.device, torch.float32) - quantized, rank, scaling, "pissa", torch.Generator())
