"""The Python face of csrc/: functions that check what they are given, choose the fastest path there is, and call it.

Tensors may be float32 or float64; half-precision ones are computed in float32. Ops are compiled on first use
(`extension`); `backend()` names the path taken. `reference` states each op in plain PyTorch.
"""

from gan3d.ops.extension import backend as backend
from gan3d.ops.sh import sh as sh
