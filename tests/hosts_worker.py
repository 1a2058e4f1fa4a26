"""One of the processes of test_hosts.py: does what hosts do together, and prints what it saw."""

import itertools
import json
import sys

import jax
import numpy as np
from absl import flags

from tests.test_pipeline import Tells, many, sizes
from videomem_jax import hosts, sharding
from videomem_jax import settings as cfg
from videomem_jax.data import pipeline

MESHES = {"4,1,1": (4, 1, 1), "1,4,1": (1, 4, 1), "1,2,2": (1, 2, 2), "1,1,4": (1, 1, 4)}


def main() -> dict:
    flags.FLAGS(sys.argv)
    hosts.start(60)
    me, said = jax.process_index(), {"first": hosts.first(), "devices": jax.device_count()}
    said["gathered"] = hosts.gather({"from": me, "text": "x" * (1 + 5 * me)})
    said["read"], said["spread"] = {}, {}
    for name, shape in MESHES.items():
        place = sharding.batch_sharding(sharding.make_mesh(cfg.Mesh(*shape)))
        reader = hosts.reader(place)
        batches = pipeline.Batches(
            many(12), Tells(), sizes(), 4, seed=0, skips=pipeline.Skips(), reader=reader
        )
        mine = [batch.record for batch in itertools.islice(batches, 3)]
        said["read"][name] = np.concatenate(mine).tolist()
        whole = [hosts.whole(hosts.spread(place, part)) for part in mine]
        said["spread"][name] = np.concatenate(whole).tolist()
        batches.close()
    fsdp = sharding.make_mesh(cfg.Mesh(1, 4, 1))
    split = jax.make_array_from_callback(
        (8, 3),
        jax.sharding.NamedSharding(fsdp, jax.sharding.PartitionSpec("fsdp")),
        lambda index: np.arange(24).reshape(8, 3)[index],
    )
    said["whole"] = hosts.whole(split).ravel().tolist()
    said["row"] = hosts.whole(split[5]).tolist()
    done = []
    hosts.first_does(lambda: done.append(1))
    said["done"] = len(done)
    try:
        hosts.first_does(lambda: 1 / 0)
    except (ZeroDivisionError, hosts.HostsError) as error:
        said["failed"] = f"{type(error).__name__}: {error}"
    hosts.wait("the end")
    return said


if __name__ == "__main__":
    real, out = sys.stdout, main()  # the second process's prints are kept back
    print(json.dumps(out), file=real)
