import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from icae import ICAEConfig, ICAEForConditionalGeneration
from icae.modeling_icae.pretrained_icae import SLOTS_FILE
from tiny import make_base


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    folder = tmp_path / "base"
    make_base().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["key_values", "hidden_states"])
def saved(request, make_icae, base_folder, tmp_path):
    """A trained-looking model whose base lies in a folder, and the folder it is saved in."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = make_icae(base=base, memory_type=request.param)
    model.save_pretrained(tmp_path / "icae")
    return model, tmp_path / "icae"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_slots_and_logits_are_bit_equal_after_loading(saved, ragged):
    model, folder = saved
    loaded = ICAEForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(loaded.compress(*ragged).slots, model.compress(*ragged).slots)
    expected, found = model(*ragged), loaded(*ragged)
    assert torch.equal(found.token_losses["autoencoding"], expected.token_losses["autoencoding"])
    assert loaded.fingerprint == model.fingerprint
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_only_adapter_slots_configuration_and_tokenizer_are_saved(saved):
    _, folder = saved
    assert {name for name in files(folder) if not name.endswith(".py")} == {
        "config.json",
        "generation_config.json",
        "icae_slots.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    names = set(load_file(folder / "adapter" / "adapter_model.safetensors")) | set(
        load_file(folder / "icae_slots.safetensors")
    )
    assert names and all("lora_" in name or name in ("memory_embeddings", "task_embeddings") for name in names)


def test_the_configuration_names_the_base_and_no_other_path(saved, base_folder):
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    assert config["architectures"] == ["ICAEForConditionalGeneration"]
    assert config["text_config"].get("_name_or_path", "") == ""
    adapter = json.loads((saved[1] / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base_folder) and adapter["inference_mode"] is True


def test_the_auto_classes_know_a_saved_model(saved, ragged):
    model, folder = saved
    assert isinstance(AutoConfig.from_pretrained(folder), ICAEConfig)
    loaded = AutoModel.from_pretrained(folder)
    assert torch.equal(loaded.compress(*ragged).slots, model.compress(*ragged).slots)


@pytest.mark.parametrize("option", [{"device_map": "cpu"}, {"attn_implementation": "eager"}, {"dtype": "float32"}])
def test_arguments_for_the_base_are_handed_on(saved, ragged, option):
    model, folder = saved
    loaded = ICAEForConditionalGeneration.from_pretrained(folder, **option)
    if "attn_implementation" in option:
        assert loaded.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(loaded.compress(*ragged).slots, model.compress(*ragged).slots, atol=2e-5, rtol=1e-4)


def test_plain_peft_loads_the_same_encoder(saved, base_folder, ragged):
    from transformers import AutoModelForCausalLM

    model, folder = saved
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder, subfolder="adapter")
    with model.adapter(True):
        expected = model.language_model(ragged[0]).logits
    assert torch.equal(peft(ragged[0]).logits, expected)


def test_a_loaded_model_can_be_saved_again_in_bfloat16(saved, tmp_path, ragged):
    _, folder = saved
    loaded = ICAEForConditionalGeneration.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert {"config.json", "icae_slots.safetensors"} <= files(tmp_path / "again") <= files(folder)
    again = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}
    reloaded = ICAEForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert reloaded.compress(*ragged).slots.dtype == torch.bfloat16


def test_a_trainable_model_keeps_its_weights_in_float32(saved):
    loaded = ICAEForConditionalGeneration.from_pretrained(saved[1], is_trainable=True, dtype=torch.bfloat16)
    assert loaded.language_model.dtype == torch.bfloat16
    for name, parameter in loaded.trainable_parameters().items():
        assert parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, saved[0].trainable_parameters()[name])


def test_a_given_state_dict_is_saved_in_place_of_the_weights(saved, tmp_path):
    model, _ = saved
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=state)
    tensors = load_file(tmp_path / "zeros" / "adapter" / "adapter_model.safetensors")
    tensors |= load_file(tmp_path / "zeros" / "icae_slots.safetensors")
    assert all((tensor == 0).all() for tensor in tensors.values())


def test_weights_can_be_loaded_in_place(saved, ragged):
    model, folder = saved
    expected = model.compress(*ragged)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(1)
    assert model.fingerprint != expected.fingerprint
    model.load_icae_weights(folder)
    found = model.compress(*ragged)
    assert torch.equal(found.slots, expected.slots) and found.fingerprint == expected.fingerprint


def test_the_base_is_found_by_a_given_path_or_model(saved, ragged):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["base_model_name_or_path"] = "nobody/nothing"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Expected a base model at 'nobody/nothing', found none"):
        ICAEForConditionalGeneration.from_pretrained(folder)
    loaded = ICAEForConditionalGeneration.from_pretrained(folder, base_model=make_base())
    assert torch.equal(loaded.compress(*ragged).slots, model.compress(*ragged).slots)


def test_another_base_is_refused_unless_the_user_insists(saved):
    other = make_base()
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match=r"Expected the base model .*\(fingerprint .*\), got .*\(fingerprint"):
        ICAEForConditionalGeneration.from_pretrained(saved[1], base_model=other)
    ICAEForConditionalGeneration.from_pretrained(saved[1], base_model=other, verify_base=False)


def test_the_base_s_fingerprint_is_the_same_in_every_dtype(make_icae):
    base = make_base().bfloat16()
    fingerprint = make_icae(base=base).config.base_model_fingerprint
    assert make_icae(base=make_base().bfloat16().float()).config.base_model_fingerprint == fingerprint


def test_a_base_with_quantised_linear_layers_is_known_by_its_norms_and_embeddings(saved):
    model, folder = saved
    quantised = make_base()
    quantised.config.quantization_config = {"quant_method": "none"}
    loaded = ICAEForConditionalGeneration.from_pretrained(folder, base_model=quantised)
    assert loaded.fingerprint == model.fingerprint


def drop(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [drop, truncate])
@pytest.mark.parametrize("name", ["icae_slots.safetensors", "adapter/adapter_model.safetensors"])
def test_a_missing_or_damaged_file_is_named(saved, name, damage):
    damage(saved[1] / name)
    with pytest.raises(ValueError, match=f"Expected an ICAE checkpoint with '{name}'"):
        ICAEForConditionalGeneration.from_pretrained(saved[1])


def test_missing_left_over_and_misshapen_tensors_are_refused(saved):
    model, folder = saved
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    for change in ({name: None}, {"more": torch.zeros(1)}, {name: torch.zeros(3, 3)}):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match="1 are missing, left over or of another shape"):
            model.load_icae_weights(folder)


def test_a_saved_embedded_size_checkpoint_stays_small(make_icae):
    """The adapter of the default rank on a base of the shape of SmolLM2-135M, in bfloat16: at most 20 MB."""
    with torch.device("meta"):
        base = make_base(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            intermediate_size=1536,
        )
        model = ICAEForConditionalGeneration.from_base(base, ICAEConfig())
    assert sum(parameter.numel() for parameter in model.trainable_parameters().values()) * 2 <= 20e6


def test_answers_are_the_same_after_loading(saved):
    model, folder = saved
    loaded = ICAEForConditionalGeneration.from_pretrained(folder)
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(["One context.", "Two."], "Who?", **options)
    assert torch.equal(loaded.generate(["One context.", "Two."], "Who?", **options), expected)
    memory = model.compress("One context.")
    assert loaded.reconstruct(memory) == model.reconstruct(memory), "the loaded model takes the saved one's memories"


def test_a_whole_bfloat16_model_is_bit_equal_after_loading(make_icae, base_folder, tmp_path, ragged):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    make_icae(base=base).save_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    first = ICAEForConditionalGeneration.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}
    first.save_pretrained(tmp_path / "second")
    second = ICAEForConditionalGeneration.from_pretrained(tmp_path / "second", dtype=torch.bfloat16)
    assert torch.equal(second.compress(*ragged).slots, first.compress(*ragged).slots)
    assert torch.equal(second(*ragged).loss, first(*ragged).loss)
    assert second.fingerprint == first.fingerprint


def test_saving_what_was_loaded_writes_the_same_files(saved, tmp_path):
    _, folder = saved
    loaded = ICAEForConditionalGeneration.from_pretrained(folder)
    loaded.tokenizer.encode("loaded, so that it is saved")
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)
    for name in ("icae_slots.safetensors", "adapter/adapter_model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_saved_weights_are_no_larger_than_what_is_trained(saved):
    model, folder = saved
    trained = sum(parameter.nbytes for parameter in model.trainable_parameters().values())
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert trained <= stored <= trained + 20_000  # headers


def test_the_base_is_not_written_to(saved, base_folder):
    before = {name: (base_folder / name).read_bytes() for name in files(base_folder)}
    loaded = ICAEForConditionalGeneration.from_pretrained(saved[1], is_trainable=True)
    loaded.save_pretrained(saved[1])
    assert {name: (base_folder / name).read_bytes() for name in files(base_folder)} == before


def test_only_the_main_process_writes(saved, tmp_path):
    saved[0].save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_a_base_whose_generation_config_asks_for_a_style_of_sampling_without_sampling_is_saved(base_folder, tmp_path):
    """Vicuna's does; transformers loads such a file and writes it again, but only as long as nothing was changed."""
    file = base_folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    model = ICAEForConditionalGeneration.from_base(str(base_folder), ICAEConfig(span_length=16))
    model.save_pretrained(tmp_path / "icae")
    loaded = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae")
    assert loaded.generation_config.temperature == 0.9 and loaded.fingerprint == model.fingerprint


