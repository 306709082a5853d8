"""Variable-length attention: its plain reference, what the kernel is called with, and on a GPU the kernel itself."""

from __future__ import annotations

from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.kernels import fast, varlen
from peftcli.kernels.attention import packed_attention, reference_attention
from peftcli.kernels.documents import Documents

NAME = "variable-length attention"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def draw(lengths: list[int], heads: tuple[int, int], seed: int, width: int = 4, **place: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, sum(lengths), width) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(**place).requires_grad_() for shape in shapes]


def outputs_and_gradients(function: Any, qkv: list[Tensor], documents: Documents, causal: bool) -> list[Tensor]:
    out = function(*qkv, documents, scaling=0.37, causal=causal)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)]


def in_place_of_the_kernel(shares: bool) -> Any:
    """Let the plain reference stand where torch's kernel would, for any tensor."""
    return mock.patch.multiple(varlen, serves=lambda *_: True, kernel=lambda: (varlen.reference_varlen, shares))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    shares=st.booleans(),
    seed=st.integers(0, 100),
)
def test_called_with_what_gives_attention_within_each_document(
    lengths: list[int], heads: tuple[int, int], causal: bool, shares: bool, seed: int
) -> None:
    documents, qkv = Documents(lengths), draw(lengths, heads, seed)
    fast.switch(on=True)
    with in_place_of_the_kernel(shares):
        ours = outputs_and_gradients(packed_attention, qkv, documents, causal)
    assert NAME in fast.taken()
    theirs = outputs_and_gradients(reference_attention, qkv, documents, causal)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-10


def test_the_metadata_is_made_once_for_all_layers_and_no_rectangle_is_laid_out() -> None:
    documents, qkv = Documents([3, 1, 4]), draw([3, 1, 4], (4, 2), 0)
    assert documents.starts.tolist() == [0, 3, 4, 8]
    assert (documents.starts.dtype, documents.longest) == (torch.int32, 4)
    with in_place_of_the_kernel(True), mock.patch.object(varlen, "attend", wraps=varlen.attend) as called:
        for _ in range(2):
            packed_attention(*qkv, documents, scaling=1.0)
    assert called.call_args_list[0].args[3] is called.call_args_list[1].args[3]
    assert "_laid" not in vars(documents)


def test_where_it_is_not_taken() -> None:
    documents, qkv = Documents([3, 5]), draw([3, 5], (4, 2), 0)
    own = tuple(torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    reference = reference_attention(*qkv, documents, scaling=1.0, prefix=own)  # type: ignore[arg-type]
    with in_place_of_the_kernel(True), mock.patch.object(varlen, "attend", side_effect=AssertionError("taken")):
        out = packed_attention(*qkv, documents, scaling=1.0, prefix=own)  # type: ignore[arg-type]
        assert float((out - reference).detach().abs().max()) <= 1e-10
        packed_attention(*qkv, documents, scaling=1.0, dropout=0.5)
        with fast.plain():
            packed_attention(*qkv, documents, scaling=1.0)
    assert not varlen.serves(qkv[0], qkv[2], torch.bfloat16), "not on the CPU"


def test_torch_has_a_kernel_with_the_arguments_that_it_gets() -> None:
    found = varlen.kernel()
    assert found is not None
    function, shares = found
    q, k = torch.zeros(4, 2, 8, dtype=torch.bfloat16), torch.zeros(4, 1 if shares else 2, 8, dtype=torch.bfloat16)
    # It has no CPU implementation, and says so only after it has looked at its arguments.
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        function(
            q,
            k,
            k,
            Documents([4]).starts,
            Documents([4]).starts,
            4,
            4,
            scale=1.0,
            window_size=(-1, 0),
            **({"enable_gqa": True} if shares else {}),
        )


def test_a_whole_model_gives_the_same_loss_and_gradients() -> None:
    split, found = helpers.make_split([6, 11, 9]), []
    for taken in (True, False):
        model, _ = helpers.adapted("lora", dtype=torch.float64)
        helpers.stir(model)
        with mock.patch.multiple(varlen, serves=lambda *_: taken, kernel=lambda: (varlen.reference_varlen, True)):  # noqa: B023 - called here
            fast.switch(on=True)
            loss = helpers.loss_of(model, split)
            loss.backward()
        assert (NAME in fast.taken()) is taken
        found.append((float(loss.detach()), helpers.gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for key, gradient in found[0][1].items():
        assert float((gradient - found[1][1][key]).abs().max()) <= 1e-10, key


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_the_kernel_on_a_gpu_is_as_close_to_the_exact_values_as_plain_attention(heads: tuple[int, int], causal: bool) -> None:
    lengths = [1, 700, 64, 129, 512]
    qkv = draw(lengths, heads, 0, 64, device="cuda", dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    documents = Documents(lengths, "cuda")
    fast.switch(on=True)
    ours = outputs_and_gradients(packed_attention, qkv, documents, causal)
    again = outputs_and_gradients(packed_attention, qkv, documents, causal)
    assert NAME in fast.taken()
    with fast.plain():
        plain = outputs_and_gradients(packed_attention, qkv, documents, causal)
    for a, b, c in zip(ours, plain, outputs_and_gradients(reference_attention, exact, documents, causal), strict=True):
        assert float((a.double() - c).abs().mean()) <= 1.5 * float((b.double() - c).abs().mean()) + 1e-6
    assert torch.equal(ours[0], again[0])
