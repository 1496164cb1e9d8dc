"""
`icae sft --config FILE.yaml`: instruction tuning from a configuration file, with TRL's parser.

Every field of [`SFTArguments`], [`ICAEArguments`] and [`ICAESFTConfig`] can stand in the file or, as `--field value`,
behind it. `init_from` is the pretrained checkpoint; without it, an untrained model is tuned. A run that was stopped
goes on with `--resume true`, exactly where its last checkpoint is (within the first pass through a stream).
"""

from dataclasses import dataclass, field

from transformers import EarlyStoppingCallback, set_seed

from .scripts import ICAEArguments, ScriptArguments, load_data, load_documents, load_model, read_arguments, run
from .sft_config import ICAESFTConfig
from .sft_trainer import ICAESFTTrainer


@dataclass
class SFTArguments(ScriptArguments):
    """What to tune, and on what."""

    document_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local Parquet files of texts that mixed-in samples are cut from, instead of the contexts."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better `metric_for_best_model` before the run ends."},
    )


def main(argv: list[str] | None = None) -> None:
    script, icae, config = read_arguments("sft", (SFTArguments, ICAEArguments, ICAESFTConfig), argv)
    if script.early_stopping_patience is not None and config.metric_for_best_model is None:
        raise ValueError(
            "Expected `metric_for_best_model` beside `early_stopping_patience`, for example `--metric_for_best_model "
            "eval_loss --load_best_model_at_end true`, got none."
        )
    set_seed(config.seed)  # before the adapter and the slots get their first values
    model = load_model(script, icae, cpu=config.use_cpu)
    train_dataset, eval_dataset = load_data(script, config.seed, max_prompts=config.max_prompts)
    if eval_dataset is not None:
        eval_dataset = eval_dataset.shuffle(seed=config.seed).take(script.eval_samples)
    documents = load_documents(script, script.document_files, config.seed)
    callbacks = []
    if script.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(script.early_stopping_patience))
        config.restore_callback_states_from_checkpoint = True  # or a resumed run would be patient anew
    trainer = ICAESFTTrainer(model, config, train_dataset, eval_dataset, callbacks=callbacks, documents=documents)
    if script.streaming:
        # Samples of one kind stand together in sets of this kind.
        trainer.train_dataset = trainer.train_dataset.shuffle(seed=config.seed, buffer_size=10_000)
    run(trainer, script, icae)


if __name__ == "__main__":
    main()
