"""A probe between the steps does not change the training by one bit, and its samples are the model's own."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("probe_worker.py")
ZERO3 = [
    "llama",
    "llama_bf16",
    "llama_persistent",
    "llama_evaluate",
    "llama_offload",
    "llama_checkpointing",
    "gpt2_tied",
    "gpt2_reentrant",
    "llama_lora",
    "llama_lora_checkpointing",
]
CASES = [*ZERO3, "llama_stage2", "llama_stage0"]
PROBES = 3  # per case


def launch(run_ranks, out, names, ranks):
    done = run_ranks(WORKER, str(out), *names, ranks=ranks, timeout=600)
    assert (out / "DONE").exists(), done.stderr[-4000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in names}, done


@pytest.fixture(scope="module")
def two_ranks(run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    results, done = launch(run_ranks, out, CASES, ranks=2)
    return results, done, out


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_with_a_probe(two_ranks, case):
    for rank in two_ranks[0][case]:
        assert rank["moved"], "the training did nothing, so the comparison says nothing"
        assert rank["equal_losses"]
        assert rank["equal_weights"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_a_step_reads_is_disturbed(two_ranks, case):
    for rank in two_ranks[0][case]:
        assert rank["disturbed"] == []
        assert rank["scope_disturbed"] == []  # not even when the scope is left by an exception


@pytest.mark.parametrize("case", [case for case in CASES if case != "llama_bf16"])  # a cache changes bf16's last bits
def test_samples_are_what_a_plain_model_says(two_ranks, case):
    assert two_ranks[0][case][0]["disagreements"] == []


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_once_per_probe_and_no_module_fetches_its_own(two_ranks, case):
    for rank in two_ranks[0][case]:
        assert rank["fetches"] == 0
        assert rank["gathers"] == (PROBES if case in ZERO3 else 0)


def test_prefetches_left_by_an_evaluation_are_met(two_ranks):
    assert two_ranks[0]["llama_evaluate"][0]["inflight"] > 0, "the case does not show what it is for"


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_the_same_on_every_rank_and_complete(two_ranks, case):
    first, second = two_ranks[0][case]
    assert first["metrics"] == second["metrics"]
    assert sorted(map(int, first["metrics"])) == [2, 4, 6]
    names = ("entropy", "seq_rep_4", "distinct_2", "high_frequency_share", "end_rate")
    expected = {f"probe/{decoding}/{name}" for decoding in ("sample", "greedy") for name in names}
    for metrics in first["metrics"].values():
        assert set(metrics) == expected
        assert all(isinstance(value, float) for value in metrics.values())


def test_samples_on_disk(two_ranks):
    _, _, out = two_ranks
    samples = out / "llama" / "samples"
    assert sorted(p.name for p in samples.iterdir()) == [f"step-0000000{n}.jsonl" for n in (2, 4, 6)]
    rows = [json.loads(line) for line in (samples / "step-00000006.jsonl").read_text().splitlines()]
    keys = [(row["decoding"], row["prompt_index"]) for row in rows]
    assert keys == [(decoding, index) for decoding in ("greedy", "sample") for index in range(7)]
    assert rows[3]["prompt"] == " ".join(map(str, rows[3]["prompt_ids"])) and len(rows[3]["prompt_ids"]) == 2
    assert {row["step"] for row in rows} == {6}


def test_a_limit_skips_the_probe_with_one_warning(two_ranks):
    results, done, _ = two_ranks
    assert results["llama"][0]["limited"] == [{}, {}]
    assert results["llama_stage2"][0]["limited"] != [{}, {}]  # nothing to gather: no limit
    assert (done.stdout + done.stderr).count("probe skipped") == len(ZERO3)  # once per probe, rank 0 only


def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_no_trace(two_ranks):
    for rank in two_ranks[0]["llama"]:
        message, disturbed = rank["failed"]
        assert "rank 1" in message and "out of luck" in message
        assert disturbed == []


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_ranks(two_ranks, run_ranks, tmp_path):
    # The trained weights do depend on it, so compare an untrained engine: the first probe of a frozen training.
    launch(run_ranks, tmp_path, ["llama_frozen"], ranks=1)
    (tmp_path / "two").mkdir()
    launch(run_ranks, tmp_path / "two", ["llama_frozen"], ranks=2)
    one, two = (path / "llama_frozen" / "samples" / "step-00000006.jsonl" for path in (tmp_path, tmp_path / "two"))
    ids = [[json.loads(line)["completion_ids"] for line in path.read_text().splitlines()] for path in (one, two)]
    assert ids[0] == ids[1]
    assert len({tuple(i) for i in ids[0]}) > 7
