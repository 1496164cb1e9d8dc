"""
`python -m icae.evaluation.small_base --family qwen3 --data FILE.parquet --output FOLDER`: a small language model of
any family, trained from nothing in minutes.

A laboratory animal for `icae sweep`: for families whose weights are not at hand, and comparisons that would take hours
on a real base. It has its own vocabulary, learned from the same text.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,  # Gemma scales scores by this, others by the size of a head; its default suits 256
    "max_position_embeddings": 1024,
}
GPT2_SIZES = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024}
END = "</s>"  # of a text, so it stands in front of texts as well, and is what a sequence starts with


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small language model of any family, trained from nothing.")
    parser.add_argument("--family", required=True, help="a model type of transformers: qwen3, gemma3_text, gpt2, …")
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files of documents (column `text`)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the trained base")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of 256 tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    documents = load_dataset("parquet", data_files=arguments.data, split="train").shuffle(seed=arguments.seed)
    tokenizer = learn_tokenizer(documents["text"][:2000], arguments.vocab_size)
    sizes = GPT2_SIZES if arguments.family == "gpt2" else SIZES
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = sizes | ids | {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    config = AutoConfig.for_model(arguments.family, **sizes)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(
            output_dir=str(arguments.output),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=256,
            packing=True,
            packing_strategy="wrapped",
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=documents.select(range(min(len(documents), 4000))).select_columns(["text"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def learn_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )


if __name__ == "__main__":
    main()
