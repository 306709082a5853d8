"""Attention in one compiled function: equal to its plain reference, outputs and gradients, and no document sees another."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.kernels import attention, fast, native
from peftcli.kernels.attention import packed_attention, reference_attention
from peftcli.kernels.documents import Documents, Padded
from peftcli.kernels.products import products_attention
from peftcli.kernels.streamed import serves, streamed_attention

NAME = "attention in one compiled function"
pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(not native.has("attention", torch.bfloat16), reason="no compiler, or no bfloat16 products on this machine"),
]


def drawn(total: int, heads: int, groups: int, width: int, prefix: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, n, width) for n in (heads, groups, groups)] + [(groups, prefix, width)] * (2 if prefix else 0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def ours_and_exact(parts: list[Tensor], documents: Documents, causal: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the compiled function, and of the reference in float64 over the same numbers."""
    width = parts[0].shape[2]
    given_ = [x.clone().requires_grad_() for x in parts]
    out = streamed_attention(
        given_[0], given_[1], given_[2], documents, scaling=width**-0.5, causal=causal, prefix=tuple(given_[3:]) or None
    )
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = [out.detach(), *torch.autograd.grad(out, given_, weight)]
    wide = [x.double().requires_grad_() for x in parts]
    q, k, v = (x.transpose(0, 1)[None] for x in wide[:3])
    exact = reference_attention(q, k, v, documents, scaling=width**-0.5, causal=causal, prefix=tuple(wide[3:]) or None)[0]
    return ours, [exact.detach(), *torch.autograd.grad(exact, wide, weight.double())]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1), (9, 3), (64, 1)]),
    width=st.sampled_from([32, 64, 96, 128]),
    shared=st.sampled_from([0, 1, 30]),
    prefix=st.sampled_from([0, 1, 7]),
    causal=st.booleans(),
)
@example(lengths=[127, 128, 129], heads=(4, 2), width=32, shared=0, prefix=0, causal=True)
@example(lengths=[300, 511, 512, 513], heads=(3, 1), width=64, shared=5, prefix=0, causal=True)
@example(lengths=[700, 1], heads=(2, 1), width=32, shared=0, prefix=3, causal=False)
@example(lengths=[1100], heads=(2, 2), width=64, shared=0, prefix=0, causal=True)
def test_equals_the_reference(lengths: list[int], heads: tuple[int, int], width: int, shared: int, prefix: int, causal: bool) -> None:
    documents = Documents(lengths, shared=shared)
    ours, exact = ours_and_exact(drawn(documents.total, *heads, width, prefix), documents, causal)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.shape == theirs.shape
        # bfloat16 has eight bits; what is the same in every row of a softmax over one key is exactly zero.
        assert float((mine.double() - theirs).norm()) <= 0.006 * float(theirs.norm()) + 1e-3


def test_it_is_nearer_to_the_reference_than_the_products() -> None:
    documents = Documents([200, 60, 131], shared=24)
    parts = drawn(documents.total, 9, 3, 64)
    ours, exact = ours_and_exact(parts, documents, causal=True)
    products = products_attention(parts[0], parts[1], parts[2], documents, scaling=0.125, causal=True)
    assert float((ours[0].double() - exact[0]).norm()) < float((products.double() - exact[0]).norm())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 9], [9, 5, 6, 1], [1, 30, 1], [300, 290, 7], [40, 700]])
def test_editing_one_document_changes_no_other_by_a_single_bit(lengths: list[int], causal: bool) -> None:
    documents, first = Documents(lengths), lengths[0]
    parts = [x.requires_grad_() for x in drawn(documents.total, 4, 2, 32)]
    edited = [x.detach().clone() for x in parts]
    for x in edited:
        x[:first] = -5.0 * x[:first] + 1.0
    before = streamed_attention(parts[0], parts[1], parts[2], documents, scaling=1.0, causal=causal)
    after = streamed_attention(edited[0], edited[1], edited[2], documents, scaling=1.0, causal=causal)
    assert torch.equal(before[first:], after[first:])
    assert not torch.equal(before[:first], after[:first])
    weight = torch.ones_like(before)
    weight[:first] = 0
    for gradient in torch.autograd.grad(before, parts, weight):
        assert float(gradient[:first].abs().sum()) == 0.0, "a document must get no gradient from another"


def test_later_tokens_change_earlier_ones_by_no_bit() -> None:
    parts = drawn(300, 4, 2, 64)
    before = streamed_attention(parts[0], parts[1], parts[2], Documents([300]), scaling=0.125, causal=True)
    for x in parts:
        x[150:] *= -3
    after = streamed_attention(parts[0], parts[1], parts[2], Documents([300]), scaling=0.125, causal=True)
    assert torch.equal(before[:150], after[:150])
    assert not torch.equal(before[150:], after[150:])


def test_what_is_no_number_reaches_those_who_see_it_and_nobody_else() -> None:
    q, k, v = drawn(160, 2, 2, 32)
    k[130, 0, 0] = float("nan")
    out = streamed_attention(q, k, v, Documents([140, 20]), scaling=1.0, causal=True)
    seen = out[:, 0].isnan().any(-1)
    assert seen[130:140].all()
    assert not seen[:130].any()
    assert not seen[140:].any()
    assert not out[:, 1].isnan().any()


@pytest.mark.parametrize("large", [300.0, 3e4])
def test_large_scores_stay_finite(large: float) -> None:
    """The running maximum rises from one piece of keys to the next."""
    documents, parts = Documents([400]), drawn(400, 2, 2, 32)
    parts[1] = parts[1] * torch.linspace(0, large, 400)[:, None, None].bfloat16()
    ours, exact = ours_and_exact(parts, documents, causal=True)
    assert all(x.isfinite().all() for x in ours)
    assert float((ours[0].double() - exact[0]).norm()) <= 0.02 * float(exact[0].norm())


