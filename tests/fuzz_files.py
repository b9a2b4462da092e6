"""Random adapter files and configurations: whatever they hold, loading ends with an error that has a name, or works.

Run `python tests/fuzz_files.py 100000` for that many inputs, offline, on one core; `test_faults.py` runs a few.
An input is a find if it ends in another exception than those below, takes longer than `SECONDS`, takes more memory than
`ROOM`, or leaves the model changed.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.files import open_weights
from peft.errors import PeftError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMED = (ValueError, TypeError, PeftError, NotImplementedError)
SECONDS = 10
ROOM = 1 << 30  # bytes of address space beyond what the process has at the start

# Strategies ---------------------------------------------------------------------------------------------------------

HUGE = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)])
WORDS = st.sampled_from(
    [
        *("F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F33", "", "a", "lora_A", "fc1", "default", "LORA", "\0"),
        *("all-linear", "*", "(", "[", ".*", "fc[12]", "NaN", "é", "__metadata__", "x" * 5000),
        "base_model.model.fc1.lora_A.weight",
    ]
)
SCALARS = st.none() | st.booleans() | HUGE | st.integers(-9, 9) | st.floats() | WORDS | st.text(max_size=6)
NAMES = WORDS | st.text(max_size=4)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v, max_size=4), max_leaves=8)
SIZES = st.lists(HUGE | st.integers(0, 9), max_size=4)
ENTRY = st.fixed_dictionaries({"dtype": WORDS, "shape": SIZES, "data_offsets": SIZES}) | VALUES
HEADS = st.dictionaries(WORDS | st.text(max_size=8), ENTRY, max_size=5).map(lambda h: json.dumps(h).encode())
LENGTHS = st.none() | st.sampled_from([0, 1, 7, 8, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 400)


@st.composite
def made_up(draw) -> bytes:
    """A file made of a head, its length (right or wrong) and data."""
    head = draw(HEADS | st.binary(max_size=60))
    length = draw(LENGTHS)
    return (len(head) if length is None else length).to_bytes(8, "little") + head + draw(st.binary(max_size=64))


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """A good file with bytes changed, cut off, put in or taken out."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at:]
            case 2:
                data[at:at] = draw(st.binary(max_size=9))
            case 3:
                del data[at : at + draw(st.integers(1, 9))]
            case 4:
                data[at : at + 1] = bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) if data else b""
    return bytes(data)


@st.composite
def changed(draw, adapters: list[tuple[dict, bytes]]) -> tuple[bytes, bytes]:
    """(weights, a configuration with fields that hold something else, or with other bytes)."""
    config, weights = copy.deepcopy(draw(st.sampled_from(adapters)))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(config)) | WORDS)
        config[name] = draw(VALUES)
    text = json.dumps(config).encode()
    return weights, draw(damaged(text)) if draw(st.integers(0, 9)) == 0 else text


# What is tried ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))


class Hang(BaseException):
    """An input took too long."""


@contextlib.contextmanager
def bounded(seconds: int = SECONDS):
    """Raise Hang if the block takes longer."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """A folder with an adapter of each method, and the counts of what came of the inputs."""

    def __init__(self, folder: Path, methods: list[str] | None = None) -> None:
        torch.manual_seed(0)
        self.folder, self.net = folder, Net()
        self.seen: collections.Counter[str] = collections.Counter()
        self.finds: list[str] = []
        self.adapters = adapters(folder, methods)
        get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc1", "fc2"])).save_pretrained(folder)
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without a checksum, which would end most loads
        self.good, self.config = (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes()
        self.before = self._state()

    def _state(self) -> list:
        return [(n, id(m), sorted(m.__dict__)) for n, m in self.net.named_modules()] + [
            (n, id(p), p.requires_grad, p._version) for n, p in self.net.named_parameters()
        ]

    def _judge(self, kind: str, data: bytes, run) -> None:
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()
            outcome = "loaded"
        except NAMED as error:
            outcome = type(error).__name__
        except RuntimeError as error:
            outcome = "RuntimeError" if "size mismatch" in str(error) or "does not fit" in str(error) else ""
            self._find(kind, data, error) if not outcome else None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = ""
            self._find(kind, data, error)
        self.seen[f"{kind}: {outcome or 'FIND'}"] += 1
        if self._state() != self.before:
            self._find(kind, data, AssertionError("the model has changed"))
            self.net, _ = Net(), None
            self.before = self._state()

    def _find(self, kind: str, data: bytes, error: BaseException) -> None:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        text = f"{kind}: {type(error).__name__}: {str(error)[:200]}\n{where}"
        if text not in self.finds:
            self.finds.append(text)
            self.finds_inputs = [*getattr(self, "finds_inputs", []), (text, data)]

    def head(self, data: bytes) -> None:
        """Read a file by itself."""
        file = self.folder / "x.safetensors"
        file.write_bytes(data)
        self._judge("head", data, lambda: open_weights(file).read())

    def load(self, weights: bytes, config: bytes, kind: str = "load") -> None:
        """Load an adapter of these two files onto the small model."""
        (self.folder / WEIGHTS).write_bytes(weights)
        (self.folder / CONFIG).write_bytes(config)

        def run() -> None:
            wrapped = PeftModel.from_pretrained(self.net, self.folder)
            wrapped.unload()
            for p in self.net.parameters():
                p.requires_grad_(True)
            self.net.__dict__.pop("peft_config", None)
            self.net.train()

        self._judge(kind, config if kind == "config" else weights, run)


def adapters(folder: Path, methods: list[str] | None) -> list[tuple[dict, bytes]]:
    """(fields, weights) of an adapter of each method that needs no arguments but its targets."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    found = []
    for name in methods or list(PEFT_TYPE_TO_CONFIG_MAPPING):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[name]
            config = kind(target_modules=["fc1", "fc2"]) if "target_modules" in kind.__dataclass_fields__ else kind()
            get_peft_model(Net(), config).save_pretrained(folder)
            found.append((json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()))
    return found


def campaign(bench: Bench, inputs: int, number: int = 0) -> None:
    """Try that many inputs: two fifths heads, two fifths whole loads of damaged weights and odd configurations each."""
    options = settings(
        max_examples=max(inputs // 5, 1),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @seed(number)
    @options
    @given(made_up())
    def heads(data):
        bench.head(data)

    @seed(number)
    @options
    @given(damaged(bench.good))
    def damaged_heads(data):
        bench.head(data)

    @seed(number)
    @options
    @given(damaged(bench.good))
    def loads(data):
        bench.load(data, bench.config)

    @seed(number)
    @options
    @given(made_up())
    def strange_loads(data):
        bench.load(data, bench.config)

    @seed(number)
    @options
    @given(changed(bench.adapters))
    def configs(data):
        bench.load(*data, "config")

    for part in (heads, damaged_heads, loads, strange_loads, configs):
        part()


def main() -> None:
    """Run a campaign in rounds and report."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    torch.set_num_threads(1)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    folder = Path(tempfile.mkdtemp())
    bench, start, done, number = Bench(folder), time.monotonic(), 0, int(os.environ.get("SEED", "0"))
    try:
        while done < total:
            campaign(bench, min(5000, total - done), number)
            done, number = sum(bench.seen.values()), number + 1
            print(f"{done} inputs, {len(bench.finds)} finds, {time.monotonic() - start:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for outcome, count in sorted(bench.seen.items()):
        print(f"{count:8d}  {outcome}")
    for text, data in getattr(bench, "finds_inputs", []):
        print(f"\n{text}\n{data[:3000]!r}")
    sys.exit(bool(bench.finds))


if __name__ == "__main__":
    main()
