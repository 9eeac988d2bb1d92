"""The work queue: journals with torn lines, duplicates, several workers, resuming, and the same result every time."""

import json
import threading

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.errors import UserError
from ds_stability.eval.ranks import OtherRankFailed, Ranks
from ds_stability.eval.work import Journal, Progress, all_units, dump_line, duration, merged, read_journal, run_units


class Squares:
    """Unit "00i" gives the squares of its two numbers; `break_at` raises there."""

    def __init__(self, name="squares", size=7, break_at=None):
        self.name, self.size, self.break_at, self.ran = name, size, break_at, []

    def units(self):
        return [f"{index:03d}" for index in range(self.size)]

    def run(self, unit, scratch):
        self.ran.append(unit)
        if unit == self.break_at:
            raise RuntimeError("broken unit")
        (scratch / f"{unit}.bin").write_bytes(b"x")
        return [{"value": (2 * int(unit) + i) ** 2, "text": "ein\u00e4 \u2028 \"x\"\n"} for i in range(2)]

    def measure(self, records, scratch):
        return []


def merge_text(tasks, journal):
    return json.dumps({name: list(rows) for name, rows in merged(tasks, journal).items()}, ensure_ascii=False)


def do(tmp_path, tasks, ranks=None, label="cell"):
    journal = Journal(tmp_path / "journal")
    run_units(tasks, journal, tmp_path / "scratch", ranks or Ranks(), label)
    return journal


def test_every_unit_is_done_once_and_merged_in_order(tmp_path):
    tasks = [Squares("b", 3), Squares("a", 4)]
    journal = do(tmp_path, tasks)
    result = merged(tasks, journal)
    assert list(result) == ["b", "a"]
    assert [row["value"] for row in result["a"]] == [n**2 for n in range(8)]
    assert [task.ran for task in tasks] == [["000", "001", "002"], ["000", "001", "002", "003"]]
    assert len(list((tmp_path / "scratch" / "a").iterdir())) == 4


def test_a_second_run_does_nothing(tmp_path):
    tasks = [Squares()]
    do(tmp_path, tasks)
    again = [Squares()]
    journal = do(tmp_path, again)
    assert again[0].ran == [] and merge_text(again, journal) == merge_text(tasks, journal)


@given(cut=st.integers(0, 700), size=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_journal_cut_anywhere_goes_on_to_the_same_records(tmp_path_factory, cut, size):
    folder = tmp_path_factory.mktemp("cut")
    journal = do(folder, [Squares(size=size)])
    whole = merge_text([Squares(size=size)], journal)
    path = journal.files()[0]
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    kept = data[:cut].count(b"\n")
    task = Squares(size=size)
    journal = do(folder, [task])
    assert len(task.ran) == size - kept
    assert merge_text([task], journal) == whole


def test_of_a_unit_that_stands_twice_the_first_counts(tmp_path):
    journal = Journal(tmp_path)
    for attempt, value in ((2, "second"), (1, "first")):
        with journal.open(0, attempt) as writer:
            writer.append("t", "u", [{"value": value}])
    assert journal.read() == {("t", "u"): [{"value": "first"}]}


@pytest.mark.parametrize("line", [b"{not json}", b'{"task": "t"}', b"\xff\xfe", b"[1]"])
def test_a_broken_line_that_is_not_the_last_is_named(tmp_path, line):
    path = tmp_path / "rank-00000-0001.jsonl"
    good = dump_line({"task": "t", "unit": "u", "records": []}).encode()
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError, match=r"rank-00000-0001\.jsonl line 2"):
        read_journal(path)
    path.write_bytes(good + line)  # torn: left out
    assert len(read_journal(path)) == 1


def test_attempts_get_files_of_their_own(tmp_path):
    journal = Journal(tmp_path)
    assert journal.next_attempt() == 1
    journal.open(3, 1).__exit__()
    journal.open(0, 12).__exit__()
    assert journal.next_attempt() == 13
    assert [path.name for path in journal.files()] == ["rank-00003-0001.jsonl", "rank-00000-0012.jsonl"]
    with pytest.raises(FileExistsError):
        journal.open(3, 1)


def test_what_is_no_json_is_refused(tmp_path):
    with Journal(tmp_path).open(0, 1) as writer, pytest.raises(ValueError):
        writer.append("t", "u", [{"value": float("nan")}])


def test_a_failing_unit_keeps_what_was_done(tmp_path):
    with pytest.raises(RuntimeError, match="broken unit"):
        do(tmp_path, [Squares(break_at="004")])
    task = Squares()
    journal = do(tmp_path, [task])
    assert task.ran == ["004", "005", "006"]
    assert [row["value"] for row in merged([task], journal)["squares"]] == [n**2 for n in range(14)]


def test_names_that_clash_are_refused():
    with pytest.raises(ValueError, match="one name"):
        all_units([Squares("a", 1), Squares("a", 1)])


class Together:
    """Two ranks in two threads: one store, and a plan that both make for themselves."""

    def __init__(self, world):
        self.store, self.world = dist.HashStore(), world

    def rank(self, number):
        ranks = Ranks(number, self.world, number, self.store)
        ranks.from_first = lambda action: action()
        return ranks


def run_together(tmp_path, make_task, world=3):
    together, errors = Together(world), {}
    tasks = [make_task(rank) for rank in range(world)]
    start = threading.Barrier(world)  # all plan before any claims, as under a process group

    def work(rank):
        ranks = together.rank(rank)

        def plan(action):
            result = action()
            start.wait()
            return result

        ranks.from_first = plan
        try:
            run_units([tasks[rank]], Journal(tmp_path / "journal"), tmp_path / "scratch", ranks, "cell")
        except Exception as error:
            ranks.fail(error)
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return tasks, errors


def test_several_workers_divide_the_units_and_change_nothing(tmp_path):
    tasks, errors = run_together(tmp_path / "many", lambda rank: Squares(size=40))
    assert not errors
    ran = sorted(unit for task in tasks for unit in task.ran)
    assert ran == tasks[0].units()
    alone = Squares(size=40)
    assert merge_text([alone], Journal(tmp_path / "many" / "journal")) == merge_text([alone], do(tmp_path / "one", [alone]))


def test_a_rank_that_fails_ends_all(tmp_path):
    tasks, errors = run_together(tmp_path, lambda rank: Squares(size=40, break_at="005"))
    assert sum(type(error) is RuntimeError for error in errors.values()) == 1
    others = [error for error in errors.values() if isinstance(error, OtherRankFailed)]
    assert len(others) == 2 and all("broken unit" in str(error) for error in others)


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_gives_rate_and_time_left_from_this_attempt():
    assert Progress("c", 10, before=4).text(2, 4.0) == "c: 6 of 10 units (60 %), 0.50 a second, 8 s left"
    assert Progress("c", 0).text(0, 1.0) == "c: 0 of 0 units (100 %)"
