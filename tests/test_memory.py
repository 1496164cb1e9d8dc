import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from icae import ICAEMemory


@pytest.fixture(params=["key_values", "hidden_states"])
def model(request, make_icae):
    return make_icae(memory_type=request.param)


@pytest.fixture
def memory(model, ragged):
    return model.compress(*ragged)


def same(left, right):
    return (
        torch.equal(left.slots, right.slots)
        and torch.equal(left.positions, right.positions)
        and left.spans == right.spans
        and left.fingerprint == right.fingerprint
        and left.memory_type == right.memory_type
    )


def test_rows_can_be_taken_by_number_slice_list_and_tensor(memory):
    assert len(memory) == 4 and len(memory[1]) == 1 and len(memory[1:]) == 3
    assert same(memory[-1], memory[3]) and same(memory[[2, 0]][0], memory[2])
    assert same(memory[torch.tensor([2, 0])], memory[[2, 0]])
    assert memory[1].slots.shape[1] == 2, "a row alone has no padding"
    with pytest.raises(IndexError):
        memory[4]
    with pytest.raises(ValueError, match="Expected at least one row of this memory of 4 rows, got none"):
        memory[4:]


def test_iterating_gives_the_rows(memory):
    assert [len(row) for row in memory.rows()] == [1, 1, 1, 1]


def test_stacking_the_rows_gives_the_memory_back(memory):
    assert same(ICAEMemory.stack(memory.rows()), memory)


def test_spans_can_be_selected(memory):
    first = memory.select_spans(slice(0, 1))
    assert first.spans == [[(4, 16)], [(2, 8)], [(4, 16)], [(4, 16)]]
    assert torch.equal(first.slots[0], memory.slots[0, :4])
    last = memory[0].select_spans([2])
    assert torch.equal(last.slots[0], memory.slots[0, 8:10])
    assert last.positions[0].tolist() == memory.positions[0, 8:10].tolist()


def test_joined_rows_follow_one_another(model, memory):
    joined = ICAEMemory.concat([memory, memory[[1, 2, 3, 0]]])
    assert joined.num_tokens.tolist() == [48, 25, 47, 70]
    assert torch.equal(joined.slots[0, :12], torch.cat([memory.slots[0, :10], memory.slots[1, :2]]))
    second = joined.positions[0, 10:12].tolist()
    assert second == ([44, 48] if model.config.memory_type == "hidden_states" else [4, 8])


def test_bytes_count_slots_without_padding(memory):
    assert memory.nbytes == 25 * memory.slots.shape[2] * 4
    assert memory.to(torch.bfloat16).nbytes == memory.nbytes // 2


def test_a_memory_is_four_times_smaller_than_the_cache_of_its_text(make_icae, ragged):
    model = make_icae(memory_type="key_values")
    memory = model.compress(ragged[0])
    cache = model.language_model(ragged[0], use_cache=True).past_key_values
    full = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    assert memory.nbytes == full // 4


def test_saving_and_loading_is_bit_exact(model, memory, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        memory.to(dtype).save(tmp_path / "memory.safetensors")
        assert same(ICAEMemory.load(tmp_path / "memory.safetensors"), memory.to(dtype))


def rewrite(path, change):
    """Changes the tensors or the metadata of a memory file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def other_slot(path):
    rewrite(path, lambda tensors, metadata: tensors["slots"].add_(1))


def other_fingerprint(path):
    def change(tensors, metadata):
        metadata["content"] = json.dumps(json.loads(metadata["content"]) | {"fingerprint": "0" * 16})

    rewrite(path, change)


def no_metadata(path):
    rewrite(path, lambda tensors, metadata: metadata.clear())


@pytest.mark.parametrize("damage", [truncate, empty, other_slot, other_fingerprint, no_metadata])
def test_a_damaged_file_is_refused(memory, tmp_path, damage):
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    damage(path)
    with pytest.raises(ValueError, match="truncated, was changed or is not an ICAE memory file"):
        ICAEMemory.load(path)


def test_saved_nan_is_refused(memory, tmp_path):
    memory.slots[1, 1, 0] = float("nan")
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"got NaN or infinity in 1 slots \(first: row 1, slot 1\)"):
        ICAEMemory.load(tmp_path / "memory.safetensors")


def test_nan_in_the_padding_is_nobody_s_business(memory):
    memory.slots[1, 5] = float("nan")
    memory.check_finite()


def test_memories_of_two_models_do_not_join(memory):
    other = memory[0]
    other.fingerprint = "another"
    for join in (ICAEMemory.stack, ICAEMemory.concat):
        with pytest.raises(ValueError, match="Expected memories of one model, got memories of 2 models"):
            join([memory[0], other])
        with pytest.raises(ValueError, match="Expected at least one memory to join"):
            join([])


def test_memories_with_other_numbers_of_rows_do_not_join(memory):
    with pytest.raises(ValueError, match=r"Expected memories with the same number of rows, got \[4, 1\]"):
        ICAEMemory.concat([memory, memory[0]])


def test_parts_that_contradict_each_other_are_refused(memory):
    with pytest.raises(ValueError, match="Expected `spans` to describe 4 rows of up to 10 slots"):
        ICAEMemory(memory.slots, memory.positions, [[(4, 16)]], "", "key_values")
    with pytest.raises(ValueError, match="Expected `slots` of shape"):
        ICAEMemory(memory.slots[0], memory.positions, memory.spans, "", "key_values")
    with pytest.raises(ValueError, match="Expected `index` to choose spans of a row of 3 spans, got none"):
        memory.select_spans(slice(5, 6))
