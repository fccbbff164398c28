"""The check that other tests use finds kernels that are broken on purpose."""

from unittest import mock

import pytest
import triton
import triton.language as tl

from kernels import attention_backward, attention_forward, mask, masks, problem, tile_lists, tiles
from kernels.dispatch import INTERPRETED
from tests.attention_checks import Case, check

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the interpreter alone takes a kernel's parts from its module anew"
)

CASE = Case(130, 130, H=1, mask=masks.sliding_window(70))


def test_unchanged_kernels_pass(device):
    check(CASE, device)


def test_a_flipped_mask_is_found(device):
    flipped = masks.Mask(before_itself, 70, bands=masks.sliding_window(70).bands)
    real = mask.predicate
    with (
        mock.patch.object(mask, "predicate", lambda key: real(flipped.key) if key == CASE.mask.key else real(key)),
        pytest.raises(AssertionError),
    ):
        check(CASE, device)


def before_itself(q, k, window):
    return (q > k) & (q - k < window)


def test_a_missing_scale_is_found(device):
    real = problem.Problem.scoring
    with (
        mock.patch.object(problem.Problem, "scoring", lambda self: real(self)._replace(scale=problem.LOG2E)),
        pytest.raises(AssertionError),
    ):
        check(CASE, device)


@pytest.mark.parametrize("module", [attention_forward, attention_backward], ids=["forward", "backward"])
@pytest.mark.parametrize("which", ["count_full", "count_partial"])
def test_a_skipped_tile_is_found(module, which, device):
    replacement = {"count_full": one_full_less, "count_partial": one_partial_less}[which]
    with mock.patch.object(module, which, replacement), pytest.raises(AssertionError):
        check(CASE, device)


@pytest.mark.parametrize("module", [attention_forward, attention_backward], ids=["forward", "backward"])
def test_a_skipped_tile_of_a_list_is_found(module, device):
    case = Case(130, 130, H=1, mask=masks.CAUSAL & masks.strided(50))
    check(case, device)
    with mock.patch.object(module, "count_partial", one_partial_less), pytest.raises(AssertionError):
        check(case, device)


def test_a_skipped_tile_of_two_documents_is_found(device):
    """The lists of tiles ignore that two documents share a tile."""
    case = Case(130, 130, H=1, features=("segments",))
    real = tile_lists._by_segments

    def wrong(*args):
        _, same = real(*args)
        return same, same

    with mock.patch.object(tile_lists, "_by_segments", wrong), pytest.raises(AssertionError):
        check(case, device)


count_full, count_partial = tiles.count_full, tiles.count_partial


@triton.jit
def one_full_less(spans):
    return tl.maximum(count_full(spans) - 1, 0)


@triton.jit
def one_partial_less(spans):
    return tl.maximum(count_partial(spans) - 1, 0)
