"""Two processes under DDP: the same findings in both, spoken by the first; training as without."""

from __future__ import annotations

from torch import multiprocessing

from support.monitored import one_of_two


def test_ddp(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        workers = [
            context.Process(target=one_of_two, args=(rank, tmp_path / "store", found))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            if worker.exitcode is None:
                worker.terminate()
        results = [found.get(rank, "this process did not get so far") for rank in range(2)]
    for result in results:
        assert isinstance(result, tuple), result
    (same, first, spoken), (also_same, second, silent) = results
    assert same
    assert also_same
    assert first == second
    assert any("turned its filters by" in one for one in first)
    assert spoken == first
    assert silent == []
