"""What is run beside the scripts, as `python -m tools.NAME`. Nobody imports these but each other."""
