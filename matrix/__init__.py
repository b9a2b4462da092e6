"""The capability matrix: every method x (layouts, abilities), each cell a small experiment that is really run.

`python -m matrix` measures the installed library and writes `docs/matrix.md`; any interpreter with any `peft` will do,
so the same experiments measure the peer.
"""
