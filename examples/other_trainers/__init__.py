"""Tune mode in trainers other than Lightning's: one short file for each, shown in `docs/use/other-trainers.md`."""
