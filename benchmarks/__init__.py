"""Time and memory of one `peft` against another, in alternation, with the bare base model as the limit.

    python -m benchmarks --peer OTHER/bin/python

Both interpreters do the same work through the public interface; each repetition runs once in each of them, on
one thread, in process time. What is counted rather than timed (bytes, calls, modules, weights) is exact.
"""
