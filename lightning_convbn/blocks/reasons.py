"""Why a block does not run again in the backward pass. `docs/use/troubleshooting.md` explains each reason.

A reason completes the sentence "The block ...". It is one line long, and a user can act on it.
"""

OWN_FORWARD = "has a forward of its own, set on the module"
SCRIPTED = "is a module in TorchScript, whose code can't be changed"
COMPILED = "is compiled by itself, and a compiler decides what is kept"
SHARDED = "FSDP gathers parameters for its forward"
CROSSED = "`{conv}` and `{bn}` are a pair, and only one of the two is in it"
WRITES_INPUT = "writes a tensor that it is given, in place"
WRITES_STATE = "writes `{name}`, and would do so twice"
TAKES = "is given a {cls}; tensors, numbers, texts and None can be given again, and lists, tuples and dicts of them"
DRAWS = "draws random numbers with Python's `random`, NumPy or a generator of its own, whose state is not put back"
READS_STATISTICS = "reads `{name}`, which is another one in a second run"
SYNCHRONISED = "has a SyncBatchNorm in Train mode, which would ask the other processes a second time"
HOOKED = "has a hook in front of a layer, which would run twice"
NEEDS_DATA = "can't run on tensors without data, so nobody knows if it can run twice: {error}"
