"""What a module becomes in each mode: class swap, convolutions, norms, activations, the table of supported layers."""
