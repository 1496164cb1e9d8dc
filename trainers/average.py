"""
`icae average CHECKPOINT CHECKPOINT --output FOLDER`: a checkpoint whose weights are a mean of those of others.

For checkpoints of one training, such as the start and the end of its last stage: the mean often keeps what the stage
forgot and most of what it learnt (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903).
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from icae.hub_upload.layout import ADAPTER_WEIGHTS
from icae.model_cards import write_card
from icae.model_cards.facts import CardFacts, TrainingStage
from icae.modeling_icae.pretrained_icae import SLOTS_FILE


ARCHITECTURE = (
    *("base_model_fingerprint", "memory_type", "span_length", "compression_ratio", "num_memory_slots"),
    *("encoder_layout", "decoder_layout", "lora_r", "lora_alpha"),
)
AVERAGE = "average of checkpoints"  # what a card calls the weights of a mean, with the last stage's settings
# Of a run, not of its weights, so not of the mean.
OF_A_RUN = (
    *("checkpoint-*", "run.json", "trainer_state.json", "training_args.bin"),
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "runs"),
    *("latest", "global_step*", "zero_to_fp32.py"),  # DeepSpeed's
)


def average(checkpoints: list[Path], output: Path, weights: list[float] | None = None) -> None:
    """
    Writes the mean of saved ICAEs, computed in float32 and stored in the last one's dtype. All else is taken from the
    last; its card names the stages of all of them, each once.

    Args:
        checkpoints (`list[Path]`): folders, as `save_pretrained` or a trainer wrote them.
        output (`Path`): the folder to write.
        weights (`list[float]`, *optional*): of the checkpoints, 1 in all; equal by default.

    Raises:
        `ValueError`: if `output` exists, the weights do not fit, or the checkpoints are damaged or not of one
            architecture.
    """
    if output.exists():
        raise ValueError(
            f"Expected an output folder that does not exist yet, got {output}; name another or remove it."
        )
    weights = weights or [1 / len(checkpoints)] * len(checkpoints)
    # Said this way round, it refuses NaN, which is neither below nor above anything.
    if len(weights) != len(checkpoints) or not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
        raise ValueError(
            f"Expected a weight of at least 0 for each of {len(checkpoints)} checkpoints, 1 in all, got {weights}."
        )
    configs = [json.loads((folder / "config.json").read_text()) for folder in checkpoints]
    tensors = {file: [_tensors(folder / file) for folder in checkpoints] for file in (ADAPTER_WEIGHTS, SLOTS_FILE)}
    last = checkpoints[-1]
    for index, other in enumerate(checkpoints[:-1]):
        differences = [name for name in ARCHITECTURE if configs[index].get(name) != configs[-1].get(name)]
        for own in tensors.values():
            first, second = ({name: tensor.shape for name, tensor in own[i].items()} for i in (index, -1))
            differences += sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
        if differences:
            raise ValueError(
                f"Expected checkpoints of one architecture, got {other} and {last}, whose {', '.join(differences)} "
                "differ; average those of one training."
            )
    means = {
        file: {
            name: torch.stack([weight * part[name].float() for weight, part in zip(weights, own, strict=True)])
            .sum(dim=0)
            .to(tensor.dtype)
            for name, tensor in own[-1].items()
        }
        for file, own in tensors.items()
    }
    facts = CardFacts.load(last)
    facts.stages = _stages_of_all([CardFacts.load(folder).stages for folder in checkpoints])
    facts.reconstruction = facts.answers = None  # what was measured of the last one is not of the mean
    if facts.stages:
        facts.stages[-1].evaluation = {}
        settings = facts.stages[-1].settings
        said = " : ".join(f"{weight:.2g}" for weight in weights)
        settings[AVERAGE] = f"{settings[AVERAGE]}, then {said}" if AVERAGE in settings else said
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as aside:  # until all is written, it is a copy of the last one
        folder = Path(aside, output.name)
        shutil.copytree(last, folder, ignore=shutil.ignore_patterns(*OF_A_RUN))
        for file, mean in means.items():
            save_file(mean, folder / file, metadata={"format": "pt"})
        facts.save(folder)
        if (folder / "README.md").is_file():
            write_card(folder)
        folder.rename(output)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"Expected the tensors of a saved ICAE in {file}, got a damaged file ({error}).") from error


def _stages_of_all(own: list[list[TrainingStage]]) -> list[TrainingStage]:
    """Those of the first checkpoint, then what each of the others has beside them."""
    stages: list[TrainingStage] = []
    seen = []
    for stage in chain(*own):
        # A run that other runs went on from, and the same run as the last of a mean, are one stage.
        settings = {name: value for name, value in stage.settings.items() if name != AVERAGE}
        run = replace(stage, settings=settings, evaluation={})
        if run not in seen:
            seen.append(run)
            stages.append(stage)
    return stages


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="icae average", description="A checkpoint whose weights are a mean of those of others."
    )
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", help="folders of saved ICAEs of one training, the last last"
    )
    parser.add_argument("--weights", type=float, nargs="+", help="one each, 1 in all (default: equal)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    average(arguments.checkpoints, arguments.output, arguments.weights)
    print(f"the mean of {len(arguments.checkpoints)} checkpoints in {arguments.output}")


if __name__ == "__main__":
    main()
