"""Which convolution and BatchNorm form a pair: the proof from data flow, and the reason where there is no pair."""
