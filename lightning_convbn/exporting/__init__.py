"""The Deploy copy and its files: fuse, write whole, read back, compare."""
