import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from icae import ICAEMemory
from tiny import make_base


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
    with pytest.raises(ValueError, match="Expected at least one row of the 4, got none"):
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


def test_spans_are_chosen_by_masks_as_rows_are(memory):
    row = memory[0]
    for mask in ([True, False, True], torch.tensor([True, False, True]), np.array([True, False, True])):
        assert same(row.select_spans(mask), row.select_spans([0, 2]))
    assert same(row.select_spans(np.array([2])), row.select_spans([2]))
    assert same(memory[np.array([2, 0])], memory[[2, 0]])
    with pytest.raises(ValueError, match="Expected a mask of 3 booleans, one per span, got 2"):
        row.select_spans([True, False])


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
    with pytest.raises(ValueError, match="Expected at least one span of the 3, got none"):
        memory.select_spans(slice(5, 6))


def test_every_flipped_byte_is_noticed(memory, tmp_path):
    """Not only in the slots: positions, spans, fingerprint and header are all covered by the digest or the format."""
    path = tmp_path / "memory.safetensors"
    memory[1].save(path)
    content = path.read_bytes()
    for place in [*range(0, 600, 7), *range(600, len(content), max(1, len(content) // 60))]:
        flipped = bytearray(content)
        flipped[place % len(content)] ^= 0x11
        path.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match="truncated, was changed or is not an ICAE memory file"):
            ICAEMemory.load(path)


def test_every_truncation_is_noticed(memory, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory[1].save(path)
    content = path.read_bytes()
    for length in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated, was changed or is not an ICAE memory file"):
            ICAEMemory.load(path)


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        ICAEMemory.load(tmp_path / "nothing.safetensors")


def test_a_loaded_memory_reads_as_the_one_that_was_saved(model, memory, tmp_path):
    memory.save(tmp_path / "memory.safetensors")
    loaded = ICAEMemory.load(tmp_path / "memory.safetensors")
    assert torch.equal(loaded.mask, memory.mask) and torch.equal(loaded.end, memory.end)
    assert isinstance(loaded.spans[0][0], tuple)
    options = {"task": "autoencoding", "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(model.generate(memory=loaded, **options), model.generate(memory=memory, **options))


def test_parts_compressed_apart_and_joined_equal_the_whole(make_icae, ragged):
    """Slots of the type `hidden_states` carry no position; at a border of spans, cutting a text changes nothing."""
    model = make_icae(memory_type="hidden_states")
    whole = model.compress(ragged[0])
    joined = ICAEMemory.concat([model.compress(ragged[0][:, :16]), model.compress(ragged[0][:, 16:])])
    assert joined.spans == whole.spans and torch.equal(joined.positions, whole.positions)
    torch.testing.assert_close(joined.slots, whole.slots, atol=2e-5, rtol=1e-4)


def test_joining_the_spans_gives_the_row_back(make_icae, ragged):
    memory = make_icae(memory_type="key_values").compress(*ragged)[0]
    assert same(ICAEMemory.concat([memory.select_spans([span]) for span in range(3)]), memory)


def test_spans_can_be_reordered_and_repeated(memory):
    chosen = memory[0].select_spans([2, 0, 2])
    slots = memory.slots[0]
    assert chosen.spans == [[(2, 8), (4, 16), (2, 8)]]
    assert torch.equal(chosen.slots[0], torch.cat([slots[8:10], slots[:4], slots[8:10]]))
    with pytest.raises(IndexError):
        memory[0].select_spans([3])


def test_a_moved_memory_is_another_object(memory):
    moved = memory.to(torch.bfloat16)
    assert memory.slots.dtype == torch.float32 and moved.slots.dtype == torch.bfloat16
    assert moved.positions.dtype == torch.long and moved.fingerprint == memory.fingerprint
    assert same(memory.to("cpu"), memory)


def test_taking_rows_does_not_share_their_order_of_spans(memory):
    one = memory[[1, 1]]
    assert len(one) == 2 and one.spans == [[(2, 8)], [(2, 8)]] and torch.equal(one.slots[0], one.slots[1])


def test_a_memory_that_is_read_stays_as_it_is(model, memory):
    before = memory.slots.clone()
    model.generate(memory=memory, task="autoencoding", max_new_tokens=3)
    model(memory=memory, continuation_ids=torch.full((4, 3), 7), autoencoding_weight=0)
    assert torch.equal(memory.slots, before)


def test_a_mask_chooses_rows_or_is_refused(memory):
    pair = memory[[0, 1]]
    for mask in ([True, True], torch.tensor([True, True])):
        try:
            chosen = pair[mask]
        except (TypeError, ValueError):
            continue
        assert same(chosen, pair)


@pytest.mark.parametrize("memory_type", ["key_values", "hidden_states"])
def test_a_float32_memory_can_be_read_by_a_bfloat16_model(make_icae, ragged, memory_type):
    model = make_icae(base=make_base().bfloat16(), memory_type=memory_type)
    memory = model.compress(*ragged)
    options = {"task": "autoencoding", "do_sample": False, "max_new_tokens": 6}
    found = model.generate(memory=memory.to(torch.float32), **options)
    assert torch.equal(found, model.generate(memory=memory, **options))


def test_stacking_rounds_nothing(memory):
    """A memory that was stored in bfloat16 may stand before others in a batch."""
    first, second = memory[[0]].to(torch.bfloat16), memory[[1]]
    for stacked in (ICAEMemory.stack([first, second]), ICAEMemory.stack([second, first])):
        assert stacked.slots.dtype == torch.float32
        row = next(row for row in stacked.rows() if row.spans == second.spans)
        assert torch.equal(row.slots, second.slots)


def test_a_memory_made_with_dropout_is_read_in_train_mode_only(make_icae):
    model = make_icae(lora_dropout=0.5).train()
    text = list(range(10, 40))
    first, second = model.compress(text), model.compress(text)
    assert not torch.equal(first.slots, second.slots)
    model.eval()
    with pytest.raises(ValueError, match="none: it was made in train mode"):
        model.reconstruct(first)
    assert make_icae().train().compress(text).fingerprint  # without dropout, slots are the same every time


def test_memories_on_two_devices_are_joined_where_the_first_is(make_icae):
    memory = make_icae().compress("A text.")
    assert ICAEMemory.concat([memory.to("meta"), memory]).slots.device.type == "meta"
