"""A merged model behind `transformers serve` and `transformers chat`, as docs/how-to/after-training.md says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from sepo.cli import main
from sepo.models.adapters import new_adapter
from sepo.models.saving import save_model
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings
from tiny_models import tiny_model, tiny_tokenizer

COMMAND = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())"]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'"),
]


@pytest.fixture
def merged(tmp_path):
    save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base")
    model = new_adapter(load_model(tmp_path / "base", device="cpu"), LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_model(model, tiny_tokenizer(), tmp_path / "policy")
    assert main(["merge", "--adapter", str(tmp_path / "policy"), "--out", str(tmp_path / "merged")]) == 0
    return tmp_path / "merged"


@pytest.fixture
def server(merged):
    """The address of a server."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "serve", str(merged), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_a_merged_model_is_served_and_chatted_with(merged, server):
    messages = [{"role": "user", "content": "Is it 3?"}]
    body = {"model": str(merged), "messages": messages, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = AutoModelForCausalLM.from_pretrained(merged).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert reply == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it refuses localhost too
    chat = subprocess.run(
        [*COMMAND, "chat", str(merged), server, "max_new_tokens=8"],
        input="Is it 3?\nn\n!exit\n", capture_output=True, text=True, timeout=240, env=online,
    )  # fmt: skip
    assert "tokens in" in chat.stdout, chat.stdout + chat.stderr
