"""Token weights by gradient attribution (scripts/attribution_weights.py): against differences, and in a run."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sepo.cli import main
from sepo.data.tables import read_table
from tiny_models import tiny_model, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "attribution_weights.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("attribution_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# RMSNorm and rotary positions always compute in float32, so steps are larger and tolerances wider.
@pytest.mark.parametrize(("architecture", "step", "rel"), [("gpt2", 1e-5, 1e-6), ("llama", 3e-3, 2e-2)])
def test_attribution_is_the_gradient_that_differences_give(script, architecture, step, rel):
    model = tiny_model(architecture, torch.float64).eval()
    prompt, response = [5, 9, 3], [7, 7, 2, 11]
    found = script.attribution(model, prompt, response)
    embedded = model.get_input_embeddings()(torch.tensor([[*prompt, *response]])).detach()

    def largest(at, dimension, by):
        moved = embedded.clone()
        moved[0, at, dimension] += by
        return model(inputs_embeds=moved, use_cache=False).logits[0, -1].max().item()

    for t in range(len(response)):
        slopes = [
            (largest(len(prompt) + t, i, step) - largest(len(prompt) + t, i, -step)) / (2 * step)
            for i in range(embedded.shape[-1])
        ]
        assert found[t].item() == pytest.approx(sum(map(abs, slopes)), rel=rel)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_importance_is_the_formula_written_out(script):
    norms = [0.5, 2.0, 1.0, 0.1, 3.0]
    prior = [math.exp(-0.5 * ((t - 2) / 1.25) ** 2) for t in range(5)]
    expected = [0.7 * n / (sum(norms) / 5) + 0.3 * p / (sum(prior) / 5) for n, p in zip(norms, prior, strict=True)]
    found = script.importance(torch.tensor(norms, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.mean().item() == pytest.approx(1)
    assert script.importance(torch.zeros(1)).tolist() == [1.0]


def test_a_run_imports_what_the_script_wrote(script, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Is it {i}?", "chosen": f"Yes, {i}!", "rejected": f"no {i} {i}"} for i in range(12)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{source: {tmp_path / 'prefs.jsonl'}, held_out: 3}}\n"
        f"reference: {{model: {tmp_path / 'model'}}}\ndevice: cpu\n"
        "policy: {objective: tis_dpo, training: {batch_size: 4, num_train_epochs: 1}}\n"
        "select: {credit: reward, k_chosen: 1, k_rejected: 1, include_end: true}\n"
        "eval: {prompts: 0}\n"
    )
    out = tmp_path / "weights.parquet"
    monkeypatch.setattr(sys, "argv", ["attribution_weights.py", str(recipe), "--out", str(out)])
    script.main()
    run = tmp_path / "run"
    assert main(["run", str(recipe), f"output_dir={run}", f"oracle.rewards={out}"]) == 0
    model = tiny_model("llama")
    for row in read_table(run / "selection", "selection").to_pylist():
        for side in ("chosen", "rejected"):
            norms = script.attribution(model, row["prompt_ids"], row[f"{side}_ids"])
            assert row[f"{side}_weights"] == pytest.approx(script.importance(norms).tolist(), rel=1e-4)
