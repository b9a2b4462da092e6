"""AdaLoRA's layers over weights of GPTQ."""

from . import model

SVDQuantLinear = model.NAMES["gptq"]
