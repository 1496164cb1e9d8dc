import re

import pytest

from icae import ICAEConfig, ICAEForConditionalGeneration
from tiny import make_base


def test_slots_are_in_proportion_to_the_text():
    config = ICAEConfig(span_length=128, compression_ratio=4)
    assert [config.slots_for(n) for n in (1, 4, 5, 100, 128)] == [1, 1, 2, 25, 32]
    assert config.max_slots_per_span == 32


def test_a_fixed_number_of_slots_is_never_more_than_the_tokens():
    config = ICAEConfig.paper()
    assert [config.slots_for(n) for n in (10, 128, 512)] == [10, 128, 128]


def test_the_paper_preset_has_the_paper_s_values():
    config = ICAEConfig.paper()
    assert (config.span_length, config.num_memory_slots, config.lora_r) == (512, 128, 128)
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.memory_type == "hidden_states" and config.encoder_layout == "sequential"
    assert set(config.decoder_layout.values()) == {"sequential"}


def test_the_order_of_the_adapted_modules_says_nothing():
    names = ["v_proj", "q_proj"]
    assert ICAEConfig(lora_target_modules=names).to_dict() == ICAEConfig(lora_target_modules=names[::-1]).to_dict()


def test_a_configuration_survives_saving(tmp_path):
    layouts = {"autoencoding": "uniform", "continuation": "uniform", "instruction": "sequential"}
    config = ICAEConfig(text_config=make_base().config.to_dict(), decoder_layout=layouts, span_length=32)
    config.save_pretrained(tmp_path)
    loaded = ICAEConfig.from_pretrained(tmp_path)
    assert loaded.decoder_layout == layouts and loaded.span_length == 32
    assert loaded.text_config.model_type == "llama" and loaded.start_token_id == 1


def test_a_base_without_a_start_token_uses_its_end_token():
    text = make_base("qwen2", bos_token_id=None, eos_token_id=[2, 3]).config
    assert ICAEConfig(text_config=text).start_token_id == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_type": "words"}, "Expected `memory_type` to be one of .* got 'words'"),
        ({"span_length": 1}, "Expected `span_length` as a whole number of at least 2 tokens, got 1"),
        ({"num_memory_slots": 4}, "Expected exactly one of `compression_ratio` and `num_memory_slots`"),
        ({"compression_ratio": 0.5}, "more slots than tokens compress nothing"),
        (
            {"compression_ratio": None, "num_memory_slots": 200},
            r"Expected `num_memory_slots` between 1 and `span_length` \(128\), got 200",
        ),
        ({"encoder_layout": "random"}, "Expected `encoder_layout` to be one of"),
        ({"decoder_layout": {"autoencoding": "uniform"}}, "a dict that gives one for each of"),
        ({"encoder_layout": "sequential"}, "Set `decoder_layout='sequential'`|set `decoder_layout='sequential'`"),
        ({"lora_r": 0}, "Expected `lora_r` of at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"Expected `lora_dropout`, a number in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_relations_are_refused_with_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        ICAEConfig(**wrong)


def test_a_span_longer_than_the_base_s_positions_is_refused():
    with pytest.raises(ValueError, match="below the base's 512 positions, got 512"):
        ICAEConfig(text_config=make_base().config, span_length=512)


def test_one_layout_stands_for_all_tasks():
    assert ICAEConfig(decoder_layout="sequential").decoder_layout == dict.fromkeys(
        ("autoencoding", "continuation", "instruction"), "sequential"
    )


@pytest.mark.parametrize("ratio", [1, 1.5, 3, 4, 7.25, 1000])
def test_slots_never_outnumber_tokens_and_never_run_out(ratio):
    config = ICAEConfig(span_length=64, compression_ratio=ratio)
    counts = [config.slots_for(tokens) for tokens in range(1, 65)]
    assert counts == sorted(counts) and counts[-1] == config.max_slots_per_span
    assert all(1 <= count <= tokens for tokens, count in enumerate(counts, start=1))


def test_a_value_of_the_paper_can_be_overridden():
    config = ICAEConfig.paper(span_length=256, num_memory_slots=64, lora_dropout=0.0)
    assert (config.span_length, config.num_memory_slots, config.lora_dropout) == (256, 64, 0.0)
    assert (config.lora_r, config.lora_alpha, config.compression_ratio) == (128, 32, None)


def test_the_paper_preset_fits_a_base_and_survives_saving(tmp_path):
    config = ICAEConfig.paper(span_length=32, num_memory_slots=8, lora_r=4)
    config.save_pretrained(tmp_path)
    loaded = ICAEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == ICAEConfig.from_dict(config.to_dict()).to_dict()
    assert loaded.num_memory_slots == 8 and loaded.compression_ratio is None and loaded.encoder_layout == "sequential"
    model = ICAEForConditionalGeneration.from_base(make_base(), config)
    assert model.compress([[5] * 40]).spans == [[(8, 32), (8, 8)]]


def test_the_given_configuration_is_not_changed():
    config = ICAEConfig(span_length=16)
    before = config.to_dict()
    ICAEForConditionalGeneration.from_base(make_base(), config)
    assert config.to_dict() == before


def test_the_configuration_names_what_the_base_is(make_icae):
    config = make_icae("qwen3").config
    assert config.text_config.model_type == "qwen3"
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}", config.base_model_fingerprint)
    assert config.text_config._attn_implementation == "sdpa", "a reset one would run without a causal mask"


@pytest.mark.parametrize(
    "wrong",
    [
        {"compression_ratio": float("inf")},
        {"compression_ratio": "4"},
        {"compression_ratio": None, "num_memory_slots": 2.5},
        {"span_length": 16.5},
        {"span_length": "16"},
        {"lora_r": 2.5},
        {"lora_alpha": 0},
        {"lora_alpha": -1},
        {"lora_target_modules": []},
        {"decoder_layout": None},
    ],
    ids=str,
)
def test_values_that_are_no_numbers_of_their_kind_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=f"Expected .*{next(reversed(wrong))}"):
        ICAEConfig(**wrong)
