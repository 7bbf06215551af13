"""The error surface around a run: the loss on a line or a plane through its parameters."""

from deploy.surface.look import Surface, SurfaceConfig, look

__all__ = ["Surface", "SurfaceConfig", "look"]
