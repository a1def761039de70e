"""The pool that the memory of handles comes from, on an imitation of CUDA."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from tests import fake_tensorrt
from tests.fake_tensorrt import Machine
from zimgkit.engines.errors import OutOfMemoryError
from zimgkit.engines.tensorrt import cuda, memory
from zimgkit.engines.tensorrt.memory import MAX_DROPPED, Pool, pool_of


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield fake_tensorrt.install(monkeypatch, gpus=2)
    gc.collect()


@pytest.fixture
def pool(machine: Machine) -> Pool:
    """Of a GPU with an open engine."""
    pool = pool_of(0)
    cuda.use(0)
    pool.enter()
    return pool


def test_one_of_each_gpu(machine):
    first, second = pool_of(0), pool_of(1)
    assert (pool_of(0), pool_of(1)) == (first, second)
    assert (first.index, second.index) == (0, 1)


def test_it_lives_as_long_as_a_handle(machine):
    cuda.use(0)
    kept = pool_of(0).allocate(100)
    assert pool_of(0).holds(kept.address)
    del kept
    assert (machine.used, machine.leaks) == (0, [])
    assert 0 not in memory._POOLS


def test_what_is_dropped_is_used_again_in_its_order(pool, machine):
    made = [pool.allocate(size) for size in (100, 200, 100)]
    addresses = [each.address for each in made]
    while made:
        made.pop(0)
    assert machine.used == 400
    again = [pool.allocate(size) for size in (100, 100, 200)]
    assert [each.address for each in again] == [addresses[0], addresses[2], addresses[1]]
    assert machine.count("cudaMalloc") == 3
    assert pool.frees == 0


def test_other_sizes_are_new(pool, machine):
    pool.allocate(100)
    larger = pool.allocate(101)
    assert machine.used == 201
    assert pool.holds(larger.address)


def test_in_use_is_never_given_twice(pool):
    made = [pool.allocate(64) for _ in range(10)]
    assert len({each.address for each in made}) == 10


def test_only_so_much_waits(pool, machine):
    """What was dropped longest ago is freed first."""
    for size in range(1, MAX_DROPPED + 11):
        pool.allocate(size)
    last = pool.allocate(1000)
    assert machine.used == sum(range(11, MAX_DROPPED + 11)) + 1000
    assert pool.holds(last.address)


def test_trimming_frees_what_waits(pool, machine):
    kept, dropped = pool.allocate(100), pool.allocate(200)
    address = dropped.address
    assert not pool.trim()
    del dropped
    assert pool.trim()
    assert (machine.used, pool.frees) == (100, 1)
    assert pool.holds(kept.address)
    assert not pool.holds(address)


def test_what_waits_makes_room(pool, machine):
    machine.memory = 1000
    pool.allocate(600)
    assert machine.used == 600
    kept = pool.allocate(900)
    assert machine.used == 900
    with pytest.raises(OutOfMemoryError, match="the GPU is out of memory"):
        pool.allocate(200)
    with pytest.raises(OutOfMemoryError):
        pool.buffer(101)
    del kept
    buffer = pool.buffer(1000)  # An engine's own.
    assert machine.used == 1000
    assert not pool.holds(buffer.address)
    buffer.free()


def test_without_an_engine_nothing_waits(pool, machine):
    first, second = pool.allocate(100), pool.allocate(200)
    del first
    assert machine.used == 300
    pool.leave()
    assert machine.used == 200
    del second
    assert (machine.used, machine.leaks) == (0, [])


def test_of_the_second_gpu(machine):
    pool = pool_of(1)
    cuda.use(1)
    pool.enter()
    kept = pool.allocate(8)
    cuda.use(0)
    pool.leave()
    del kept
    assert machine.current == 1
    assert machine.leaks == []


def test_dropped_while_the_pool_is_at_work(pool):
    """By the collector of cycles in the same thread, or by another thread."""
    cycle = [pool.allocate(100)]
    cycle.append(cycle)  # type: ignore[arg-type]
    other = [pool.allocate(100)]
    with pool._lock:
        del cycle
        gc.collect()
        thread = threading.Thread(target=other.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    before = pool.frees
    assert pool.trim()
    assert pool.frees == before + 1


def test_many_threads(pool, machine):
    """Nothing is lost or given twice."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            cuda.use(0)
            for step in range(100):
                made = [pool.allocate(8 * (1 + (step + i) % 3)) for i in range(3)]
                assert len({each.address for each in made}) == 3
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    pool.leave()
    assert machine.leaks == []
