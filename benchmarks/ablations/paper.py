"""The paper's numbers (VideoMem, arXiv 2512.04540), in percent unless said otherwise."""

# Cold start and reinforcement learning: VideoMME (long), LVBench, LongVideoBench.
COLDSTART_NAMES = ("VideoMME long", "LVBench", "LongVideoBench")
COLDSTART = {
    "base": (58.6, 50.6, 59.1),
    "ordinary": (58.1, 51.7, 58.5),
    "prpo_only": (59.8, 53.4, 59.5),
    "prpo_forced": (59.8, 53.4, 59.5),  # its base keeps to the format when it is told to
    "coldstart": (61.9, 54.4, 60.7),
    "full": (64.2, 58.5, 63.3),
}
# Components: VideoMME, LongTimeScope.
COMPONENTS_NAMES = ("VideoMME", "LongTimeScope")
COMPONENTS = {
    "full": (73.6, 45.1),
    "no_psp": (71.5, 43.0),
    "no_tcr": (69.4, 40.3),
    "no_penalty": (72.0, 43.9),
}
SPEEDUP = 3.1  # of training by PRPO over GRPO
# TCR against a reward at the end only.
DENSITY, STEPS, LVBENCH = 4.0, 0.7, {"full": 58.5, "no_tcr": 54.6}
# Accuracy of the provisional answer after each of 4 segments (LVBench).
PROVISIONAL = {"base": (50.3, 48.5, 46.2, 44.8), "prpo": (51.2, 55.4, 57.1, 58.5)}
