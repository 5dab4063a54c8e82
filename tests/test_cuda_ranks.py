"""Virtual ranks on one GPU: the whole protocol in one grid, its deadlines too. Without a GPU all of it is skipped."""

import gc

import pytest
import torch
from cuda_case import CudaCase, Ranks, has_cuda, worst_error

import flashmoe

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")


@pytest.mark.parametrize("tokens", [[64, 64], [0, 33], [128, 1, 0, 77], [40] * 8, [512] * 8, [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_virtual_ranks(tokens, dtype):
    case = CudaCase(tokens=sum(tokens), dtype=dtype)
    ranks = Ranks(case, tokens)
    first = torch.cat(ranks.call())
    assert worst_error(first, case) <= case.tolerance
    for _ in range(5):
        assert torch.equal(torch.cat(ranks.call()), first), "bits differ on repeat"


def test_two_ranks_small():
    case = CudaCase(64, 48, 4, 2, 20, torch.float32)
    assert worst_error(torch.cat(Ranks(case, [13, 7]).call()), case) <= case.tolerance


@pytest.mark.parametrize("owners", [[1] * 16, [0, 1] * 8, [3, 0, 0, 3] * 4, [7, 6, 5, 4, 3, 2, 1, 0] * 2], ids=str)
def test_any_placement(owners):
    ep_size = max(owners) + 1
    case = CudaCase(tokens=40 * ep_size)
    ranks = Ranks(case, [40] * ep_size, owners)
    assert worst_error(torch.cat(ranks.call()), case) <= case.tolerance


@pytest.mark.parametrize("ep_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_ranks(ep_size, dtype):
    case = CudaCase(tokens=96, dtype=dtype)
    assert torch.equal(torch.cat(Ranks(case, [96 // ep_size] * ep_size).call()), case.call())


@pytest.mark.parametrize(("hidden", "inner"), [(37, 19), (129, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_widths(hidden, inner, dtype):
    case = CudaCase(hidden, inner, 6, 2, 60, dtype)
    assert worst_error(torch.cat(Ranks(case, [40, 20]).call()), case) <= case.tolerance


def test_a_graph_replays_calls_of_all_ranks():
    case = CudaCase(tokens=64)
    ranks = Ranks(case, [32, 32])
    out = ranks.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.call(out=out)
    for _ in range(10):
        case.x.normal_()  # the ranks' tokens are views of it
        graph.replay()
        assert worst_error(torch.cat(out), case) <= case.tolerance


def test_a_rank_that_never_comes_ends_the_others_calls():
    case = CudaCase(tokens=96)
    ranks = Ranks(case, [32, 32, 32], timeout_s=0.5, missing_ranks=1)
    for y in ranks.call():
        assert y.isnan().all()
    torch.cuda.synchronize()
    for ask in (ranks.call, flashmoe.check):
        with pytest.raises(flashmoe.PeerError, match=r"while waiting for the packet header of rank 2"):
            ask()
    del ranks, ask  # and with them the failure
    gc.collect()
    again = Ranks(case, [32, 32, 32])
    assert worst_error(torch.cat(again.call()), case) <= case.tolerance
    flashmoe.check()


def test_a_bad_id_of_one_rank_ends_the_calls_of_all():
    case = CudaCase(tokens=64)
    case.ids[40, 2] = 99
    ranks = Ranks(case, [32, 32], timeout_s=5.0)
    ys = ranks.call()
    torch.cuda.synchronize()
    assert ys[1].isnan().all()
    with pytest.raises(flashmoe.PeerError, match=r"rank 1.*topk_ids must lie in \[0, 16\).*got 99 for token 8, choice 2"):
        ranks.call()
