"""Tasks in worker processes: all of them, few at a time."""

from olvae import pool


def test_the_pool_waits_for_few_tasks_at_a_time(monkeypatch):
    """So that its work is linear in the tasks: each wait looks at all that it is given."""
    waits = []
    wait = pool.wait

    def counted(futures, *arguments):
        waits.append(len(futures))
        return wait(futures, *arguments)

    monkeypatch.setattr(pool, "wait", counted)
    for tasks in (100, 400):
        waits.clear()
        results = pool.run_in_processes(lambda n, _: n * n, range(tasks), 2, lambda _: None)
        assert results == [n * n for n in range(tasks)]
        assert max(waits) <= 4
        assert sum(waits) <= 4 * tasks + 100  # 100: waits that end before a task does
