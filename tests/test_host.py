"""What is kept between calls."""

from __future__ import annotations

import torch

from implicitly.host import remembered


def test_what_is_remembered_under_a_transform_or_in_inference_mode_serves_afterwards():
    @remembered(4)
    def weights(count: int) -> torch.Tensor:
        return torch.arange(1.0, count + 1)

    x = torch.tensor([0.5, 2.0])
    first = torch.func.vmap(torch.func.grad(lambda a: (weights(3) * a).square().sum()))(x)
    with torch.inference_mode():
        weights(2)
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda a: (weights(3) * a).square().sum()))(x), first)
    assert torch.equal(first, 28 * x)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weights(2) * y).sum(), y)
    assert torch.equal(gradient, torch.tensor([1.0, 2.0]))
