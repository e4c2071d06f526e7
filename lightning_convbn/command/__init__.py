"""The command ``lightning-convbn`` with its sub-commands inspect, measure and export.

- `main.py`: the argument parser. It calls one of `inspect.py`, `measure.py` and `export.py`.
- `model_argument.py`: builds the model that MODEL names. `model_checks.py` refuses a model that can't be used.
- `shared_options.py`: options of several sub-commands. `input_options.py`: those that say what the model is given, and
  `inputs.py`: that itself. `option_values.py`: turns the text of other options into values.
- `results.py`: what measure has found. `counting_and_timing.py` finds it, with `bytes_per_block.py`.
- `terminal.py`, `html_report.py` with `html_report.html`, `plot.py`, `trade_off.py`: tables, the page and the picture.
- `notes_below_tables.py`: the sentences that explain the numbers, the same in the table and in the page.
- `output_files.py`: JSON, and files that are written completely or not at all. `versions.py`: what was installed.
- `errors.py`: errors that are shown in one line.
"""
