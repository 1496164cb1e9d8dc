"""Contexts that grow, that are several, and that are longer than what the base has positions for."""

import pytest
import torch

from icae import ICAEMemory


GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(5, 100, (2, 80), generator=GENERATOR).tolist()
LAYOUTS = [
    {"memory_type": memory, "encoder_layout": layout, "decoder_layout": layout}
    for memory in ("key_values", "hidden_states")
    for layout in ("uniform", "sequential")
]


def same(left: ICAEMemory, right: ICAEMemory) -> None:
    assert left.spans == right.spans
    assert torch.equal(left.positions, right.positions)
    torch.testing.assert_close(left.slots, right.slots, atol=1e-5, rtol=1e-4)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: "-".join([layout["memory_type"], layout["encoder_layout"]]))
def model(make_icae, request):
    return make_icae(**request.param)


def test_a_memory_extended_after_a_whole_span_is_that_of_the_whole_text(model):
    memory = model.compress([IDS[0][:32], IDS[1][:48]])
    before = memory.slots.clone()
    extended = model.extend(memory, [IDS[0][32:70], IDS[1][48:51]])
    same(extended, model.compress([IDS[0][:70], IDS[1][:51]]))
    assert torch.equal(memory.slots, before)


def test_text_added_in_the_middle_of_a_span_starts_a_new_one_behind_it(model):
    extended = model.extend(model.compress([IDS[0][:20]]), [IDS[0][20:40]])
    assert extended.spans == [[(4, 16), (1, 4), (4, 16), (1, 4)]]
    same(extended, model.compress([[IDS[0][:20], IDS[0][20:40]]]))  # as several contexts of one row do
    assert (extended.positions[0].diff() > 0).all()


def test_a_chat_history_grows_turn_by_turn(model):
    memory = model.compress("The cat sat.")
    for turn in ("The dog came.", "Both slept."):
        memory = model.extend(memory, turn)
    assert len(memory.spans[0]) == 3
    assert model.generate(memory=memory, prompt="Who?", max_new_tokens=3).shape == (1, 3)


def test_a_memory_is_extended_by_one_text_per_row(model):
    with pytest.raises(ValueError, match=r"Expected one text per row of the memory \(1\), got 2"):
        model.extend(model.compress("one"), ["two", "three"])


def test_another_model_s_memory_is_not_extended(model, make_icae):
    memory = make_icae(lora_r=2).compress("one")
    with pytest.raises(ValueError, match="Expected a memory of this model"):
        model.extend(memory, "two")


def test_several_texts_of_a_row_are_set_apart_by_a_blank_line(model):
    memory = model.compress([["The cat sat.", "The dog came."]])
    assert memory.spans == [[(3, 12), (4, 15)]]
    ids = model.tokenizer(["The cat sat.", "\n\nThe dog came."])["input_ids"]
    same(memory, model.compress([ids]))


def test_a_document_longer_than_the_base_s_positions_is_compressed_window_by_window(make_icae):
    """Memory of the pass is bounded by `max_spans_per_batch`; the windows stand side by side."""
    model = make_icae()
    document = torch.randint(5, 100, (1, 1500), generator=GENERATOR)
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens .* got 1500; `compress\(..., window=…\)`"):
        model.compress(document)
    memory = model.compress(document, window=408, max_spans_per_batch=7)
    assert int(memory.num_tokens) == 1500 and int(memory.num_slots) == 375
    assert int(memory.positions.max()) <= 408
    parts = [model.compress(document[:, first : first + 400]) for first in range(0, 1500, 400)]
    same(memory, ICAEMemory.concat(parts))
    assert model.generate(memory=memory, prompt="?", max_new_tokens=3).shape == (1, 3)


def test_a_pass_reads_as_many_tokens_of_a_long_document_as_of_a_short_one(make_icae):
    model, sizes = make_icae(), []
    model.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    most = []
    for length in (16 * 4, 16 * 80):
        sizes.clear()
        model.compress([[7] * length], window=256, max_spans_per_batch=4)
        most.append(max(rows * columns for rows, columns, _ in sizes))
    assert most[0] == most[1]


def test_a_window_goes_on_where_it_was_when_text_is_added(make_icae):
    model = make_icae()
    ids = torch.randint(5, 100, (1, 128), generator=GENERATOR)
    memory = model.extend(model.compress(ids[:, :96], window=64), ids[:, 96:], window=64)
    same(memory, model.compress(ids, window=64))


def test_what_does_not_fit_the_positions_is_written_out_in_parts(make_icae):
    model = make_icae()
    memory = model.compress(torch.randint(5, 100, (1, 1000), generator=GENERATOR), window=256)
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens of text to write out.*`memory.select_spans`"):
        model.reconstruct(memory)
    assert len(model.reconstruct(memory.select_spans(slice(0, 4)))) == 1


def test_slots_as_states_take_documents_of_any_length(make_icae):
    model = make_icae(memory_type="hidden_states", decoder_layout="sequential")
    memory = model.compress(torch.randint(5, 100, (1, 1500), generator=GENERATOR))
    assert model.generate(memory=memory, prompt="?", max_new_tokens=3).shape == (1, 3)


def test_a_window_below_one_span(model):
    with pytest.raises(ValueError, match="Expected a `window` of at least one span"):
        model.compress([IDS[0]], window=3)


def test_progress_is_shown_when_asked_for(model, capfd):
    model.compress([IDS[0]], max_spans_per_batch=1)
    assert "Compressing" not in capfd.readouterr().err
    model.compress([IDS[0]], max_spans_per_batch=1, progress=True)
    assert "Compressing" in capfd.readouterr().err
