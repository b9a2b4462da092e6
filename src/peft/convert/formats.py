"""The table of formats: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from .diffusers import Diffusers
from .folder import PeftFolder, PlainLora
from .format import Format
from .gguf import Gguf
from .kohya import Kohya
from .lorax import Lorax
from .sglang import Sglang
from .vllm import Vllm

_ALL = (PlainLora(), PeftFolder(), Kohya(), Diffusers(), Vllm(), Sglang(), Lorax(), Gguf())
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
