"""Tiny bases of several families and their vocabulary: one token per character."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = SPECIAL + [chr(code) for code in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARED = {
    "vocab_size": len(VOCABULARY),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large, so that logits differ clearly
}
LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
# A tiny base with tied embeddings repeats its last token for ever, whatever it reads.
GEMMA_LIKE = LLAMA_LIKE | {"sliding_window": 64, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
FAMILIES = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": 64},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": GEMMA_LIKE | {"attn_implementation": "eager"},  # transformers 5.19 takes sdpa, which knows no soft cap
    "gemma3_text": GEMMA_LIKE,
    "phi": {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")},
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}

# Arguments of a trainer for a run of seconds.
SHORT_RUN = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "continuation_length": 4,
    "seed": 3,
}

# What the generation_config of a base may ask for, as Qwen2.5's does, only more.
STYLE = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0}


def made_under(monkeypatch, trainer_class, flag):
    """Trainers of this class are made as if `accelerate launch` had set one of their flags."""
    made = trainer_class.__init__

    def make(trainer, *args, **kwargs):
        made(trainer, *args, **kwargs)
        setattr(trainer, flag, True)

    monkeypatch.setattr(trainer_class, "__init__", make)


def written_in_evaluation(trainer, **style):
    """The token ids that a trainer's evaluation writes first, from a model with a style of answers."""
    found, generate = [], trainer.model.generate
    trainer.model.generation_config.update(**style)
    trainer.model.generate = lambda *given, **options: found.append(generate(*given, **options)) or found[-1]
    trainer.evaluate()
    return found[0].tolist()


def make_base(family: str = "llama", **overrides):
    """A tiny, seeded base of one of `FAMILIES`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHARED | FAMILIES.get(family, LLAMA_LIKE) | overrides))
    return AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, a chat template, control tokens."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )
