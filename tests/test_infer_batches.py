import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.batches import Batches, TrainingData


def values_of(batches):
    """All data of a pass, argument by argument."""
    rows = [[*batch.args, *batch.kwargs.values()] for batch in batches]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


class Pairs(Dataset):
    """Neither tensors nor a loader: items one by one."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        return {"x": self.x[place], "y": self.y[place]}


class TestBatches:
    def test_each_datum_once_per_pass_in_a_new_order(self):
        for data in (torch.arange(10), Subset(TensorDataset(torch.arange(12)), range(10))):
            batches = Batches(data, 4, shuffle=True)
            first, second = ([batch.args[0] for batch in batches] for _ in range(2))
            assert [len(batch) for batch in first] == [4, 4, 2]
            assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(10))
            assert torch.cat(first).tolist() != torch.cat(second).tolist()
            assert len(batches) == 3

    def test_the_order_can_be_continued(self):
        batches = Batches(torch.arange(10), 4, shuffle=True)
        list(batches)
        state = batches.state()
        expected = [batch.args[0] for batch in batches]
        batches.load(state)
        assert all(torch.equal(a, b.args[0]) for a, b in zip(expected, batches, strict=True))
        batches.load(state)
        batches.first()
        assert torch.equal(next(iter(batches)).args[0], expected[0])

    def test_all_kinds_of_data_agree(self):
        x, y = torch.arange(6.0), torch.arange(12.0).reshape(6, 2)
        kinds = [
            [x, y],
            (x, y),
            (x.numpy(), y.numpy()),
            {"x": x, "y": y},
            {"x": x.numpy(), "y": y},
            TensorDataset(x, y),
            Subset(TensorDataset(x, y), range(6)),
            Pairs(x, y),
            DataLoader(TensorDataset(x, y), batch_size=4),
            [(x[:4], y[:4]), (x[4:], y[4:])],
            [(x[:4].numpy(), y[:4].numpy()), (x[4:].numpy(), y[4:].numpy())],
        ]
        for data in kinds:
            batches = list(Batches(data, 4))
            assert [batch.size for batch in batches] == [4, 2]
            first, second = values_of(batches)
            assert torch.equal(first, x)
            assert torch.equal(second, y)
        for data in ({"x": x, "y": y}, Pairs(x, y), [{"x": x, "y": y}]):
            assert list(next(iter(Batches(data, 10))).kwargs) == ["x", "y"]

    def test_a_loader_with_its_own_generator_is_not_moved(self):
        loader = DataLoader(
            torch.arange(8), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
        )
        batches = Batches(loader, 100)
        state = batches.state()
        batches.first()
        expected = [batch.args[0] for batch in batches]
        batches.load(state)
        assert all(torch.equal(a, b.args[0]) for a, b in zip(expected, batches, strict=True))

    def test_no_data(self):
        assert [batch.size for batch in Batches(None, 100)] == [1]
        assert len(Batches(2, 100)) == len(list(Batches(2, 100))) == 2

    def test_batches_without_tensors(self):
        with pytest.raises(GraphflowsError, match="hold a tensor whose first dimension counts"):
            list(Batches([["a"], ["b"]], 4))
        with pytest.raises(GraphflowsError, match="at least one batch"):
            Batches(DataLoader(TensorDataset(torch.zeros(0))), 4).first()


class TestTrainingData:
    def test_what_it_says(self):
        x = torch.zeros(6)
        assert repr(TrainingData(x)) == "TrainingData(1 tensor with 6 data, batch_size=100)"
        named = TrainingData({"x": x, "y": x}, batch_size=2, full_size=60, kwargs={"scale": 2.0})
        assert repr(named) == (
            "TrainingData(2 tensors (x, y) with 6 data, batch_size=2, full_size=60, kwargs of scale)"
        )
        assert repr(TrainingData(validation=3)) == "TrainingData(no data, validation=3 calls)"
        assert repr(TrainingData(Pairs(x, x))) == "TrainingData(a Pairs of 6 data, batch_size=100)"
        assert repr(TrainingData(DataLoader(x))) == "TrainingData(a DataLoader)"
        assert TrainingData.of(named) is named

    def test_arrays_take_the_default_dtype(self):
        floats = np.linspace(0, 1, 5)
        assert TrainingData(floats).data.dtype == torch.get_default_dtype()
        assert TrainingData(floats[::-1]).data.tolist() == pytest.approx(floats[::-1].tolist())
        assert TrainingData(np.arange(5)).data.dtype == torch.int64
        assert TrainingData(np.arange(5) > 2).data.dtype == torch.bool
        assert TrainingData(torch.zeros(5, dtype=torch.float16)).data.dtype == torch.float16  # as it is given
        frozen = np.zeros(3)
        frozen.flags.writeable = False
        assert (
            TrainingData(frozen.astype(">f8")).data.tolist()
            == TrainingData(frozen).data.tolist()
            == [0.0] * 3
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([torch.zeros(3), torch.zeros(4)], r"same positive number of data .* \[\(3,\), \(4,\)\]"),
            (torch.zeros(0), "same positive number of data"),
            (torch.zeros(()), "same positive number of data"),
            ((torch.zeros(3), 5), r"got int at 1. Arguments that are the same .* kwargs="),
            ({"x": torch.zeros(3), "n": "a"}, "got str at 'n'"),
            (iter([torch.zeros(3)]), "An iterator runs dry"),
            (3.0, "Expected data to be a tensor, an array"),
            ("x", "Give its columns"),
            ([1.0, 2.0], "Give tensors or arrays"),
            (np.array(["a", "b"]), "array of numbers; got one of dtype <U1"),
        ],
    )
    def test_other_kinds_are_refused(self, data, message):
        with pytest.raises(GraphflowsError, match=message):
            TrainingData(data)
        if data is not None and not isinstance(data, int):
            with pytest.raises(GraphflowsError):
                TrainingData(torch.zeros(3), validation=data)

    def test_data_frames_are_refused(self):
        frame = pytest.importorskip("pandas").DataFrame({"x": [1.0, 2.0]})
        with pytest.raises(GraphflowsError, match=r"got DataFrame\. Give its columns as tensors or arrays"):
            TrainingData(frame)

    def test_datasets_without_a_length_are_refused(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([torch.zeros(3)])

        with pytest.raises(GraphflowsError, match="IterableDataset, which has no batches"):
            TrainingData(Stream())
        with pytest.raises(GraphflowsError, match="a Dataset with a positive length"):
            TrainingData(Pairs(torch.zeros(0), torch.zeros(0)))

    def test_options_without_effect_are_refused(self):
        for data in (None, DataLoader(torch.zeros(4))):
            with pytest.raises(GraphflowsError, match="Expected no batch_size with"):
                TrainingData(data, batch_size=10)
        assert TrainingData(DataLoader(torch.zeros(4)), batch_size=2, validation=torch.zeros(4)).held_out()
        with pytest.raises(GraphflowsError, match="Expected validation data of the kind of data; got 3"):
            TrainingData(torch.zeros(4), validation=3)
        for option in ({"batch_size": 0}, {"full_size": -1}, {"batch_size": 2.5}):
            with pytest.raises(GraphflowsError, match="Expected a positive"):
                TrainingData(torch.zeros(4), **option)
