"""The examples; `README.md` beside this file says what lies where."""
