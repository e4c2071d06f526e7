"""The networks of the templates, by name."""
