import pytest

from icae import ICAEConfig
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
        ({"span_length": 1}, "Expected `span_length` of at least 2 tokens, got 1"),
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
        ({"lora_dropout": 1.0}, r"Expected `lora_dropout` in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_relations_are_refused_with_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        ICAEConfig(**wrong)


def test_a_span_longer_than_the_base_s_positions_is_refused():
    with pytest.raises(ValueError, match="below the base's 512 positions, got 512"):
        ICAEConfig(text_config=make_base().config, span_length=512)
