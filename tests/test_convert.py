"""Official checkpoints, made here by a small model with the official names, and what becomes of them."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.hub_upload.convert import convert
from icae.model_cards import CardFacts
from tiny import make_base


SLOTS, RANK = 4, 3  # spans of 16 tokens


class Official(nn.Module):
    """The parts of getao/icae: its names, its token ids and how version 2 compresses one segment."""

    def __init__(self, family: str = "mistral", **lora):
        super().__init__()
        base = make_base(family)
        self.vocab_size = base.config.vocab_size + 1  # [PAD]
        base.resize_token_embeddings(self.vocab_size + SLOTS + 3, mean_resizing=False)
        torch.manual_seed(5)
        lora = {"r": RANK, "lora_alpha": 32, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"} | lora
        self.icae = get_peft_model(base, LoraConfig(**lora))
        self.memory_token_embed = nn.Embedding(SLOTS + 3, base.config.hidden_size)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        self.eval()

    @torch.no_grad()
    def compress(self, ids: list[int]) -> torch.Tensor:
        ids = torch.tensor([[1, *ids, *range(self.vocab_size, self.vocab_size + SLOTS)]])
        is_memory = ids >= self.vocab_size
        embeds = self.icae.get_base_model().model.embed_tokens(ids)
        embeds[is_memory] = self.memory_token_embed(ids[is_memory] - self.vocab_size)
        return self.icae(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][is_memory]

    def released(self) -> dict[str, torch.Tensor]:
        """What the releases hold: adapter and embeddings."""
        return {name: t.detach() for name, t in self.state_dict().items() if ".lora_" in name or "memory" in name}


@pytest.fixture
def official():
    return Official()


@pytest.fixture
def release(official, tmp_path):
    """Writes a changed copy of version 2's file."""

    def write(change=lambda tensors: None, name="mistral_icae.safetensors"):
        tensors = {key: tensor.clone() for key, tensor in official.released().items()}
        change(tensors)
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("length", [SLOTS, 9, 4 * SLOTS - 1])
def test_a_converted_release_makes_the_slots_of_the_official_forward_pass(length, official, release, tmp_path):
    convert(release(), make_base("mistral"), tmp_path / "icae")
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae", base_model=make_base("mistral"))
    ids = list(range(10, 10 + length))
    slots = model.compress(ids).slots[0]
    torch.testing.assert_close(slots, official.compress(ids), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        official.icae.disable_adapter_layers()
    assert (slots - official.compress(ids)).abs().max() > 0.1  # the adapter and its scale matter


def test_weights_embeddings_and_special_tokens_arrive_bit_by_bit(official, release, tmp_path):
    convert(release(), make_base("mistral"), tmp_path / "icae")
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae", base_model=make_base("mistral"))
    rows = official.memory_token_embed.weight
    assert torch.equal(model.memory_embeddings, rows[:SLOTS])
    assert torch.equal(model.task_embeddings, rows[SLOTS : SLOTS + 2])  # [AE], [LM]
    parameters = dict(model.named_parameters())
    matrices = {name: tensor for name, tensor in official.released().items() if ".lora_" in name}
    for name, tensor in matrices.items():
        own = name.replace("icae.base_model.model.", "language_model.").replace(".default.", ".icae.")
        assert torch.equal(parameters[own], tensor)
    assert len(matrices) == sum(".lora_" in name for name in parameters) == 8  # A and B of q and v in two layers


def test_the_configuration_is_the_paper_s_with_the_file_s_sizes(release, tmp_path):
    convert(release(), make_base("mistral"), tmp_path / "icae")
    config = json.loads((tmp_path / "icae" / "config.json").read_text())
    expected = {
        "memory_type": "hidden_states",
        "num_memory_slots": SLOTS,
        "compression_ratio": None,
        "span_length": 4 * SLOTS,
        "encoder_layout": "sequential",
        "lora_r": RANK,
        "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    assert {name: config[name] for name in expected} == expected
    assert set(config["decoder_layout"].values()) == {"sequential"}


def test_version_1_is_a_state_dict_with_numbers_in_place_of_the_base(tmp_path, tokenizer):
    official = Official("llama")
    tensors = official.released() | {
        name: torch.tensor(0.0) for name in official.state_dict() if name not in official.released()
    }
    tensors["icae.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = 0
    torch.save(tensors, tmp_path / "llama.pt")
    notes = convert(tmp_path / "llama.pt", make_base("llama"), tmp_path / "icae")
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae", base_model=make_base("llama"))
    ids = list(range(20, 30))
    torch.testing.assert_close(model.compress(ids).slots[0], official.compress(ids), rtol=1e-5, atol=1e-5)
    assert f"left out: {len(tensors) - 9} weights of the base that the file holds" in notes
    assert GenerationConfig.from_pretrained(tmp_path / "icae").eos_token_id == [1, 2]  # its texts end with <s>
    model.tokenizer = tokenizer
    assert len(model.generate(memory=model.compress(ids), prompt="Who?", max_new_tokens=3)) == 1


def test_a_checkpoint_of_official_training_holds_both_copies_of_the_base(official, tmp_path):
    official.decoder = make_base("mistral")
    tensors = {name: tensor.detach().clone() for name, tensor in official.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    notes = convert(tmp_path / "model.safetensors", make_base("mistral"), tmp_path / "icae")
    assert f"left out: {len(tensors) - 9} weights of the base that the file holds" in notes
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae", base_model=make_base("mistral"))
    torch.testing.assert_close(model.compress([7, 8, 9, 10]).slots[0], official.compress([7, 8, 9, 10]))


def test_other_target_modules_are_found_in_the_file(tmp_path):
    official = Official("llama", target_modules=["q_proj", "k_proj", "down_proj"])
    save_file(official.released(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", make_base("llama"), tmp_path / "icae")
    model = ICAEForConditionalGeneration.from_pretrained(tmp_path / "icae", base_model=make_base("llama"))
    assert model.config.lora_target_modules == ["down_proj", "k_proj", "q_proj"]
    torch.testing.assert_close(model.compress([7, 8, 9, 10]).slots[0], official.compress([7, 8, 9, 10]))


def test_the_command_and_the_card_say_what_could_not_be_verified(release, tokenizer, tmp_path, capsys):
    make_base("mistral").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = tmp_path / "icae"
    assert main(["convert", str(release()), "--base", str(tmp_path / "base"), "-o", str(folder)]) == 0
    folder_line, *notes = capsys.readouterr().out.splitlines()
    assert folder_line == str(folder)
    for start in (
        "could not verify: that this is the base",
        "could not verify: the adapter's scale of 32 / 3 and spans of 16 tokens",
        "could not verify: that [LM] was trained",
        "left out: the embedding of [FT]",
        "differs: a context of fewer than 4 tokens",
        "differs: longer contexts become spans of 16 tokens",
        "differs: the decoder reads a start token",
    ):
        assert any(note.startswith(start) for note in notes), start
    facts, card = CardFacts.load(folder), (folder / "README.md").read_text()
    assert len(facts.limits) == len(notes) and all(limit in card for limit in facts.limits)
    assert "Converted from `mistral_icae.safetensors`" in card and str(tmp_path) not in card
    model = ICAEForConditionalGeneration.from_pretrained(folder)  # its base is where it was
    assert isinstance(model.reconstruct("Ann")[0], str)


# --------------------------------------------------------------------------------------------------------- bad files


def rename(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(next(name for name in tensors if old in name))

    return change


def resize(part: str, *shape: int):
    def change(tensors):
        tensors[next(name for name in tensors if part in name)] = torch.zeros(shape)

    return change


def drop(part: str):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("memory"), r"Expected 'memory_token_embed.weight' of shape \(slots \+ 3, hidden size\).*got NoneType"),
        (resize("memory", 3, 32), r"of shape \(slots \+ 3, hidden size\).*got \(3, 32\)"),
        (resize("memory", 7, 16), r"first 'memory_token_embed.weight': expected \(7, 32\), got \(7, 16\)"),
        (drop("lora"), r"Expected the encoder's LoRA in .*got none"),
        (drop("layers.1.self_attn.v_proj"), r"2 are missing.*layers.1.self_attn.v_proj.*got None"),
        (resize("layers.0.self_attn.q_proj.lora_B", 32, 5), r"expected \(32, 3\), got \(32, 5\)"),
        (rename("layers.0.self_attn.q_proj.lora_A", "icae.q.lora_A"), r"got 'icae.q.lora_A', which this layout"),
        (rename("memory", "memory_head.dense_in.weight"), r"Expected 'memory_token_embed.weight'"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_refused(change, message, release, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(release(change), make_base("mistral"), tmp_path / "icae")
    assert not (tmp_path / "icae").exists()


def test_a_memory_head_is_refused(release, tmp_path):
    def add(tensors):
        tensors["memory_head.dense_in.weight"] = torch.zeros(32, 32)

    with pytest.raises(ValueError, match=r"got 'memory_head.dense_in.weight', which this layout has no place for"):
        convert(release(add), make_base("mistral"), tmp_path / "icae")


def test_nothing_is_written_over(release, tmp_path):
    (tmp_path / "icae").mkdir()
    (tmp_path / "icae" / "trained.safetensors").write_text("weeks of work")
    with pytest.raises(ValueError, match=r"Expected a new or empty folder to write to, got .*icae'; name another"):
        convert(release(), make_base("mistral"), tmp_path / "icae")
    assert [file.name for file in (tmp_path / "icae").iterdir()] == ["trained.safetensors"]


def test_a_base_of_another_size_is_refused(release, tmp_path):
    base = make_base("mistral", hidden_size=64, head_dim=16)
    with pytest.raises(ValueError, match=r"9 are missing.* give the base that it was trained on"):
        convert(release(), base, tmp_path / "icae")


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from the file ran')",)


def test_a_pt_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"memory_token_embed.weight": Exploit()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="nothing that would have to run as code"):
        convert(tmp_path / "a.pt", make_base(), tmp_path / "icae")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match=r"Expected tensors in .*download it again"):
        convert(tmp_path / name, make_base(), tmp_path / "icae")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"Expected a state dict in .*got a list"):
        convert(tmp_path / "list.pt", make_base(), tmp_path / "icae")
