"""Long-video understanding with a learned memory, in JAX: VideoMem and PRPO (arXiv 2512.04540).

from videomem_jax import VideoMem
VideoMem.from_pretrained("model").ask("film.mp4", "Who opens the door?", ["Ann", "Bo"])
"""

__all__ = ["VideoMem", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str):
    """`VideoMem`, imported when it is asked for: the package itself costs nothing to import."""
    if name == "VideoMem":
        from videomem_jax.videomem import VideoMem

        return VideoMem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
