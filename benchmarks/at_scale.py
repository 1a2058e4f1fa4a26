"""How the large configurations behave as they grow, by the compilers of machines that are not here.

    python benchmarks/at_scale.py operations
    python benchmarks/at_scale.py temporaries --target=v5p:2x2x4
    python benchmarks/at_scale.py scaling
    python benchmarks/at_scale.py fits runs/aot

`operations`: PRPO's prefill and update against GRPO's (`psp=False`), by the account that the
compiled programs are held to. `temporaries`: of the update, as batch and G x prompt grow.
`scaling`: seconds and sent bytes of a rollout and an update on 16 to 256 chips of v5p, the examples
of a batch growing with them. These two need the environment of `make aot-tpu`, and minutes a line.
`fits`: the tables that `make aot` left, as one in Markdown (docs/scale.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from videomem_jax import aot, settings, sharding  # noqa: E402
from videomem_jax.aot import account, chips, programs  # noqa: E402

SCALING = ("v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8")


def paper(**changes) -> settings.Settings:
    """The configuration for TPU slices, with other values of some keys of `part__key` names."""
    config = runpy.run_path(str(ROOT / "configs/prpo_tpu.py"))["get_config"]()
    for key, value in changes.items():
        part, name = key.split("__")
        config[part][name] = value
    return settings.freeze(config)


def learning(s: settings.Settings, completion: int) -> float:
    """Operations of prefill and update, nothing computed twice; completions of so many tokens."""
    config = programs.architecture(s)
    counts = account.Account(s, config, flash=False)
    k = s.paths
    z = account.sizes(s, s.prpo.batch, k, s.prpo.group_size // k)
    z = dataclasses.replace(z, completion=completion)
    prefill = dataclasses.replace(z, completion=0)
    return s.prompt.segments * (
        counts.sampling(prefill).model + counts.learning(z, trained=True, reference=False).model
    )


def operations() -> None:
    """PRPO against GRPO, prompts of 3,200 tokens."""
    slots = paper().memory.slots
    room = 3200 - slots - account.AROUND_MEMORY
    print("completion  PRPO, P  GRPO, P  PRPO / GRPO")
    for completion in (300, 1100):
        prpo = learning(paper(prompt__prefix_tokens=room), completion)
        grpo = learning(paper(prompt__prefix_tokens=room, prpo__psp=False), completion)
        print(f"{completion:10} {prpo / 1e15:8.1f} {grpo / 1e15:8.1f} {prpo / grpo:12.3f}")


def compiled(s: settings.Settings, target: chips.Target, name: str):
    """One step, measured."""
    s = settings.for_devices(s, target.count)
    mesh = sharding.make_mesh(s.mesh, chips.devices(target))
    config = programs.architecture(s)
    step = next(x for x in programs.steps(s, config, mesh) if x.name == name)
    return aot.measure(step, s, config, target)


def temporaries(target: chips.Target) -> None:
    """One prompt a chip at a time, whatever the batch; and once a group: a longer one costs a group
    of 8 no more than one of 4."""
    print("batch  G  prefix  temporaries, GB  arguments, GB")
    sizes = ((16, 8, 2560), (32, 8, 2560), (16, 8, 5120), (16, 4, 2560), (16, 4, 5120))
    for batch, group, prefix in sizes:
        s = paper(prpo__batch=batch, prpo__group_size=group, prompt__prefix_tokens=prefix)
        m = compiled(s, target, "update")
        print(
            f"{batch:5} {group:2} {prefix:7} {m.temporaries / 1e9:16.2f} {m.arguments / 1e9:14.2f}",
            flush=True,
        )


def scaling() -> None:
    """Fixed work a chip: an example a chip."""
    print("Read off compiled programs; a forecast is the longest of what bounds a step.")
    print("chips  step     forecast, s  sent, GB  utilisation")
    for text in SCALING:
        target = chips.parse(text)
        n = target.count
        s = paper(prpo__batch=n, coldstart__batch=n, eval__batch=n)
        for name in ("rollout", "update"):
            m = compiled(s, target, name)
            sent = sum(m.sent.values()) / 1e9
            used = m.utilisation(target.chip)
            print(f"{n:5}  {name:8} {m.seconds:11.3f} {sent:9.1f} {used:12.1%}", flush=True)


def fits(folder: pathlib.Path) -> None:
    """What fits where: one line a step that was compiled."""
    print("| configuration | machine | mesh | step | GB a chip | utilisation | compiled in |")
    print("|---|---|---|---|---|---|---|")
    for file in sorted(folder.glob("*/aot-*.json")):
        content = json.loads(file.read_text())
        mesh = " x ".join(str(content["settings"]["mesh"][axis]) for axis in sharding.AXES)
        for row in content["steps"]:
            gb = f"{row['total'] / 1e9:.1f}" if row["total"] else "-"
            capacity = content["chip"].get("memory")
            room = f"{gb} of {capacity / 1e9:.0f}" if capacity else gb
            used = f"{row['utilisation']:.0%}" if row["utilisation"] else "-"
            print(
                f"| `{file.parent.name}` | {content['target']} | {mesh} | {row['step']} | {room} "
                f"| {used} | {row['processor_seconds']:.0f} s |"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["operations", "temporaries", "scaling", "fits"])
    parser.add_argument(
        "folder", nargs="?", default="runs/aot", help="of the tables that fits reads"
    )
    parser.add_argument("--target", default="v5p:2x2x4", help="of the temporaries")
    args = parser.parse_args()
    if args.what == "operations":
        operations()
    elif args.what == "temporaries":
        temporaries(chips.parse(args.target))
    elif args.what == "scaling":
        scaling()
    else:
        fits(pathlib.Path(args.folder))


if __name__ == "__main__":
    main()
