"""Why a BatchNorm is not folded. All reasons are here; `docs/use/troubleshooting.md` explains each of them.

A reason completes the sentence "The BatchNorm ...". It is one line long, and a user can act on it.
"""

NO_STATISTICS = "has no running statistics, so it always normalises with the batch's"
LAZY = "is lazy and not initialised yet: run one batch through the model first"
UNTRAINED = "was never trained (mean 0, variance 1)"
UNFROZEN = "was not frozen when the model was converted"
NOT_GIVEN = "is in none of the pairs given"
UNTRACED = "`{name}` ({cls}) can't be traced: {error}"
NEVER_CALLED = "is never called by the model's forward in its {state} state"
CALLED_OFTEN = "is called {count} times"
NO_CONVOLUTION = "its input comes from {source}, not from a convolution"
SHARED_CONVOLUTION = "its convolution `{conv}` is called {count} times"
SECOND_CONSUMER = "the output of its convolution `{conv}` is also used by {user}"
OTHER_FSDP_UNIT = "FSDP gathers it and its convolution `{conv}` one after the other: shard a block that holds both"
UNKNOWN_CONVOLUTION = "`{conv}` is a {cls}, which is not in the table of supported layers"
UNKNOWN_NORM = "is a {cls}, which is not in the table of supported layers"
OTHER_DIMENSIONS = "`{conv}` ({conv_cls}) does not give a {cls} the input it wants"
OTHER_CHANNELS = "`{conv}` gives {given} channels, not the {wanted} that it has"
DISAGREEMENT = "the trace and the recorded pass disagree: by the trace a pair, but in the pass it {seen}"
CHANGED_OUTPUT = "folded, it changed the output by {deviation:.1e}"
CHANGED_TOGETHER = "folded together, the pairs changed the output by {deviation:.1e}"
