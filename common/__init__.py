"""What all scripts share. Nothing here imports a method, `models`, `data` or `tools`."""
