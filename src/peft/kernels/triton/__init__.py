"""The Triton forms of `kernels`: what runs on a GPU in place of the torch forms, which are the definition.

`language` (Triton, or what stands for it), `segments` (whose rows are where), `thin` (the products with a thin factor),
`launch` (calling them), `update` (a low-rank update, dropout inside), `bank` (a mixed batch), `gain` and `gained`
(DoRA's norm and scale), `probe` (are they right on this machine?). `kernels.choice` is the only door.
"""
