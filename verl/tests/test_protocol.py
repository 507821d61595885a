"""DataProto: what goes in comes out, whatever is cut, stacked, repeated or sent."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl import DataProto
from verl.protocol import object_array


def make_batch(rows: int, offset: int = 0) -> DataProto:
    ids = torch.arange(rows * 3).view(rows, 3) + offset
    return DataProto.from_dict(
        {
            "ids": ids,
            "half": ids.to(torch.bfloat16),
            "mask": ids % 2 == 0,
            "text": object_array([[i] for i in range(rows)]),
        },
        meta_info={"temperature": 0.5},
    )


def assert_same(a: DataProto, b: DataProto) -> None:
    assert len(a) == len(b)
    assert set(a.batch.keys()) == set(b.batch.keys())
    for key in a.batch.keys():  # noqa: SIM118
        assert a.batch[key].dtype == b.batch[key].dtype
        assert torch.equal(a.batch[key], b.batch[key])
    assert {k: v.tolist() for k, v in a.non_tensor_batch.items()} == {
        k: v.tolist() for k, v in b.non_tensor_batch.items()
    }
    assert a.meta_info == b.meta_info


@given(st.integers(1, 6), st.integers(1, 5))
def test_chunk_and_concat_are_inverse(chunks: int, size: int):
    batch = make_batch(chunks * size)
    parts = batch.chunk(chunks)
    assert [len(part) for part in parts] == [size] * chunks
    assert_same(DataProto.concat(parts), batch)


def test_batches_with_and_without_tensors_are_not_stacked():
    with pytest.raises((KeyError, RuntimeError)):
        DataProto.concat([make_batch(2), DataProto.from_dict({"text": ["a", "b"]})])


@given(st.integers(1, 12), st.integers(0, 20))
def test_padding_repeats_the_first_rows(rows: int, padding: int):
    batch = make_batch(rows)
    padded = batch.padded(padding)
    assert_same(padded[:rows], batch)
    assert padded.batch["ids"][rows:, 0].tolist() == [3 * (i % rows) for i in range(rows, rows + padding)]


@given(st.integers(1, 5), st.integers(1, 4))
def test_repeat(rows: int, times: int):
    batch = make_batch(rows)
    repeated = batch.repeat(times)
    assert repeated.batch["ids"][:, 0].tolist() == [3 * i for i in range(rows) for _ in range(times)]
    assert repeated.non_tensor_batch["text"].tolist() == [[i] for i in range(rows) for _ in range(times)]


def test_indexing():
    batch = make_batch(4)
    for index in (slice(1, 3), [1, 2], np.array([1, 2]), torch.tensor([False, True, True, False])):
        assert batch[index].batch["ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
        assert batch[index].non_tensor_batch["text"].tolist() == [[1], [2]]
        assert batch[index].meta_info == batch.meta_info


def test_select():
    batch = make_batch(3).select(["ids"], [])
    assert set(batch.batch.keys()) == {"ids"} and batch.non_tensor_batch == {} and len(batch) == 3
    assert batch.meta_info == {"temperature": 0.5}
    assert_same(make_batch(3).select(["ids", "half", "mask"], ["text"]), make_batch(3))


def test_union_adds_columns_and_refuses_contradictions():
    batch = make_batch(3)
    batch.union(DataProto.from_dict({"new": torch.zeros(3)}, meta_info={"step": 1}))
    assert batch.meta_info == {"temperature": 0.5, "step": 1} and batch.batch["new"].shape == (3,)
    batch.union(make_batch(3))
    with pytest.raises(ValueError, match="'ids'"):
        batch.union(make_batch(3, offset=1))
    with pytest.raises(ValueError, match="3 and 2 rows"):
        batch.union(make_batch(2))


def test_travels_unchanged():
    batch = make_batch(5)[1:4]
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_a_slice_is_sent_without_the_rest():
    batch = DataProto.from_dict({"x": torch.zeros(1000, 100)})
    assert len(pickle.dumps(batch[:1])) < 2000


def test_without_tensors_or_rows():
    texts = DataProto.from_dict({"text": ["a", "b"]})
    assert len(texts) == 2 and texts.chunk(2)[1].non_tensor_batch["text"].tolist() == ["b"]
    assert len(pickle.loads(pickle.dumps(texts)).repeat(2)) == 4
    assert len(DataProto(meta_info={"metrics": {}})) == 0


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        DataProto.from_dict({"a": torch.zeros(2), "b": [1, 2, 3]})
