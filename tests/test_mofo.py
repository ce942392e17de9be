from __future__ import annotations

import pytest
import torch

from classp_hf import MoFO


def gradients(steps, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_with_every_weight_it_is_adam():
    ours, theirs = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    pair = MoFO([ours], lr=1e-2, fraction=1.0), torch.optim.Adam([theirs], lr=1e-2)
    for g in gradients(20, (7, 5)):
        for p, optimizer in zip((ours, theirs), pair):
            p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_only_the_largest_momenta_move():
    p = torch.nn.Parameter(torch.zeros(40))
    optimizer = MoFO([p], lr=1e-2, fraction=0.25)
    m = torch.zeros(40)
    for g in gradients(10, (40,)):
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        moved = (p.detach() != before).nonzero().flatten().tolist()
        assert sorted(moved) == sorted(m.abs().topk(10).indices.tolist())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": -1}, "lr must be >= 0, got -1"),
        ({"fraction": 0}, r"fraction must be in \(0, 1\], got 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0}, "eps must be > 0, got 0"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MoFO([torch.nn.Parameter(torch.zeros(1))], **kwargs)
