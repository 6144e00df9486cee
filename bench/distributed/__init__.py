"""Training steps on several GPUs: `python -m bench distributed` (command.py)."""
