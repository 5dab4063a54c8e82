"""What `flashmoe info --distributed` tells: of every rank where it is and how it reaches the others."""

import json

import pytest

import flashmoe
from flashmoe import cli, cuda_teams, topology


def tell_topology() -> int:
    return cli.main(["info", "--distributed", "--json"])


@pytest.mark.skipif(cuda_teams.has_cuda(), reason="ranks would be GPUs")
def test_info_of_all_ranks(capfd):
    assert flashmoe.launch(tell_topology, 2) == [0, 0]
    ranks = json.loads(capfd.readouterr().out)
    assert [found["peers"] for found in ranks] == [["self", "mapped"], ["mapped", "self"]]
    assert {found["device"] for found in ranks} == {"cpu"} and ranks[1]["heap_bytes"] > 2**20
    text = topology.topology_text([{**ranks[0], "error": "one"}, {**ranks[1], "settings": {"NVSHMEM_DEBUG": "INFO"}}])
    assert "self mapped" in text and "rank 0: error: one" in text and "rank 1: NVSHMEM_DEBUG=INFO" in text
