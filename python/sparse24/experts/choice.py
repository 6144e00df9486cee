"""Whether the experts run 2:4 or dense. Sizes decide: how the rows are spread is data on the device."""

from sparse24._symbolic import or_true

#: Rows per expert, on average, from which `relu2_experts` runs sparse on CUDA: fewer read more weights than they
#: multiply, and take as long dense, exactly. By the records of experts on an H200, against which a test holds it.
MIN_ROWS = {"16bit": 64, "fp8": 256}


def pays(rows: int, experts: int, *, fp8: bool = False) -> bool:
    """Whether `relu2_experts` runs sparse by default on CUDA.

    Parameters
    ----------
    rows, experts : int
        Rows of x and experts of the weights.
    fp8 : bool
        The precision.

    Returns
    -------
    bool
    """
    return or_true(rows >= MIN_ROWS["fp8" if fp8 else "16bit"] * experts)


#: Rows per expert, on average, from which a training step runs in float8 on CUDA where it is asked for: by whether the
#: codes of the weights are kept for all micro-batches of an optimizer step. With fewer, making them takes longer than
#: what float8 products gain, and the step runs in 16 bits.
MIN_TRAINING_ROWS = {True: 384, False: 1152}


def trains_in_float8(rows: int, experts: int, *, kept: bool) -> bool:
    """Whether a training step of `relu2_experts` with weights that learn runs in float8 on CUDA, where it is asked to.

    Parameters
    ----------
    rows, experts : int
        Rows of x and experts of the weights.
    kept : bool
        Whether the codes of the weights are those of an earlier micro-batch, or serve later ones.

    Returns
    -------
    bool
    """
    return or_true(rows >= MIN_TRAINING_ROWS[kept] * experts)
