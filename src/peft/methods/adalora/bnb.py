"""AdaLoRA's layers over weights of bitsandbytes."""

from . import model

SVDLinear4bit, SVDLinear8bitLt = model.NAMES["bnb 4bit"], model.NAMES["bnb 8bit"]
