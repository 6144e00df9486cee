"""What kernels wait for, by Nsight Compute."""
