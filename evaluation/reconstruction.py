"""
`icae evaluate reconstruction --data FILE.parquet`: how much of held-out text comes back from its slots.

The measures of the pretraining trainer — loss, accuracy, BLEU, exactly matching prefix, continuation, and the control
with another text's slots — for one or several checkpoints on the same samples.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import load_dataset

from icae.cli import load_model
from icae.evaluation.record import write_record
from icae.trainers import ICAEPretrainingConfig, ICAEPretrainingTrainer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How much of held-out text comes back from its slots.")
    parser.add_argument("--data", required=True, help="Parquet file of documents (column `text`)")
    parser.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help="ICAEs (default: the embedded checkpoint)")
    parser.add_argument("--base", help="their base, if not where the ICAE says")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--reconstructions", type=int, default=16, help="samples that are really written out")
    parser.add_argument("--max-spans", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/reconstruction.json"))
    arguments = parser.parse_args(argv)
    results = {}
    for model_name in arguments.models or ["embedded="]:
        name, _, folder = model_name.rpartition("=")
        model = load_model(folder or None, arguments.base, "bfloat16", is_trainable=True)
        documents = load_dataset("parquet", data_files=arguments.data, split="train")
        with tempfile.TemporaryDirectory() as output_dir:
            config = ICAEPretrainingConfig(
                output_dir=output_dir,
                max_spans=arguments.max_spans,
                eval_reconstructions=arguments.reconstructions,
                per_device_eval_batch_size=arguments.batch_size,
                seed=arguments.seed,
                report_to="none",
            )
            trainer = ICAEPretrainingTrainer(model, config, documents, documents)
            samples = trainer.eval_dataset.shuffle(seed=arguments.seed).take(arguments.samples)
            trainer.evaluate(samples)
        found = trainer.state.log_history[-1]
        skipped = ("runtime", "per_second", "num_tokens", "eval_loss", "preparation_time")
        results[name or folder] = {
            key.removeprefix("eval_"): value
            for key, value in found.items()
            if key.startswith("eval_") and not key.endswith(skipped)
        }
        tokens = sum(len(ids) for ids in samples["context_ids"])
    record = {
        "what": "held-out text from its slots",
        "context_tokens": tokens,
        "arguments": vars(arguments) | {"output": str(arguments.output)},
        "models": results,
    }
    write_record(arguments.output, record)
    for name, row in results.items():
        print(name, "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
