"""Fuzzing of everything that an unauthenticated client, or a hostile storage node, may send:
``python -m tests.fuzz --help``.

Theory of operation. A *target* (``targets``) is a function of bytes, with an oracle: it returns when the effect of the
bytes was right, and raises when it was not. Its docstring states the oracle. The inputs come from two engines: atheris,
where it is installed (``driver``), which keeps the inputs that reach new code; and a mutator of our own (``mutator``),
whose n-th input depends on nothing but the target's name, n and the corpus. The *corpus* is in the tree: few small
inputs for each target, which together reach all code that the engines have reached so far. The tests replay the corpus,
count steps and memory (``bounds``), and plant one bug in each target's code, which the target must notice.
"""
