"""
`icae pretrain --config FILE.yaml`: pretraining from a configuration file, with TRL's parser.

Every field of [`ScriptArguments`], [`ICAEArguments`] and [`ICAEPretrainingConfig`] can stand in the file or, as
`--field value`, behind it. A run that was interrupted goes on with `--resume true`, exactly where its last checkpoint
is (within the first pass through a stream).
"""

from transformers import set_seed

from .pretraining_config import ICAEPretrainingConfig
from .pretraining_trainer import ICAEPretrainingTrainer
from .scripts import ICAEArguments, ScriptArguments, load_data, load_model, read_arguments, run


def main(argv: list[str] | None = None) -> None:
    script, icae, config = read_arguments("pretrain", (ScriptArguments, ICAEArguments, ICAEPretrainingConfig), argv)
    set_seed(config.seed)  # before the adapter and the slots get their first values
    model = load_model(script, icae, cpu=config.use_cpu)
    trainer = ICAEPretrainingTrainer(model, config, *load_data(script, config.seed, config.text_column))
    if trainer.eval_dataset is not None:
        # Shuffled, so that all sources are in the few samples, and that neighbours are of different texts.
        trainer.eval_dataset = trainer.eval_dataset.shuffle(seed=config.seed).take(script.eval_samples)
    if script.streaming:
        # Samples cut from one document stand together in sets of this kind.
        trainer.train_dataset = trainer.train_dataset.shuffle(seed=config.seed, buffer_size=10_000)
    run(trainer, script, icae)


if __name__ == "__main__":
    main()
