"""Every op in plain PyTorch, as its equation reads: fallback, oracle, and second derivative of the compiled one."""

from gan3d.ops.reference.sh import sh as sh
