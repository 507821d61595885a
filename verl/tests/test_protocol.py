"""DataProto: what goes in comes out, whatever is cut, stacked, repeated or sent."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl import DataProto
from verl.protocol import object_array, pad_dataproto_to_divisor, unpad_dataproto


def make_batch(rows: int, offset: int = 0) -> DataProto:
    ids = torch.arange(rows * 3).view(rows, 3) + offset
    return DataProto.from_single_dict(
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


@given(st.integers(1, 12), st.integers(1, 7))
def test_padding_comes_off_again(rows: int, divisor: int):
    batch = make_batch(rows)
    padded, pad_size = pad_dataproto_to_divisor(batch, divisor)
    assert len(padded) % divisor == 0 and pad_size < divisor
    assert_same(unpad_dataproto(padded, pad_size), batch)


@given(st.integers(1, 5), st.integers(1, 4))
def test_repeat(rows: int, times: int):
    batch = make_batch(rows)
    assert batch.repeat(times).batch["ids"][:, 0].tolist() == [3 * i for i in range(rows) for _ in range(times)]
    assert batch.repeat(times, interleave=False).non_tensor_batch["text"].tolist() == [[i] for i in range(rows)] * times


@given(st.permutations(range(6)))
def test_reorder(order: list[int]):
    batch = make_batch(6)
    batch.reorder(torch.tensor(order))
    assert batch.batch["ids"][:, 0].tolist() == [3 * i for i in order]
    assert batch.non_tensor_batch["text"].tolist() == [[i] for i in order]


def test_indexing():
    batch = make_batch(4)
    assert batch[1].non_tensor_batch["text"] == [1]
    assert batch[1].batch["ids"].tolist() == [3, 4, 5]
    for index in (slice(1, 3), [1, 2], np.array([1, 2]), torch.tensor([False, True, True, False])):
        assert_same(batch[index], batch.slice(1, 3))


def test_select_pop_rename():
    batch = make_batch(3)
    assert set(batch.select(["ids"], []).batch.keys()) == {"ids"}
    popped = batch.pop(["ids"], ["text"], ["temperature"])
    assert set(popped.batch.keys()) == {"ids"} and popped.non_tensor_batch["text"].tolist() == [[0], [1], [2]]
    assert batch.meta_info == {} and batch.non_tensor_batch == {} and "ids" not in batch.batch.keys()  # noqa: SIM118
    assert set(batch.rename("half", "whole").batch.keys()) == {"whole", "mask"}


def test_union_adds_columns_and_refuses_contradictions():
    batch = make_batch(3)
    batch.union(DataProto.from_dict({"new": torch.zeros(3)}, meta_info={"step": 1}))
    assert batch.meta_info == {"temperature": 0.5, "step": 1} and batch.batch["new"].shape == (3,)
    batch.union(make_batch(3))
    with pytest.raises(ValueError, match="'ids'"):
        batch.union(make_batch(3, offset=1))
    with pytest.raises(ValueError, match="3 and 2 rows"):
        batch.union(make_batch(2))


@pytest.mark.parametrize("copy", ["pickle", "disk"])
def test_travels_unchanged(copy: str, tmp_path):
    batch = make_batch(5).slice(1, 4)
    if copy == "disk":
        batch.save_to_disk(tmp_path / "batch.pkl")
        assert_same(DataProto.load_from_disk(tmp_path / "batch.pkl"), batch)
    else:
        assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_a_slice_is_sent_without_the_rest():
    batch = DataProto.from_dict({"x": torch.zeros(1000, 100)})
    assert len(pickle.dumps(batch.slice(0, 1))) < 2000


def test_without_tensors_or_rows():
    texts = DataProto.from_dict(non_tensors={"text": ["a", "b"]})
    assert len(texts) == 2 and texts.chunk(2)[1].non_tensor_batch["text"].tolist() == ["b"]
    assert len(pickle.loads(pickle.dumps(texts)).repeat(2)) == 4
    assert len(DataProto(meta_info={"metrics": {}})) == 0


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        DataProto.from_dict({"a": torch.zeros(2)}, {"b": [1, 2, 3]})


def test_mini_batches_cover_all_rows_each_epoch():
    seen = [part.batch["ids"][:, 0].tolist() for part in make_batch(4).make_iterator(2, epochs=2, seed=0, shuffle=True)]
    assert len(seen) == 4
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="do not divide"):
        next(make_batch(3).make_iterator(2))
