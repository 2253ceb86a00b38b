"""3D-aware GANs and fast neural scene representations. Start at docs/architecture.md."""

__version__ = "0.1.0"
