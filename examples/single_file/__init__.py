"""Pages to copy: one file each, plain Lightning, no command line."""