def test_the_tokenizer_of_a_base_is_looked_for_where_and_as_the_base_was(base_folder, monkeypatch):
    found, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **given: found.append(given) or load(name))
    given = {"token": "hf_tester", "cache_dir": str(base_folder), "local_files_only": True}
    model = ICAEForConditionalGeneration.from_base(
        str(base_folder), ICAEConfig(span_length=16), revision="v1", **given
    )
    assert model.tokenizer("a")["input_ids"]
    assert found == [given | {"revision": "v1"}]


def test_the_generation_config_is_saved(saved, tmp_path):
    model, _ = saved
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "longer")
    assert ICAEForConditionalGeneration.from_pretrained(tmp_path / "longer").generation_config.max_new_tokens == 77


def test_a_refused_base_is_named_beside_the_right_one(saved, base_folder, tmp_path):
    other = make_base()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(0.5)
    other.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError) as error:
        ICAEForConditionalGeneration.from_pretrained(saved[1], base_model=str(tmp_path / "wrong"))
    assert str(base_folder) in str(error.value) and str(tmp_path / "wrong") in str(error.value)


@pytest.mark.parametrize("change", [{"lora_r": 8}, {"span_length": 32}, {"lora_target_modules": ["q_proj"]}])
def test_a_configuration_that_does_not_fit_the_weights_is_refused(saved, change):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="missing, left over or of another shape, first"):
        ICAEForConditionalGeneration.from_pretrained(folder)


