"""Virtual ranks on one GPU: the whole protocol in one grid, its deadlines too. Without a GPU all of it is skipped."""

import gc

import pytest
import torch
from cuda_case import CudaCase, has_cuda, worst_error

import flashmoe
from flashmoe.virtual_ranks import VirtualRanks

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with nvcc")


class Ranks:
    """A case's tokens dealt to ranks, and its experts by owner."""

    def __init__(self, case: CudaCase, tokens, owners=None, **options):
        self.case, ep_size = case, len(tokens)
        self.parts = [part.split(list(tokens)) for part in (case.x, case.ids, case.weights)]
        self.expert_map = None if owners is None else torch.tensor(owners, dtype=torch.int32)
        owner = torch.arange(case.experts) * ep_size // case.experts if owners is None else self.expert_map
        mine = [torch.nonzero(owner == rank).flatten().cuda() for rank in range(ep_size)]
        self.experts = [[weights[experts] for experts in mine] for weights in (case.gate_up, case.down)]
        self.team = VirtualRanks(
            ep_size, max_tokens=max(*tokens, 1), max_wire_bytes=case.hidden * case.dtype.itemsize,
            max_top_k=case.top_k, max_experts=case.experts, **{"timeout_s": 60.0, **options},
        )  # fmt: skip

    def call(self, **options):
        return self.team(
            *self.parts, *self.experts, activation=self.case.activation, gated=self.case.gated,
            num_experts=self.case.experts, expert_map=self.expert_map, **options,
        )  # fmt: skip


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
