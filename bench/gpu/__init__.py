"""What run_gpu.py needs to run everything on a machine with a GPU."""
