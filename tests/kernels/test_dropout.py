"""Dropout by a hash: its share, independence of places and seeds, the same mask on the way back, and the generator that it depends on."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from peftcli.kernels import attention, fast, native
from peftcli.kernels.documents import Documents
from peftcli.kernels.dropout import Dropout, dropout, dropped
from peftcli.kernels.products import products_attention
from peftcli.model.fused import fuse

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(native.library(torch.float32) is None, reason="no compiler on this machine"),
]
DTYPES = [torch.float32, torch.bfloat16]
FACTOR = torch.ones(1) / torch.tensor([0.75])


def mask(seed: int, share: float, count: int = 1 << 18, first: int = 0) -> Tensor:
    """[count] float64: 1 where a number stays."""
    return (dropped(torch.ones(count), torch.tensor([seed]), share, first) != 0).double()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 40, (1 << 62) + 12345])
def test_the_share_and_no_two_places_hang_together(share: float, seed: int) -> None:
    stays = mask(seed, share)
    deviation = (share * (1 - share) / len(stays)) ** 0.5
    assert abs(float(stays.mean()) - (1 - share)) < 5 * deviation
    normal = (stays - (1 - share)) / (share * (1 - share)) ** 0.5
    limit = 5 / len(stays) ** 0.5
    for apart in (1, 2, 3, 16, 64, 576, 1024, 4096):
        assert abs(float((normal[apart:] * normal[:-apart]).mean())) < limit, apart
    for other in (seed + 1, seed ^ (1 << 33), seed + 4096):
        beside = (mask(other, share) - (1 - share)) / (share * (1 - share)) ** 0.5
        assert abs(float((normal * beside).mean())) < limit, other


def test_places_go_on_and_do_not_repeat() -> None:
    whole = mask(7, 0.3, 5000)
    assert torch.equal(whole[1234:], mask(7, 0.3, 5000 - 1234, first=1234))
    far = mask(7, 0.3, 5000, first=1 << 32)
    assert 0.4 < float((whole == far).double().mean()) < 0.75


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient_share_one_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = (torch.rand(7, 33, 5) + 0.5).to(dtype).transpose(0, 1).requires_grad_()
    out = dropout(x, 0.25)
    stays = out != 0
    assert 0.6 < float(stays.double().mean()) < 0.9
    assert torch.equal(out, torch.where(stays, (x.detach().float() * FACTOR).to(dtype), torch.zeros_like(out)))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(found, torch.where(stays, (grad.float() * FACTOR).to(dtype), torch.zeros_like(grad)))


def test_it_follows_the_generator_and_keeps_no_mask() -> None:
    x, kept = torch.randn(64, 64, requires_grad=True), list[Tensor]()
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        first = dropout(x, 0.5)
    assert sum(t.numel() for t in kept) == 1
    second = dropout(x, 0.5)
    torch.set_rng_state(state)
    again = dropout(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_where_it_is_not_taken() -> None:
    x = torch.randn(8, 8)
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(dropout(x, 0.0), x)
    assert float(dropout(x, 1.0).abs().sum()) == 0.0
    for value, context in ((x, fast.plain()), (x.double(), mock.patch.object(fast, "_taken", {}))):
        torch.manual_seed(5)
        with context:
            ours = dropout(value, 0.5)
        torch.manual_seed(5)
        assert torch.equal(ours, torch.nn.functional.dropout(value, 0.5))


def test_the_layers_of_a_model_take_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout1d(0.5))
    fuse(model)
    assert type(model[1]) is Dropout
    assert type(model[2]) is nn.Dropout1d
    assert repr(model[1]) == "Dropout(p=0.5, inplace=False)"
    x = torch.randn(2, 4)
    assert torch.equal(model.eval()[1](x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept", [4, 1024])
def test_dropout_of_attention_weights(dtype: torch.dtype, causal: bool, kept: int) -> None:
    """The mask is read off the outputs for values that are a unit matrix; with it the reference computes the same, gradients included."""
    length, share = 24, 0.3
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(length, heads, 8, generator=g).to(dtype) for heads in (4, 2))
    v = torch.randn(length, 2, 8, generator=g).to(dtype)
    unit = torch.eye(length).to(dtype)[:, None].expand(-1, 2, -1).contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(11)
        return products_attention(q, k, v, Documents([length]), scaling=0.3, causal=causal, dropout=share)

    with mock.patch("peftcli.kernels.products._KEPT", kept):
        stays = (ours(q, k, unit) != 0).transpose(0, 1).double()  # [heads, queries, keys]
        given = [x.requires_grad_() for x in (q, k, v)]
        out = ours(*given)
        weight = torch.randn(out.shape, generator=g).to(dtype)
        found = [out.detach(), *torch.autograd.grad(out, given, weight)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("qhw,khw->hqk", wide[0], wide[1].repeat_interleave(2, 1)) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1) * stays / (1 - share)
    exact = torch.einsum("hqk,khw->qhw", weights, wide[2].repeat_interleave(2, 1))
    limit = 1e-5 if dtype == torch.float32 else 0.03
    for mine, theirs in zip(found, [exact.detach(), *torch.autograd.grad(exact, wide, weight.double())], strict=True):
        assert float((mine.double() - theirs).abs().max()) <= limit * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
def test_padded_rows_of_an_encoder(dtype: torch.dtype, lengths: list[int] | None) -> None:
    """Beside SDPA with the same mask; what is padding may differ, and gets no gradient."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, 9, 8, generator=g).to(dtype).requires_grad_() for _ in range(3)]
    real = torch.ones(3, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = None if lengths is None else real[:, None, None, :].expand(3, 1, 9, 9).clone()
    module = mock.Mock(is_causal=False, spec=["is_causal"])
    results = []
    weight = torch.randn(3, 9, 4, 8, generator=g).to(dtype) * real[:, :, None, None]
    for on in (True, False):
        fast.switch(on=on)
        try:
            with mock.patch.dict(attention._LONGEST, {dtype: (99, 99)}):
                out, _ = attention._forward(module, *parts, mask, scaling=0.3)
            assert ("attention by plain products" in fast.taken()) is on
        finally:
            fast.switch(on=True)
        results.append([out.detach() * real[:, :, None, None], *torch.autograd.grad(out, parts, weight)])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours.float() - theirs.float()).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.03)


def test_other_masks_go_their_own_way() -> None:
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    ends = torch.arange(9) < torch.tensor([[9], [4]])
    good = ends[:, None, None, :].expand(2, 1, 9, 9).clone()
    hole, left, causal, empty = good.clone(), good.flip(-1), good & torch.ones(9, 9).tril().bool(), good & False
    hole[0, :, :, 3] = False
    assert attention._padded(q, q, good) is attention._padded(q, q, good)
    assert attention._padded(q, q, good) is not None
    for mask in (hole, left, causal, empty, torch.zeros(2, 1, 9, 9)):
        assert attention._padded(q, q, mask) is None
    with torch.no_grad():
        assert attention._padded(q, q, good) is None
