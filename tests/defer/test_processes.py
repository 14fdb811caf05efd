"""Two processes on gloo: DDP and FSDP2 give the same parameters with deferral as without."""

from __future__ import annotations

import pytest
from torch import multiprocessing

from support.processes import DDP, one_of_two


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        workers = [
            context.Process(target=one_of_two, args=(rank, store, found)) for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(400)
            if worker.exitcode is None:
                worker.terminate()
        return [dict(found.get(rank, {})) for rank in range(2)]


@pytest.mark.parametrize("name", DDP)
def test_ddp_ends_with_the_same_parameters(results, name):
    for rank in range(2):
        worst = results[rank].get(name, "this process did not get so far")
        assert isinstance(worst, float), worst
        assert worst <= 1e-12


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept whole"])
def test_fsdp2_is_right_and_says_once_that_it_takes_no_part(results, reshard):
    for rank in range(2):
        found = results[rank].get(f"fsdp {reshard}", "this process did not get so far")
        if isinstance(found, str) and ("not supported" in found or "NotImplemented" in found):
            pytest.skip(f"this torch does not shard on the CPU: {found}")
        assert not isinstance(found, str), found
        worst, told = found
        assert worst <= 1e-12
        assert told == [
            "3 converted layers take no part in deferral and compute as ever (first: first; its"
            " weight is sharded)."
        ]
