"""The images of the examples: where they come from, and data modules that load them."""
