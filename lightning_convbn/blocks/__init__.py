"""Runs blocks of a model a second time, in the backward pass, so that what lies inside of them is not kept."""
