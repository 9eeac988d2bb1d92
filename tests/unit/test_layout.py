"""Re-slicing: from any number of ranks, at any stage, to any other, every element of every parameter is found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ds_stability import layout
from ds_stability.checkpoint import MEAN, load_slices, save_slices
from ds_stability.errors import StabilityConfigError
from ds_stability.layout import Piece, clear_padding, overlap, ranged_pieces, sliced_pieces

NUMELS = st.lists(st.integers(1, 23), min_size=1, max_size=7)
RANKS = st.integers(1, 6)


def one_group(totals, rank, ranks):
    """Rank `rank`'s pieces of ZeRO-3 where all parameters (name -> numel) are cut over the same ranks."""
    return sliced_pieces((name, total, rank, ranks) for name, total in totals.items())


def whole_of(totals):
    """name -> a distinct value for every element of every parameter."""
    first, values = 1.0, {}
    for name, total in totals.items():
        values[name] = torch.arange(first, first + total)
        first += total
    return values


def sliced(totals, ranks):
    """[(pieces, numel of the partition)] of every rank, as ZeRO-3 cuts."""
    size = sum(-(-total // ranks) for total in totals.values())
    return [(one_group(totals, rank, ranks), size) for rank in range(ranks)]


def ranged(totals, ranks, alignment=2):
    """As stages 1 and 2 cut: one line, padded so that the ranks get equal parts."""
    places, end = {}, 0
    for name, total in totals.items():
        places[name], end = (end, total), end + total
    size = -(-end // (ranks * alignment)) * alignment
    return [(ranged_pieces(places, rank * size, size), size) for rank in range(ranks)]


def by_hand_sliced(values, rank, ranks):
    """Brute force: pad each parameter with zeros to a multiple of the ranks, take slice `rank`, one behind the other."""
    parts = []
    for value in values.values():
        padded = torch.cat([value, torch.zeros(-len(value) % ranks)])
        parts.append(padded.chunk(ranks)[rank])
    return torch.cat(parts)


def by_hand_ranged(values, rank, ranks, alignment=2):
    line = torch.cat(list(values.values()))
    padded = torch.cat([line, torch.zeros(-len(line) % (ranks * alignment))])
    return padded.view(ranks, -1)[rank]


def filled(values, pieces, size):
    tensor = torch.zeros(size)
    for piece in pieces:
        assert piece.total == len(values[piece.name]) and piece.numel > 0
        tensor[piece.offset : piece.offset + piece.numel] = values[piece.name][piece.start : piece.start + piece.numel]
    return tensor


@settings(max_examples=200, deadline=None)
@given(NUMELS, RANKS)
def test_pieces_are_what_brute_force_cuts(numels, ranks):
    totals = {f"p{index}": numel for index, numel in enumerate(numels)}
    values = whole_of(totals)
    for cut, by_hand in ((sliced, by_hand_sliced), (ranged, by_hand_ranged)):
        for rank, (pieces, size) in enumerate(cut(totals, ranks)):
            assert torch.equal(filled(values, pieces, size), by_hand(values, rank, ranks)), cut.__name__


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9))
def test_overlap_is_the_intersection(start, numel, other_start, other_numel):
    piece = Piece("p", start, 0, numel, 40)
    shared = sorted(set(range(start, start + numel)) & set(range(other_start, other_start + other_numel)))
    found = overlap(piece, other_start, other_numel)
    assert (list(range(*found)) if found else []) == shared


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMELS, min_size=1, max_size=3), RANKS, RANKS, st.booleans(), st.booleans())
def test_saved_by_some_ranks_and_loaded_by_others(tmp_path_factory, groups, old, new, old_is_sliced, new_is_sliced):
    folder = tmp_path_factory.mktemp("slices")
    totals = [{f"g{g}.p{index}": numel for index, numel in enumerate(numels)} for g, numels in enumerate(groups)]
    values = [whole_of(group) for group in totals]
    writers = [(sliced if old_is_sliced else ranged)(group, old) for group in totals]
    for rank in range(old):
        tensors = {g: filled(values[g], *writer[rank]) for g, writer in enumerate(writers)}
        save_slices(folder, {MEAN: tensors}, [writer[rank][0] for writer in writers], rank, old)
    readers = [(sliced if new_is_sliced else ranged)(group, new) for group in totals]
    for rank in range(new):
        tensors = [torch.zeros(reader[rank][1]) for reader in readers]
        load_slices(folder, MEAN, tensors, [reader[rank][0] for reader in readers], rank)
        for g, tensor in enumerate(tensors):
            assert torch.equal(tensor, filled(values[g], *readers[g][rank]))


