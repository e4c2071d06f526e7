"""What works with a Trainer: converted parts, verification, the report, the export at the end of a fit."""
