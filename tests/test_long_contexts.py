"""Contexts that grow, that are several, and that are longer than what the base has positions for."""

import pytest
import torch

from icae import EMBEDDED_CHECKPOINT, ICAEForConditionalGeneration, ICAEMemory, embedded_base
from tiny import make_base


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
    with pytest.raises(
        ValueError, match=r"Expected spans that follow each other.*got 1000 tokens in places of 256 in"
    ):
        model.reconstruct(memory)
    for part in (slice(0, 16), slice(20, 24), [62]):
        assert len(model.reconstruct(memory.select_spans(part))) == 1
    with pytest.raises(ValueError, match=r"Expected at most 511 tokens of text to write out.*`memory.select_spans`"):
        model.reconstruct(memory.select_spans([0]), max_new_tokens=600)


def test_spans_that_do_not_follow_each_other_are_written_out_one_by_one(make_icae):
    for memory_type in ("key_values", "hidden_states"):
        model = make_icae(memory_type=memory_type)
        memory = model.compress(IDS)
        parts = {"a gap": [1, 3], "another order": [2, 1], "a repetition": [1, 1], "a gap of one row": [4, 0]}
        for chosen in parts.values():
            with pytest.raises(
                ValueError, match=r"tokens in places of -?\d+ in row 0: spans with others between them"
            ):
                model.reconstruct(memory.select_spans(chosen))
        assert model.generate(memory=memory.select_spans([1, 3]), prompt="?", max_new_tokens=3).shape == (2, 3)
    sequential = make_icae(memory_type="hidden_states", decoder_layout="sequential")  # where slots count, not places
    assert len(sequential.reconstruct(sequential.compress(IDS).select_spans([3, 1]), max_new_tokens=3)) == 2


def test_a_later_part_is_written_out_where_it_stood(model):
    memory = model.compress([IDS[0], IDS[1][:50]]).select_spans([1, 2])
    start = model._text_start(memory, "autoencoding").tolist()
    if model.config.decoder_layout["autoencoding"] == "uniform":
        assert start == [16, 16]  # the second text's last span has 2 slots of 8 and 10 tokens
    elif memory.memory_type == "hidden_states":
        assert start == [9, 9]
    else:
        assert start == memory.end.tolist()


@pytest.mark.skipif(EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_a_real_model_writes_out_the_second_span_of_a_text():
    model = ICAEForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, base_model=embedded_base())
    text = (
        "The lighthouse keeper had not spoken to anyone since October. Every morning he climbed the stairs, cleaned"
        " the lamp, and wrote the weather into a book that nobody read. When the boat came in the first week of March,"
        " its crew found the door open and the stove still warm, but the keeper himself was gone. "
    )
    ids = model.tokenizer(text * 4, add_special_tokens=False)["input_ids"]
    second = ids[model.config.span_length :][:32]
    memory = model.compress([ids[: 2 * model.config.span_length]]).select_spans([1])
    assert model.reconstruct(memory, max_new_tokens=32) == [model.tokenizer.decode(second)]


def test_text_added_to_later_spans_stands_behind_them(model):
    memory = model.compress([IDS[0][:48]])
    extended = model.extend(memory.select_spans(slice(1, None)), [IDS[0][48:64]])
    same(extended, model.compress([IDS[0][:64]]).select_spans(slice(1, None)))


def test_bases_that_rotate_long_texts_otherwise_have_the_positions_of_their_pretraining(make_icae):
    """LongRoPE turns all keys of a pass in another way once one stands behind them: what was kept would not fit."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    options = {"pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": rope}
    base = make_base("phi3", **options)
    model = make_icae(base=base)
    assert model.config.num_positions == 64 < base.config.max_position_embeddings
    with pytest.raises(ValueError, match=r"Expected at most 63 tokens of context, prompt and answer.*got 80"):
        model.compress([IDS[0]])
    with pytest.raises(ValueError, match="Expected at most 63 tokens of context, prompt and answer"):
        model.generate("A text.", "Who is it about? " * 4, max_new_tokens=3)
    alone = model.compress([IDS[0][:20]])
    torch.testing.assert_close(model.compress([IDS[0][:20], IDS[1][:63]])[0].slots, alone.slots)
    same(model.compress([IDS[0]], window=48, max_spans_per_batch=1), model.compress([IDS[0]], window=48))
    with pytest.raises(ValueError, match="Expected `span_length` below the base's 64 positions, got 64"):
        make_icae(base=make_base("phi3", **options), span_length=64)


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


@pytest.mark.parametrize("memory_type", ["key_values", "hidden_states"])
def test_text_added_with_a_window_stands_where_it_would_in_one_go(make_icae, memory_type):
    model = make_icae(memory_type=memory_type)
    text = [*range(5, 100), 5]  # six spans
    whole = model.compress(text, window=48)
    grown = model.extend(model.compress(text[:32], window=48), text[32:], window=48)
    assert grown.positions.tolist() == whole.positions.tolist() and grown.spans == whole.spans


def test_a_window_beyond_the_positions_is_told_to_be_smaller(make_icae):
    model = make_icae(base=make_base(max_position_embeddings=64))
    with pytest.raises(ValueError, match=r"Expected at most 63 tokens of a window, .* got 70; give a smaller one"):
        model.compress([7] * 100, window=70)
