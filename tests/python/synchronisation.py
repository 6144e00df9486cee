"""Code that must not wait for the device."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def no_synchronisation():
    """Operations that synchronise raise here, and nowhere after."""
    try:
        with warnings.catch_warnings():
            # Torch calls the mode a prototype; as an error that would leave it on for the tests that follow.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
