"""How quantised weights are held: one file for each library or published format, found by class name.

None of these files imports a quantiser when it is imported; see `core/storage.py` for what each states.
"""
