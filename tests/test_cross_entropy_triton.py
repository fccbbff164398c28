"""The kernels of the loss: several programs, memory around the logits, tiles, and where they run."""

import math
from unittest import mock

import pytest
import torch

from kernels import cross_entropy_triton, dispatch, linear_cross_entropy
from kernels.cross_entropy_triton import Terms, gradient_launch, loss_launch

TERMS = Terms(3.0, 0.01, 0.1, -100)


def in_poison(values: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values as a view of memory that is NaN around each row and behind the last, and that memory."""
    memory = torch.full((values.shape[0] + 40, values.shape[1] + 3), math.nan, dtype=values.dtype, device=device)
    view = memory[: values.shape[0], : values.shape[1]]
    view.copy_(values)
    return view, memory


def outside(memory: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.cat([memory[shape[0] :].flatten(), memory[: shape[0], shape[1] :].flatten()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("columns", [16, 64, 4096])
@pytest.mark.parametrize(("N", "V"), [(100, 65), (300, 3), (257, 16), (33, 64), (130, 200)])
def test_many_programs(N, V, columns, dtype, device):
    """Every row is written, and nothing around them."""
    generator = torch.Generator().manual_seed(N + V)
    logits = (3 * torch.randn(N, V, generator=generator)).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[3::7] = -100
    dlosses = torch.randn(N, generator=generator)
    exact = logits.double().requires_grad_()
    s = TERMS.softcap * torch.tanh(exact / TERMS.softcap)
    lse = s.logsumexp(1)
    losses = lse - 0.9 * s[torch.arange(N), targets.clamp(min=0)] - 0.1 * s.mean(1) + 0.01 * lse.square()
    losses = losses * (targets >= 0)
    by_dlosses, by_ones = (
        torch.autograd.grad(losses, exact, flow.double(), retain_graph=True)[0] for flow in (dlosses, torch.ones(N))
    )
    # The interpreter truncates to bfloat16, where a GPU rounds.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]
    with mock.patch.object(cross_entropy_triton, "MOST_COLUMNS", columns):
        for gradient in (False, True):
            view, memory = in_poison(logits, device)
            found, found_lse = torch.full((2, N + 40), math.nan, device=device)
            loss_launch(view, targets.to(device), found[:N], found_lse[:N], TERMS, gradient).run()
            torch.testing.assert_close(found[:N].cpu().double(), losses.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found_lse[:N].cpu().double(), lse.detach(), rtol=1e-5, atol=1e-5)
            expected = by_ones if gradient else logits.double()
            torch.testing.assert_close(view.cpu().double(), expected, rtol=rounding, atol=1e-6)
            assert torch.cat([found[N:], found_lse[N:], outside(memory, view.shape).float()]).isnan().all()
        view, memory = in_poison(logits, device)
        gradient_launch(view, targets.to(device), found_lse[:N], dlosses.to(device), TERMS).run()
        torch.testing.assert_close(view.cpu().double(), by_dlosses, rtol=rounding, atol=1e-6)
        assert outside(memory, view.shape).isnan().all()


@pytest.mark.parametrize(
    ("N", "V", "rows", "columns", "programs"),
    [(100, 65, 32, 128, 4), (3, 50304, 1, 4096, 3), (5, 3, 8, 16, 1), (9, 4096, 1, 4096, 9), (9, 2048, 2, 2048, 5)],
)
def test_tiles(N, V, rows, columns, programs):
    """A tile has at most 4,096 logits, of one row or several short ones, and no more rows than exist."""
    logits, numbers = torch.empty(N, V, device="meta"), torch.empty(N, device="meta")
    launch = loss_launch(logits, numbers.long(), numbers, numbers, Terms(0.0, 0.0, 0.0, -100), True)
    assert (launch.args["BLOCK_N"], launch.args["BLOCK_V"], launch.grid) == (rows, columns, (programs,))
    assert launch.options == {"num_warps": 8} and launch.args["GRADIENT"] is True
    # Terms that a loss lacks are compiled away.
    assert launch.args["terms"] == (None, 0.0, None, -100)
    assert gradient_launch(logits, numbers.long(), numbers, numbers, TERMS).args["terms"] == (3.0, 0.01, 0.1, -100)


def test_where_the_kernels_run():
    x = torch.zeros(4, 8)
    with (
        mock.patch.object(dispatch, "runs_on", return_value=False),
        pytest.raises(NotImplementedError, match="cpu is not a GPU from sm_80 up"),
    ):
        linear_cross_entropy(x, x, torch.zeros(4, dtype=torch.int64), impl="triton")
    with mock.patch.object(dispatch, "runs_on", return_value=True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert dispatch.why_not_triton(x.to(dtype)) is None
        assert "not torch.float64" in dispatch.why_not_triton(x.double())
