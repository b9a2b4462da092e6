"""`python -m peft.cli` is the `peft` command, also under `accelerate launch -m` and `torchrun -m`."""

from peft.cli import main

main()
