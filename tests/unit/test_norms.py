"""Sums over large tensors against fp64, whatever the size of a piece."""

import pytest
import torch

from ds_stability import norms
from ds_stability.stabilizers.averaging import Averaging


def make(dtype, *sizes):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=rng).to(dtype) for size in sizes]


@pytest.mark.parametrize("piece", [1, 7, 64, 2**17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_squared_norms_and_products(monkeypatch, dtype, piece):
    monkeypatch.setattr(norms, "PIECE", piece)
    tensors = make(dtype, (64,), (5, 3), (1,), ())
    (other,) = make(torch.float32, 64 + 15 + 1 + 1)
    flat = torch.cat([t.reshape(-1) for t in tensors]).double()
    wanted = float(flat @ flat)
    found = norms.squared_norm(tensors)
    assert found.dtype == torch.float64 and float(found) == pytest.approx(wanted, rel=1e-6)
    assert float(norms.total(norms.squares(tensors[1].t()))) == pytest.approx(float(tensors[1].double().square().sum()), rel=1e-6)
    assert norms.products(tensors, other.to(torch.promote_types(dtype, torch.float32))).tolist() == pytest.approx(
        [wanted, float(flat @ other.double())], rel=1e-6
    )


def test_a_long_bf16_tensor_loses_nothing():
    """One bf16 sum would stop at 256; torch's own fp32 norm is 9e-4 off."""
    ones = torch.full((3_000_001,), 0.1, dtype=torch.bfloat16)
    assert float(norms.squared_norm([ones])) == pytest.approx(3_000_001 * float(ones[0].double()) ** 2, rel=5e-5)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value):
    (tensor,) = make(torch.bfloat16, 9)
    tensor[4] = value
    assert not norms.squared_norm([tensor]).isfinite()


def test_the_norm_of_the_mean_is_that_of_the_mean_after_a_step_and_after_a_resume(monkeypatch):
    monkeypatch.setattr(norms, "PIECE", 10)
    averaging = Averaging(lambda step: 0.5, 0.99)
    for step in range(3):
        averaging.prepare(step, None)
        averaging.apply(0, make(torch.float32, 64)[0])
        averaging.update(None)
        wanted = averaging.squared_mean(0).clone()
        assert float(wanted) == pytest.approx(float(averaging.means[0].double().square().sum()), rel=1e-6)
        averaging.means[0] = averaging.means[0].clone()  # as a checkpoint is loaded
        assert torch.equal(averaging.squared_mean(0), wanted)
    averaging.means[0] = averaging.means[0] * 2.0
    assert float(averaging.squared_mean(0)) == pytest.approx(4 * float(wanted), rel=1e-6)


def test_a_sparse_gradient_has_the_norm_of_the_dense_one():
    indices = torch.tensor([[1, 4, 1]])  # a word twice
    sparse = torch.sparse_coo_tensor(indices, torch.arange(6.0).view(3, 2), (7, 2))
    wanted = sparse.to_dense().double().square().sum()
    assert norms.total(norms.squares(sparse)) == norms.squared_norm([sparse, torch.ones(0)]) == wanted
