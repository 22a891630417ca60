"""A script: let a model folder answer prompts, with transformers alone.

Run by path in isolated mode (``python -I plain_answers.py MODEL REQUEST RESPONSE``), so that nothing of this
package is imported: whoever receives a merged model won't have it either. REQUEST holds ``prompts``,
``max_new_tokens``, ``batch_size`` and ``end_of_turn``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_folder: str, request_file: str, response_file: str) -> None:
    """Answer the prompts of the request file greedily and write the answers."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)  # comes in eval mode
    end = tokenizer.convert_tokens_to_ids(request["end_of_turn"])
    answers: list[str] = []
    for start in range(0, len(request["prompts"]), request["batch_size"]):
        prompts = request["prompts"][start : start + request["batch_size"]]
        rows = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            generated = model.generate(
                input_ids=rows["input_ids"],
                attention_mask=rows["attention_mask"],
                max_new_tokens=request["max_new_tokens"],
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        texts = tokenizer.batch_decode(generated[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    ours = sorted(name for name in sys.modules if name.startswith("lightning_lora"))
    response = {"answers": answers, "imported_from_lightning_lora": ours}
    Path(response_file).write_text(json.dumps(response), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
