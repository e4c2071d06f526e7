"""The paper's experiment: four modes at several learning rates."""