def test_a_damaged_file_changes_nothing_in_the_loaded_model(saved):
    """The trainer resumes in place: nothing may be half loaded."""
    model, folder = saved
    before = {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}
    save_file({"memory_embeddings": torch.zeros(4, 32)}, folder / "icae_slots.safetensors")
    with pytest.raises(ValueError, match="1 are missing, left over or of another shape, first 'task_embeddings'"):
        model.load_icae_weights(folder)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.trainable_parameters().items())


def test_the_base_s_tokenizer_is_used_when_none_was_saved(base_folder, tmp_path):
    model = ICAEForConditionalGeneration.from_base(str(base_folder), ICAEConfig(span_length=16))
    model.save_pretrained(tmp_path / "icae")
    loaded = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae")
    assert torch.equal(loaded.compress("some text").slots, model.compress("some text").slots)


def test_a_base_with_other_linear_layers_is_refused(saved):
    other = make_base()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(0.5)  # as after merging a LoRA
    with pytest.raises(ValueError, match="Expected the base model"):
        ICAEForConditionalGeneration.from_pretrained(saved[1], base_model=other)


def test_an_upload_that_is_asked_for_is_not_forgotten(saved, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ICAEForConditionalGeneration, "push_to_hub", lambda *args, **kwargs: calls.append(args))
    try:
        saved[0].save_pretrained(tmp_path / "pushed", push_to_hub=True)
    except (TypeError, ValueError, NotImplementedError, OSError):
        return
    assert calls


def test_memories_made_on_another_base_are_of_another_model(saved):
    """`verify_base=False` takes the base, but what it writes is not what the right one reads."""
    model, folder = saved
    other = make_base()
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    insisting = ICAEForConditionalGeneration.from_pretrained(folder, base_model=other, verify_base=False)
    assert insisting.config.base_model_fingerprint == model.config.base_model_fingerprint
    with pytest.raises(ValueError, match="got one of another model"):
        model.reconstruct(insisting.compress([7] * 20))
    assert insisting.reconstruct(insisting.compress([7] * 20))


