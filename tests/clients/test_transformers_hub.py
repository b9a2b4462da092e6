"""Pushing to the hub: everything but the wire. The client of huggingface_hub talks to a function in place of a host."""

from __future__ import annotations

import base64
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import peft
from peft import LoraConfig, PeftModel, get_peft_model

from . import tiny
from .test_transformers_trainer import arguments, config, trainer_of
from .tiny import TARGETS, llama, moved

transformers = pytest.importorskip("transformers", "4.57")
huggingface_hub = pytest.importorskip("huggingface_hub", "1.0", reason="the client's transport can be set since 1.0")


class Host:
    """Answers what the hub would answer, and keeps what was committed: {repository: {file: bytes}}."""

    def __init__(self, library: Any):
        self.library, self.files, self.messages, self.private = library, {}, [], []

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.private.append(asked.get("private") or asked.get("visibility") == "private")
            self.files.setdefault(name, {})
            return self.library.Response(200, json={"url": f"https://huggingface.co/{name}", "id": name})
        if path == "/api/whoami-v2":
            return self.library.Response(200, json={"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.library.Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            asked = json.loads(request.content)["files"]
            plain = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self.library.Response(200, json={"files": plain})
        if "/commit/" in path:
            return self.commit(path.split("/api/models/")[1].split("/commit/")[0], request.content)
        return self.library.Response(404, json={"error": f"nothing at {path}"})

    def commit(self, name: str, content: bytes) -> Any:
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"https://huggingface.co/{name}/commit/{'0' * 40}"
        return self.library.Response(200, json={"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def fetch(self, name: str, folder: Path) -> Path:
        """The files of a repository as a folder."""
        for file, content in self.files[name].items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        return folder


@pytest.fixture
def host():
    library = importlib.import_module(type(huggingface_hub.get_session()).__module__.split(".")[0])
    host = Host(library)
    default = huggingface_hub.utils._http.default_client_factory
    huggingface_hub.set_client_factory(lambda: library.Client(transport=library.MockTransport(host)))
    yield host
    huggingface_hub.set_client_factory(default)


def test_a_trainer_pushes_the_adapter_and_a_card_that_names_the_library(host, tmp_path):
    model = get_peft_model(llama(), config())
    trainer = trainer_of(
        model, tmp_path / "run", max_steps=3, push_to_hub=True, hub_model_id="me/tuned", hub_token="t",
        hub_strategy="end",
    )  # fmt: skip
    assert trainer.hub_model_id == "me/tuned"
    trainer.train()
    trainer.push_to_hub(commit_message="the end", tags=["mine"])
    assert host.messages == ["the end"]
    files = host.files["me/tuned"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "training_args.bin"} <= set(files)
    assert not any(name.startswith(("checkpoint-", "model")) for name in files)
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"mine", "lora", "transformers"} <= set(card.data.tags)
    assert f"PEFT {peft.__version__}" in card.text
    loaded = PeftModel.from_pretrained(llama(), host.fetch("me/tuned", tmp_path / "copy"))
    assert (tiny.logits(loaded) == tiny.logits(model.eval())).all()


def test_a_trainer_pushes_each_checkpoint_s_adapter_on_its_way(host, tmp_path):
    model = get_peft_model(llama(), config())
    trainer = trainer_of(
        model, tmp_path / "run", push_to_hub=True, hub_model_id="me/often", hub_token="t", hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    trainer._finish_current_push()
    assert "Training in progress, step 3" in host.messages and "Training in progress, step 6" in host.messages
    host.fetch("me/often", tmp_path / "copy")
    assert tiny.same(tiny.tensors(tmp_path / "copy"), peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("way", ["PeftModel", "bare"])
def test_a_model_pushes_its_adapter(way, host, tmp_path):
    base = llama()
    if way == "bare":
        base.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
        model = base
    else:
        model = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS))
    moved(model)
    model.push_to_hub("me/adapter", private=True, token="t", commit_message="first")
    assert host.private == [True] and host.messages == ["first"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(host.files["me/adapter"])
    loaded = PeftModel.from_pretrained(llama(), host.fetch("me/adapter", tmp_path))
    assert (tiny.logits(loaded) == tiny.logits(model)).all()


def test_a_configuration_pushes_itself(host, tmp_path):
    config().push_to_hub("me/config", token="t")
    assert peft.PeftConfig.from_pretrained(host.fetch("me/config", tmp_path)).r == 2


def test_a_card_is_brought_up_to_date_without_losing_what_the_trainer_wrote(tmp_path):
    model = get_peft_model(llama(), config())
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tuned", dataset="lines", license="apache-2.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0"
    assert "tuned" in card.text and "learning_rate: 0.05" in card.text and f"PEFT {peft.__version__}" in card.text
    assert arguments(tmp_path).output_dir == str(tmp_path)
