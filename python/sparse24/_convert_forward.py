"""The older name of `sparse24.convert.forward`, the same module: its state is looked at by that name too."""

import sys

from sparse24.convert import forward

sys.modules[__name__] = forward
