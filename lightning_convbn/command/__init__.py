"""The command ``lightning-convbn`` with its sub-commands inspect, measure and export.

- `main.py`: the argument parser. It calls one of `inspect.py`, `measure.py` and `export.py`.
- `options.py`: the options that all sub-commands have. `inputs.py`: what the model is called with.
- `model_argument.py`: builds the model that MODEL names. `model_checks.py` refuses a model that can't be used.
- `results.py`: what measure has found. `counting_and_timing.py` finds it, with `bytes_per_block.py`.
- `terminal.py`, `html_report.py`, `plot.py`, `output_files.py`: the table, the page, the picture, JSON.
- `errors.py`: errors that are shown in one line.
"""
