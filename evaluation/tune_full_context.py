"""
The baseline that is tuned like an ICAE: `python -m icae.evaluation.tune_full_context --config FILE.yaml --tuned OUT`.

A LoRA of the same size, on the same triples in the same chat format, with the loss on the response alone, but the
decoder reads the whole context. Takes the arguments of `icae sft` (behind `--config FILE`) and heeds those of the
model, of the data and, for TRL's trainer, `SHARED`; a run is short and starts anew each time.

A row is one triple here, while one of an ICAE holds up to `max_prompts` of them and a share trains reconstruction:
choose `max_steps` for as many triples. How many there were stands in `tuned_on.json` beside the adapter.
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from icae.evaluation.record import write_record
from icae.trainers import ICAESFTConfig, prepare_sft_dataset
from icae.trainers.scripts import ICAEArguments, load_data, load_model
from icae.trainers.sft import SFTArguments


SHARED = [
    *("output_dir", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "max_steps", "warmup_steps", "seed"),
    *("max_grad_norm", "adam_beta1", "adam_beta2", "weight_decay", "optim", "num_train_epochs", "data_seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "bf16", "use_cpu"),
    *("train_sampling_strategy", "eval_strategy", "eval_steps", "logging_steps", "report_to"),
]


@dataclass
class TuneArguments(SFTArguments):
    """What to tune, and on what."""

    tuned: str = field(default="runs/full-context-lora", metadata={"help": "Where the PEFT adapter is written."})


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((TuneArguments, ICAEArguments, ICAESFTConfig))
    script, icae, config = parser.parse_args_and_config(argv)
    if script.resume:
        raise ValueError("Expected no `--resume`, got it; this command keeps no checkpoints to go on from.")
    if Path(script.tuned).exists():
        raise ValueError(
            f"Expected a folder `--tuned` that does not exist yet, got {script.tuned!r}; name another or remove it."
        )
    set_seed(config.seed)
    model = load_model(script, icae, cpu=config.use_cpu)
    train, evaluation = load_data(script, config.seed)
    prefix = model._prefix("instruction").tolist()

    def join(row):
        prompt = [*prefix, *row["context_ids"], *row["prompt_ids"][0]]
        response = row["response_ids"][0]
        return {
            "input_ids": prompt + response,
            "completion_mask": [0] * len(prompt) + [1] * len(response),
        }

    def prepare(dataset):
        samples = prepare_sft_dataset(dataset, model, max_context_length=config.max_context_length)
        return samples.map(join, remove_columns=samples.column_names)

    if evaluation is not None:
        evaluation = prepare(evaluation.shuffle(seed=config.seed).take(script.eval_samples))
    options = {name: getattr(config, name) for name in SHARED}
    base = model.language_model
    trainer = SFTTrainer(
        # Loaded again: an ICAE's own copy holds its encoder's adapter, switched off by a flag that PEFT shares.
        model=AutoModelForCausalLM.from_pretrained(
            base.name_or_path, dtype=base.dtype, attn_implementation=base.config._attn_implementation
        ),
        args=SFTConfig(
            **options,
            completion_only_loss=True,  # else TRL overlooks the mask of rows that are tokenised already
            max_length=None,
            save_strategy="no",
            gradient_checkpointing=False,
        ),
        train_dataset=prepare(train),
        eval_dataset=evaluation,
        processing_class=model.tokenizer,
        peft_config=LoraConfig(
            r=model.config.lora_r,
            lora_alpha=model.config.lora_alpha,
            lora_dropout=model.config.lora_dropout,
            target_modules=model.config.lora_target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(script.tuned)
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    record = {
        "what": "the baseline that is tuned on full contexts",
        "steps": trainer.state.global_step,
        "triples": trainer.state.global_step * rows,
    }
    write_record(Path(script.tuned, "tuned_on.json"), record)


if __name__ == "__main__":
    main()
