"""`python -m peft` is the `peft` command."""

from peft.cli import main

main()