@pytest.fixture
def two_ranks(tmp_path):
    totals = {"a": 5, "b": 4}
    for rank, (pieces, size) in enumerate(sliced(totals, 2)):
        save_slices(tmp_path, {MEAN: {0: filled(whole_of(totals), pieces, size)}}, [pieces], rank, 2)
    return tmp_path, one_group(totals, 0, 1)


def test_the_same_rank_reads_its_own_file_only(two_ranks):
    folder, _ = two_ranks
    (folder / "ds_stability_rank_00000.safetensors").write_bytes(b"torn")
    tensor = torch.zeros(5)
    load_slices(folder, MEAN, [tensor], [one_group({"a": 5, "b": 4}, 1, 2)], rank=1)
    assert tensor.tolist() == [4.0, 5.0, 0.0, 8.0, 9.0]


def test_padding_is_not_stored(two_ranks):
    with safe_open(two_ranks[0] / "ds_stability_rank_00001.safetensors", framework="pt") as stored:
        assert stored.get_tensor("mean/a").tolist() == [4.0, 5.0]


def test_a_missing_rank_is_named(two_ranks):
    folder, pieces = two_ranks
    (folder / "ds_stability_rank_00001.safetensors").unlink()
    with pytest.raises(StabilityConfigError, match="lacks 4 elements of the gradient's running mean"):
        load_slices(folder, MEAN, [torch.zeros(9)], [pieces], rank=0)


def test_another_model_is_refused(two_ranks):
    with pytest.raises(StabilityConfigError, match="a had 5 elements, this model's has 6"):
        load_slices(two_ranks[0], MEAN, [torch.zeros(10)], [one_group({"a": 6, "b": 4}, 0, 1)], rank=0)


class Expert(torch.nn.Parameter):
    """A parameter as ZeRO-3 leaves it: `width` of its `ds_numel` elements on each rank of its own group, (rank, ranks)."""

    def __new__(cls, ds_numel, width, group):
        parameter = super().__new__(cls, torch.zeros(0))
        parameter.ds_numel, parameter.ds_process_group, parameter.partition_numel = ds_numel, group, lambda: width
        return parameter


@pytest.fixture
def groups(monkeypatch):
    """A process group is (rank, ranks)."""
    monkeypatch.setattr(layout.dist, "get_rank", lambda group: group[0])
    monkeypatch.setattr(layout.dist, "get_world_size", lambda group: group[1])


def test_a_parameter_is_cut_over_its_own_group(groups):
    """By the optimizer's group of four, half of an expert that only two ranks share counted as padding, and was zeroed."""
    expert, shared = Expert(10, 5, (1, 2)), Expert(10, 3, (3, 4))
    names, partition = {expert: "expert", shared: "shared"}, torch.ones(8)
    pieces = layout._slices_of_group(names, [expert, shared], partition)
    assert pieces == [Piece("expert", 5, 0, 5, 10), Piece("shared", 9, 5, 1, 10)]
    clear_padding([partition], [pieces])
    assert partition.tolist() == [1.0] * 6 + [0.0] * 2


@pytest.mark.parametrize("width, size", [(3, 3), (5, 4), (5, 6), (4, 4)])
def test_slices_that_do_not_cover_the_partition_are_refused(groups, width, size):
    parameter = Expert(10, width, (0, 2))
    with pytest.raises(StabilityConfigError, match="does not understand"):
        layout._slices_of_group({parameter: "w"}, [parameter], torch.ones(size))


def test_padding_is_cleared_and_nothing_else():
    pieces = one_group({"a": 5, "b": 1, "c": 3}, 1, 2)  # slices of 3, 1 and 2 elements: 2, 0 and 1 of them real
    tensor = torch.full((6,), torch.nan)
    tensor[:2], tensor[4:5] = 1.0, 2.0
    clear_padding([tensor], [pieces])
    assert tensor.tolist() == [1.0, 1.0, 0.0, 0.0, 2.0, 0.0]
