"""
Run by path in a process of its own (`python -I alone.py FOLDER OPTIONS OUTPUT PATH…`): loads a folder as somebody does
who has no `icae`, with the folder's own code, and writes down what the model says about a fixed input.
"""

import json
import sys


if __name__ == "__main__":
    sys.path += sys.argv[4:]  # where the caller finds its packages; `-I` knows neither $PYTHONPATH nor the user's own

import torch
from safetensors.torch import save_file
from transformers import AutoModel


PROMPT = "Who lives there, and since when?"
CONTINUATION = 8  # tokens


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """
    Slots, losses and the scores of an answer's first token, for two rows of token ids, one of them in two spans; and
    a prompt's token ids.
    """
    # Some bases have few positions: in some layouts the context stands there three times, read, as slots, and written.
    positions = model.config.num_positions or 1_000
    room = positions - len(model._prefix("instruction")) - len(model.encode_prompts([PROMPT])[0]) - CONTINUATION
    length = max(2, min(model.config.span_length, 64, room // 3))
    # Spread over the vocabulary by a large prime; the second row has half the length.
    ids = torch.arange(1, 2 * length + 1).mul(7919).remainder(model.config.text_config.vocab_size).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model(ids, mask, span_length=length - length // 4, continuation_ids=ids[:, :CONTINUATION])
    answer = model.generate(
        memory=output.memory,
        prompt=PROMPT,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tensors = {
        "slots": output.memory.slots[output.memory.mask],
        "scores": answer.logits[0],
        "prompt": torch.tensor(model.tokenizer(PROMPT)["input_ids"]),
    }
    for task, losses in output.token_losses.items():
        tensors[f"{task} losses"] = losses[output.token_masks[task]]
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


class _Missing:
    """Makes `icae` impossible to import, even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "icae":
            raise ModuleNotFoundError("No module named 'icae'", name="icae")


def main(folder: str, options: str, output: str, *paths: str) -> None:
    sys.meta_path.insert(0, _Missing())  # type: ignore[arg-type]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **json.loads(options))
    model.eval()
    save_file(outputs(model), output, metadata={"fingerprint": model.fingerprint})


if __name__ == "__main__":
    main(*sys.argv[1:])