def test_the_base_is_loaded_as_it_was_in_training_not_as_it_is_stored(make_icae, base_folder, tmp_path):
    make_base().half().save_pretrained(base_folder)  # as Llama 2 is stored
    config = ICAEConfig(span_length=16, base_model_name_or_path=str(base_folder))
    model = ICAEForConditionalGeneration.from_base(str(base_folder), config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "trained")
    assert AutoModel.from_pretrained(tmp_path / "trained").dtype == torch.bfloat16
    assert (
        AutoModel.from_pretrained(tmp_path / "trained", dtype="auto").dtype == torch.bfloat16
    )  # as the pipeline asks
    again = AutoModel.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert again.dtype == torch.float32
    again.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == torch.float32

    cast = AutoModelForCausalLM.from_pretrained(base_folder).to(torch.bfloat16)
    ICAEForConditionalGeneration.from_base(cast, config).save_pretrained(tmp_path / "cast")
    assert AutoModel.from_pretrained(tmp_path / "cast").dtype == torch.bfloat16


def test_a_configuration_that_is_given_needs_no_base_s(saved, base_folder):
    model, folder = saved
    config = ICAEConfig(base_model_name_or_path=str(base_folder), span_length=16, lora_r=4, lora_alpha=8)
    config.memory_type = model.config.memory_type
    assert ICAEForConditionalGeneration.from_pretrained(folder, config=config).fingerprint != ""


def test_the_attention_that_was_chosen_for_a_base_is_not_asked_of_another(tmp_path, tokenizer):
    """GPT-J has no sdpa, which transformers writes into the configuration of what holds it."""
    make_base("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64).save_pretrained(tmp_path / "base")
    model = ICAEForConditionalGeneration.from_base(str(tmp_path / "base"), ICAEConfig(span_length=16, lora_r=4))
    model.save_pretrained(tmp_path / "icae")
    for load in (AutoModel, ICAEForConditionalGeneration):
        again = load.from_pretrained(tmp_path / "icae", config=model.config)
        assert again.language_model.config._attn_implementation == "eager"


def test_a_checkpoint_whose_answers_were_saved_without_an_end_token_ends_them(saved):
    _, folder = saved
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    assert ICAEForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id == [2]


def test_auto_classes_pass_the_attention_on(saved):
    for load in (AutoModel, ICAEForConditionalGeneration):
        model = load.from_pretrained(saved[1], attn_implementation="eager")
        assert model.language_model.config._attn_implementation == "eager"


def test_the_folder_of_another_model_is_not_written_into(saved, base_folder):
    model, _ = saved
    before = (base_folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="which holds a model of the type 'llama'; give another one"):
        model.save_pretrained(base_folder)
    assert (base_folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("content", ['{"learning_rate": 1}', "[]"])
def test_a_config_json_of_one_s_own_is_not_written_over(saved, tmp_path, content):
    model, _ = saved
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"which holds a 'config.json' that is no model's; give another one"):
        model.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_model_that_was_loaded_in_inference_mode_compresses(saved):
    expected = saved[0].compress([5, 6, 7]).slots
    with torch.inference_mode():
        model = ICAEForConditionalGeneration.from_pretrained(saved[1])
        assert torch.equal(model.compress([5, 6, 7]).slots, expected)
        assert model.reconstruct([5, 6, 7])


def test_a_base_of_which_layers_with_an_adapter_are_offloaded_is_refused(saved, tmp_path):
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.layers.0": "disk"}
    with pytest.raises(ValueError, match=r"on their devices, got \d+ offloaded tensors, first .*layers\.0.*lora_A"):
        ICAEForConditionalGeneration.from_pretrained(
            saved[1], device_map=device_map, offload_folder=str(tmp_path / "offloaded")
        )


def test_a_configuration_may_be_named(saved, tmp_path):
    model, folder = saved
    config = copy.deepcopy(model.config)
    config.decoder_layout["continuation"] = "sequential"
    config.save_pretrained(tmp_path / "other")
    loaded = ICAEForConditionalGeneration.from_pretrained(folder, config=str(tmp_path / "other"))
    assert loaded.config.decoder_layout["continuation"] == "sequential"


def test_a_damaged_generation_config_is_refused_and_a_missing_one_is_the_base_s(saved):
    file = saved[1] / "generation_config.json"
    file.write_text('{"max_new_tokens": 5')
    with pytest.raises(ValueError, match=r"Expected a 'generation_config.json' in JSON at .*, got a damaged one"):
        ICAEForConditionalGeneration.from_pretrained(saved[1])
    file.unlink()
    assert ICAEForConditionalGeneration.from_pretrained(saved[1]).generation_config.max_new_tokens is None


def test_a_dtype_to_save_in_may_be_named(saved, tmp_path):
    saved[0].save_pretrained(tmp_path / "named", dtype="bfloat16")
    assert load_file(tmp_path / "named" / SLOTS_FILE)["memory_embeddings"].dtype == torch.bfloat16
