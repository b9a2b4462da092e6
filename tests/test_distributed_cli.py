"""`peft train` on two processes: the losses of one process with the same batch, also under accelerate's launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import peft
from peft.utils.other import fully_shard_model
from tests import distributed_work as work

for package in ("typer", "rich", "transformers", "accelerate", "tokenizers"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
RUN = ["--steps", "4", "--rank", "2", "--lr", "0.01", "--dtype", "fp32"]  # launchers take --r
# accelerate takes a machine without a GPU for one process, unless it is told that there are several
LAUNCH = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, a tokenizer of bytes and forty examples."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("data")
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(letters)}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=1)).save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}: ", "completion": "yes" * (1 + i % 3)} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def train(data: Path, output: str, *command: str, batch: int) -> list[float]:
    """The losses of a run."""
    where = ["--model", str(data / "model"), "--data", str(data / "train.jsonl"), "--output", str(data / output)]
    line = [sys.executable, "-m", *command, "-m", "peft", "train", *where, *RUN, "--batch", str(batch)]
    line = line if command else [sys.executable, "-m", "peft", "train", *where, *RUN, "--batch", str(batch)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not command or "2 x cpu" in done.stdout
    log = json.loads((data / output / "training_log.json").read_text())
    return [step["loss"] for step in log["steps"]]


def test_accelerate_launches_what_one_process_does_with_twice_the_batch(data: Path) -> None:
    one = train(data, "one", batch=8)
    two = train(data, "two", "accelerate.commands.launch", "--multi_gpu", *LAUNCH, batch=4)
    # float32 gradients summed in another order
    assert two == pytest.approx(one, rel=1e-5)
    found = [peft.utils.load_peft_weights(str(data / name)) for name in ("one", "two")]
    work.same_state(found[0], found[1], rtol=1e-3, atol=1e-5)


# What is kept of a run whose parameters are spread -----------------------------------------------------------------


def session(folder: str, steps: list[dict[str, float]]) -> Any:
    """What saving and restoring need of a session, over a model that FSDP2 has spread."""
    from peft.cli.state import Log

    model = fully_shard_model(work.adapted("lora"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = SimpleNamespace(output=Path(folder), data="", method="lora", r=4, model="net")
    log = Log({}, examples=3, steps=steps)
    leads = dist.get_rank() == 0
    return SimpleNamespace(plain=model, optimizer=optimizer, options=options, log=log, leads=leads, train=[0] * 3)


def steps(run: Any, rank: int, count: int) -> None:
    for _ in range(count):
        work.loss_of(run.plain(work.half(rank))).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


def check(name: str, rank: int) -> None:
    """A run that stops and goes on ends, to the bit, where an unbroken one does."""
    from peft.cli.save import restore, save_adapter, save_state

    folder = work.shared_folder()
    unbroken = session(folder, [{"loss": 1.0, "seconds": 1.0}])
    steps(unbroken, rank, 2)
    save_state(unbroken)
    save_adapter(unbroken)
    dist.barrier()
    resumed = session(folder, [])
    restore(resumed)
    assert resumed.log.steps == unbroken.log.steps
    for run in (unbroken, resumed):
        steps(run, rank, 2)
    found = [peft.get_peft_model_state_dict(run.plain) for run in (unbroken, resumed)]
    work.same_state(*found)
    assert (Path(folder) / "adapter_model.safetensors").is_file()


def test_a_spread_run_goes_on_from_its_state(tmp_path: Path) -> None:
    told = work.outcomes(__name__, ["resume"], tmp_path)
    assert told["resume"] is None, told["resume"]
