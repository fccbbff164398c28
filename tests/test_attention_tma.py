"""Tiles loaded by tensor descriptors: the same bits as by pointers, which serve tensors the copy engine cannot read."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from kernels import attention, configs, masks
from kernels.attention_arguments import Arguments
from kernels.attention_forward import forward_launch
from kernels.dispatch import INTERPRETED
from kernels.operators import call_of
from kernels.problem import Problem, descriptor
from tests.attention_checks import Case, check, make_inputs, poisoned_outputs, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@contextmanager
def in_all_kernels(tma: bool, case: Case, device: str):
    arch = configs.architecture(torch.device(device))
    head_dim = configs.head_dim_class(case.D, case.Dv or case.D)
    with ExitStack() as stack:
        for kernel in configs.TUNED_KERNELS:
            key = configs.Key(arch, case.dtype, head_dim, kernel)
            stack.enter_context(configs.trying(key, configs.Config(32, 64, 4, 2, tma)))
        yield


CASES = [
    Case(130, 130, B=2, D=80, dtype=BF16, mask=masks.sliding_window(50), layout="contiguous"),
    Case(40, 70, B=2, H=4, H_kv=2, D=16, Dv=24, dtype=FP16, layout="heads first"),
    Case(1, 33, D=64, features=("segments", "bias", "dropout"), layout="contiguous"),
]


@pytest.mark.skipif(not INTERPRETED, reason="a compiler may order sums differently")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_pointers(case, device):
    """Rows beyond the end and columns beyond D read as zero both ways."""
    inputs, found = make_inputs(case, device), []
    for tma in (False, True):
        with in_all_kernels(tma, case, device), poisoned_outputs():
            found.append(run(attention, inputs, impl="triton"))
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tma_is_correct_on_a_gpu(case):
    if configs.architecture(torch.device("cuda")) not in configs.HAS_TMA:
        pytest.skip("this GPU has no copy engine for tiles")
    with in_all_kernels(True, case, "cuda"):
        check(case, "cuda")


def launch(q, k, v, tma: bool):
    call = call_of(Arguments(q, k, v))
    key = configs.Key("sm_90", q.dtype, 64, "forward")
    with configs.trying(key, configs.Config(32, 32, 4, 2, tma)):
        return forward_launch(Problem(call, "sm_90"), torch.empty_like(q), q[..., 0])


def test_descriptors_take_the_place_of_pointers():
    q, k, v = (torch.zeros(2, 8, 3, 16, dtype=FP16) for _ in range(3))
    args = launch(q, k, v, tma=True).args
    assert args["k"].base is k and args["k"].block_shape == [1, 1, 32, 16] and args["k_strides"] == ()
    assert args["k"].shape == [2, 3, 8, 16] and args["k"].strides == [8 * 3 * 16, 16, 3 * 16, 1]
    assert launch(q, k, v, tma=False).args["k"] is k


def test_one_unreadable_tensor_means_pointers_for_all():
    q, k = (torch.zeros(2, 8, 3, 16, dtype=FP16) for _ in range(2))
    args = launch(q, k, torch.zeros(2, 8, 3, 20, dtype=FP16)[..., 4:], tma=True).args
    assert args["q"] is q and args["k"] is k and args["q_strides"] == q.stride()


def misfits() -> dict[str, torch.Tensor]:
    x = torch.zeros(2, 8, 4, 16, dtype=FP16)
    return {
        "a base off 16 bytes": torch.zeros(2, 8, 4, 24, dtype=FP16)[..., 4:20],
        "a stride off 16 bytes": torch.zeros(2, 8, 4, 20, dtype=FP16)[..., :16],
        "elements apart": torch.zeros(2, 8, 4, 32, dtype=FP16)[..., ::2],
        "heads repeated": x[:, :, :1].expand(2, 8, 4, 16),
        "nothing": x[:, :0],
    }


@pytest.mark.parametrize("why", misfits())
def test_unreadable_tensors_get_no_descriptor(why):
    assert descriptor(misfits()[why], 32, 16) is None


def test_strides_of_axes_of_length_one_are_ignored():
    """For example one row or one head of a tensor with odd strides."""
    x = torch.zeros(2 * 8 * 16 + 3, dtype=FP16).as_strided((1, 8, 1, 16), (259, 16, 3, 1))
    assert descriptor(x, 32, 16).strides == [16, 16, 16, 1]


def test_a_projection_of_q_k_and_v_at_once_can_be_read():
    """q, k and v in one tensor need no copy."""
    q, k, v = torch.zeros(2, 8, 3 * 4 * 16, dtype=FP32).view(2, 8, 12, 16).split(4, dim=2)
    assert all(descriptor(x, 32, 16).strides == [8 * 192, 16, 192, 1] for x in (q, k, v))
