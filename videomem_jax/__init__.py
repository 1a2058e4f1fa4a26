"""Long-video understanding with a learned memory, in JAX: VideoMem and PRPO (arXiv 2512.04540)."""
