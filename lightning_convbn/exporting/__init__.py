"""The Deploy copy of a model, and the files that it is written to.

The folder is not called ``export``, because `lightning_convbn.export` is a public function. Who should look where:

- `plain_copy.py`: copies a model without conversion and wrappers.
- `deploy_copy.py`: `fuse_for_deploy` folds the BatchNorms of such a copy for good.
- `dimension_check.py`: what stands in such a copy where a fold is right for one number of dimensions alone.
- `export.py`: `export` writes a Deploy copy to a file.
- `formats.py`: the table of file formats. A new format is a new row.
- `argument_checks.py`: refuses a path, a model or inputs before any work.
- `write_and_compare.py`: writes the file, reads it back and compares it with Eval mode.
- `checkpoint_file.py`: reads a checkpoint without running code that it carries.
- `atomic_file.py`: writes a file completely or not at all.
"""