def test_the_number_of_threads_changes_no_bit() -> None:
    documents, found = Documents([70, 33, 150, 8, 41], shared=12), []
    parts = [x.requires_grad_() for x in drawn(documents.total, 6, 3, 64, 4)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = streamed_attention(parts[0], parts[1], parts[2], documents, scaling=0.125, causal=True, prefix=(parts[3], parts[4]))
            found.append([out, *torch.autograd.grad(out.float().square().sum(), parts)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_dropout(causal: bool) -> None:
    """The mask is read off the outputs for values that are a unit matrix; with it the reference computes the same, gradients included."""
    length, share = 32, 0.3
    q, k, v = drawn(length, 4, 2, length)
    unit = torch.eye(length).bfloat16()[:, None].expand(-1, 2, -1).contiguous()

    def ours(*parts: Tensor) -> Tensor:
        torch.manual_seed(11)
        return streamed_attention(parts[0], parts[1], parts[2], Documents([length]), scaling=0.1, causal=causal, dropout=share)

    stays = (ours(q, k, unit) != 0).transpose(0, 1).double()  # [heads, queries, keys]
    seen = length * (length + 1) / 2 if causal else length * length
    assert abs(float(stays.sum() / (4 * seen)) - (1 - share)) < 0.05
    assert not torch.equal(stays[0], stays[1])
    parts = [x.requires_grad_() for x in (q, k, v)]
    out = ours(*parts)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = [out.detach(), *torch.autograd.grad(out, parts, weight)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("qhw,khw->hqk", wide[0], wide[1].repeat_interleave(2, 1)) * 0.1
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1) * stays / (1 - share)
    exact = torch.einsum("hqk,khw->qhw", weights, wide[2].repeat_interleave(2, 1))
    for mine, theirs in zip(found, [exact.detach(), *torch.autograd.grad(exact, wide, weight.double())], strict=True):
        assert float((mine.double() - theirs).norm()) <= 0.006 * float(theirs.norm())


def test_dropout_draws_anew_each_time_and_the_same_from_the_same_state() -> None:
    q, k, v = drawn(50, 4, 2, 32)

    def once() -> Tensor:
        return streamed_attention(q, k, v, Documents([50]), scaling=0.1, causal=True, dropout=0.5)

    torch.manual_seed(3)
    first, second = once(), once()
    torch.manual_seed(3)
    assert torch.equal(first, once())
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean_and_its_bits_are_independent() -> None:
    """Places of 64 heads, 128 queries and 128 keys: the share, and that neighbours along each of the three do not go together."""
    width, share = 128, 0.25
    q, k = torch.zeros(width, 64, width).bfloat16(), torch.zeros(width, 1, width).bfloat16()
    unit = torch.eye(width).bfloat16()[:, None].contiguous()
    torch.manual_seed(0)
    out = streamed_attention(q, k, unit, Documents([width]), scaling=1.0, causal=False, dropout=share)
    stays = (out != 0).double()
    count = stays.numel()
    deviation = (share * (1 - share) / count) ** 0.5
    assert abs(float(stays.mean()) - (1 - share)) < 4 * deviation
    centred = stays - (1 - share)
    for axis in range(3):
        together = float((centred * centred.roll(1, axis)).mean()) / (share * (1 - share))
        assert abs(together) < 4 / count**0.5, axis


@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
def test_padded_rows_of_an_encoder(lengths: list[int] | None) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, 9, 32, generator=g).bfloat16().requires_grad_() for _ in range(3)]
    real = torch.ones(3, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = None if lengths is None else real[:, None, None, :].expand(3, 1, 9, 9).clone()
    module = mock.Mock(is_causal=False, spec=["is_causal"])
    weight = torch.randn(3, 9, 4, 32, generator=g).bfloat16() * real[:, :, None, None]
    results = []
    for on in (True, False):
        fast.switch(on=on)
        try:
            out, _ = attention._forward(module, *parts, mask, scaling=0.3)
            assert (NAME in fast.taken()) is on
        finally:
            fast.switch(on=True)
        if on:
            assert float(out[~real].abs().sum()) == 0.0
        results.append([out.detach() * real[:, :, None, None], *torch.autograd.grad(out, parts, weight)])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours.float() - theirs.float()).norm()) <= 0.01 * float(theirs.float().norm())


def test_it_is_taken_where_it_serves_and_only_there() -> None:
    documents = Documents([20, 30, 5])
    q, k, v = drawn(documents.total, 4, 2, 32)
    assert serves(q, k, v, torch.bfloat16, documents)
    assert serves(q, k, v, torch.bfloat16, Padded(5, 11, None))
    assert not serves(q, k, v, torch.float32, documents)
    assert not serves(q[..., :24], k[..., :24], v[..., :24], torch.bfloat16, documents)
    assert not serves(q, k, v[..., :8], torch.bfloat16, documents)
    fast.switch(on=True)
    first = packed_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), documents, scaling=0.2)
    assert NAME in fast.taken()
    with fast.plain():
        second = packed_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), documents, scaling=0.2)
    fast.switch(on=True)
    assert float((first.float() - second.float()).norm()) <= 0.01 * float(second.float().norm())
    with mock.patch.object(torch, "get_num_threads", return_value=7):
        assert not serves(q, k, v, torch.bfloat16, documents), "six parts for seven threads"
