"""Ahead of time: what is read off compiled programs, held against accounts by hand."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from videomem_jax import aot, sharding
from videomem_jax import settings as cfg
from videomem_jax.aot import account, chips, costs, programs, report, whole
from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig, VisionConfig
from videomem_jax.models.presets import preset

ROOT = pathlib.Path(__file__).parents[1]

# Wide beside its vocabulary's few chunks, so that products rule; every axis divides.
CONFIG = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mrope_section=(4, 2, 2),
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0,),
    ),
)
SETTINGS = cfg.Settings(
    model=cfg.Model(remat="all", chunk=8, attention="xla"),
    prompt=cfg.Prompt(segments=2, frames=4, max_pixels=4 * 32 * 32, prefix_tokens=40),
    memory=cfg.Memory(slots=10, budget=8),
    coldstart=cfg.Coldstart(steps=1, batch=8, accumulate=2),
    prpo=cfg.PRPO(steps=1, batch=8, group_size=4, accumulate=2),
    eval=cfg.Eval(batch=8),
)


def mesh_of(*sizes):
    count = int(np.prod(sizes))
    if jax.device_count() < count:
        pytest.skip(f"{count} devices are needed")
    return sharding.make_mesh(cfg.Mesh(*sizes), jax.devices()[:count])


def compiled(name, s=SETTINGS, mesh=(1, 1, 1), config=CONFIG, options=None):
    step = next(x for x in programs.steps(s, config, mesh_of(*mesh)) if x.name == name)
    return step.lower().compile(options or {"xla_backend_optimization_level": 0})


# --- targets ---


@pytest.mark.parametrize("text", ["v5p", "v5p:2x2", "v4:2x2x2", "h100:2x2", "cpu:0", "v5e:4x"])
def test_what_is_no_target(text):
    with pytest.raises(ConfigError, match="is no target"):
        chips.parse(text)


def test_targets():
    assert chips.parse("v5p:2x2x4").count == 16 and str(chips.parse("v6e:4x8")) == "v6e:4x8"
    assert chips.parse("h100:8").chip.kind == "gpu"


@pytest.mark.parametrize("target", ["v5e:1x1", "h100:1"])
def test_a_compiler_that_is_not_there_is_one_sentence(target, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed: pip install -r requirements-"):
        chips.devices(chips.parse(target))


def test_sizes_without_weights():
    of = lambda name: cfg.Settings(model=cfg.Model(weights=name))  # noqa: E731
    assert programs.architecture(of("Qwen3-VL-8B-Instruct")).text.hidden_size == 4096
    assert programs.architecture(of("/x/Qwen3-VL-2B")).text.hidden_size == 2048
    with pytest.raises(ConfigError, match="needs the model's sizes"):
        programs.architecture(of("/x/mine"))


# --- what is read off a program ---


def test_a_loops_body_counts_as_often_as_it_runs():
    """A scan over 5 matrices costs what its unrolled form costs, and what it should."""
    x, w = jnp.ones((8, 64)), jnp.ones((5, 64, 64))
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    found = [
        costs.Program(
            jax.jit(lambda x, w, n=n: jax.lax.scan(step, x, w, unroll=n)[0])
            .lower(x, w)
            .compile()
            .as_text()
        ).cost.products
        for n in (1, 5)
    ]
    assert found == [5 * 2 * 8 * 64 * 64] * 2


def test_a_loop_of_unknown_length_runs_as_long_as_it_may():
    def run(x, w, stop):
        more = lambda c: (c[0] < 7) & (c[1].sum() < stop)  # noqa: E731
        return jax.lax.while_loop(more, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))

    text = jax.jit(run).lower(jnp.ones((8, 64)), jnp.ones((64, 64)), 1e9).compile().as_text()
    program = costs.Program(text, trips=7)
    assert program.cost.products == program.loop_cost.products == 7 * 2 * 8 * 64 * 64


def test_bytes_that_are_sent():
    """Rings of 4: a gather sends 3/4 of the whole, a sum twice that."""
    mesh = mesh_of(1, 4, 2)
    put = lambda spec: jax.ShapeDtypeStruct(  # noqa: E731
        (64, 64), jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    whole = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: x * 2, out_shardings=whole).lower(put(P("fsdp")))
    assert costs.Program(gather.compile().as_text()).cost.collectives == {
        "all-gather": 64 * 64 * 4 * 3 / 4
    }
    total = jax.jit(lambda x: x @ x.T, out_shardings=whole).lower(put(P(None, "fsdp")))
    assert costs.Program(total.compile().as_text()).cost.collectives == {
        "all-reduce": 2 * 64 * 64 * 4 * 3 / 4
    }


def test_products_as_the_tpu_compiler_writes_them():
    """Its convolutions: a matrix product, a batch of them, and one whose window is padded."""
    plain = "dim_labels=bf_io->bf"
    assert costs._convolution((64, 4096), (4096, 1024), (64, 1024), plain) == 2 * 64 * 4096 * 1024
    batch = "window={size=64 stride=63 lhs_dilate=64}, dim_labels=0bf_0oi->0bf"
    shapes = (64, 8, 512), (64, 8, 512), (64, 8, 8)
    assert costs._convolution(*shapes, batch) == 2 * 64 * 8 * 8 * 512
    outer = "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf"
    # 5 outputs of 3 positions over a row of 3: 9 pairs are real.
    assert costs._convolution((3, 2, 7), (3, 7, 4), (5, 2, 4), outer) == 2 * 2 * 4 * 7 * 9


# As the TPU's compiler writes it: a kernel's text over several lines, a loop that it has unrolled
# twice, and a weight that a product's fusion takes through a view of its own.
TPU_TEXT = """HloModule m

%cond (c: (u32[], bf16[8,8])) -> pred[] {
  %c = (u32[], bf16[8,8]{1,0}) parameter(0)
  %n = u32[] constant(8)
  %at = u32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %n), direction=LT
}

%view (q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %b = bf16[8,8]{1,0} bitcast(%q)
}

%product (a: bf16[8,8], w: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  %v = bf16[8,8]{1,0} fusion(%w), kind=kLoop, calls=%view
  ROOT %d = bf16[8,8]{1,0} dot(%a, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (u32[], bf16[8,8])) -> (u32[], bf16[8,8]) {
  %p = (u32[], bf16[8,8]{1,0}) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=0
  %x = bf16[8,8]{1,0} get-tuple-element(%p), index=1
  %y = bf16[8,8]{1,0:S(1)} custom-call(%x), custom_call_target="tpu_custom_call", config={"a": {
  "b": "loc(c)"
}}, metadata={op_name="jit(f)/splash_mha_fwd"}
  %z = bf16[8,8]{1,0:S(1)} fusion(%y, %x), kind=kOutput, calls=%product
  %j = u32[] add(%i, %two)
  ROOT %out = (u32[], bf16[8,8]{1,0}) tuple(%j, %z)
}

ENTRY %main (m: bf16[8,8]) -> (u32[], bf16[8,8]) {
  %m = bf16[8,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %t = (u32[], bf16[8,8]{1,0}) tuple(%zero, %m)
  ROOT %loop = (u32[], bf16[8,8]{1,0}) while(%t), condition=%cond, body=%body
}
"""


def test_a_program_as_the_tpu_compiler_writes_it():
    cost = costs.Program(TPU_TEXT).cost
    assert cost.kernels == {"splash_mha_fwd": 4}
    assert cost.products == 4 * 2 * 8 * 8 * 8
    # The kernel reads its operand, the product its weight; scratch memory is free. And the counter.
    matrix = 8 * 8 * 2
    assert cost.bytes == 4 * (2 * matrix + 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coldstart", "rollout", "update", "evaluation"])
def test_the_account_by_hand_is_the_program(name):
    program = costs.Program(compiled(name).as_text(), account.sizes(SETTINGS, 1, 1, 1).completion)
    by_hand = account.Account(SETTINGS, CONFIG, flash=False).steps()[name]
    assert by_hand.products == pytest.approx(program.cost.products, rel=0.05)
    assert by_hand.model <= by_hand.products and by_hand.kernels == 0


@pytest.mark.parametrize(("completion", "most"), [(300, 0.25), (1100, 0.4)])
def test_prpo_computes_a_part_of_what_grpo_does(completion, most):
    """Prefill and update of Qwen3-VL-8B with G 8: the prompt of 3,200 tokens once a group."""
    config = preset("8b")
    counts = account.Account(SETTINGS, config, flash=False)
    got = []
    for rows, each in ((1, 8), (8, 1)):
        z = account.Sizes(rows, each, 3200, completion)
        prefill = counts.sampling(dataclasses.replace(z, completion=0))
        got.append(prefill.model + counts.learning(z, trained=True, reference=False).model)
    assert 0.1 < got[0] / got[1] <= most


# --- what no device may hold ---


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2)], ids=["fsdp8", "fsdp4_tensor2"])
def test_nothing_large_is_whole_anywhere(sizes):
    """In the update: no embedding or head, no stack of layers, no logits of all its tokens."""
    text = CONFIG.text
    arrays = costs.Program(compiled("update", mesh=sizes).as_text()).arrays()
    floats = {dims for dtype, dims in arrays if dtype in ("f32", "bf16")}
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size // 8) in floats
    s = dataclasses.replace(SETTINGS, mesh=cfg.Mesh(*sizes))
    assert not whole.held(arrays, s, CONFIG, 8)
    # A completion's 16 positions a prompt and completion, of which 8 at once have logits.
    vocab = text.vocab_size
    logits = [int(np.prod(x)) for x in floats if x and x[-1] in (vocab, vocab // 8)]
    assert max(logits, default=0) <= 8 * 4 * 8 * vocab // 8


def test_what_is_held_whole_is_named():
    """On 8 chips: an embedding, a stack, and logits of twice as many positions as a chunk has."""
    s = dataclasses.replace(SETTINGS, mesh=cfg.Mesh(1, 8, 1))
    good = {("f32", (1024, 8)), ("f32", (3, 64, 24)), ("bf16", (8, 4, 8, 128)), ("s32", (1024, 64))}
    assert whole.held(good, s, CONFIG, 8) == []
    bad = [("bf16", (1024, 64)), ("f32", (3, 1, 64, 192)), ("f32", (8, 4, 16, 128))]
    names = ["table of the vocabulary", "stack of layers", "logits of more positions"]
    for array, name in zip(bad, names, strict=True):
        (found,) = whole.held(good | {array}, s, CONFIG, 8)
        assert name in found


# --- the table ---


def measured(**changes):
    kept = report.Measured("update", 1e12, 2e12, arguments=2e9, temporaries=3e9)
    kept.outputs, kept.program = 0.9e9, 0.1e9
    return dataclasses.replace(kept, **changes)


def test_forecast_and_utilisation():
    bound = {"operations": 2.0, "bytes": 1.0, "interconnect": 0.5}
    m = measured(
        roofline={"rest": bound, "decode": bound | {"bytes": 3.0}}, model_operations=459e12
    )
    chip = chips.CHIPS["v5p"]
    assert m.seconds == 5.0 and m.utilisation(chip) == pytest.approx(0.2)
    text = report.table(chips.parse("v5p:2x2x4"), [m])
    assert "20.0" in text and "forecast, s" in text


def test_what_does_not_fit_ends_with_an_error(monkeypatch, tmp_path, capsys):
    """The table is printed and saved all the same."""
    monkeypatch.setattr(chips, "devices", lambda target: jax.devices()[:1])
    monkeypatch.setattr(aot, "measure", lambda step, *a: measured(step=step.name, arguments=13e9))
    s = dataclasses.replace(SETTINGS, coldstart=cfg.Coldstart(steps=0, batch=8))
    with pytest.raises(aot.DoesNotFit, match=r"update step does not fit: it needs 17.0 GB a chip"):
        aot.check(s, "v5e:1x1", tmp_path)
    saved = json.loads((tmp_path / "aot-v5e-1x1.json").read_text())
    assert saved["steps"][0]["fits"] is False and "NO" in capsys.readouterr().out


def test_what_each_chip_holds_whole_ends_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(chips, "devices", lambda target: jax.devices()[:1])
    monkeypatch.setattr(
        aot, "measure", lambda step, *a: measured(step=step.name, whole=["a stack"])
    )
    with pytest.raises(aot.DoesNotFit, match="the update step: each chip holds a stack"):
        aot.check(SETTINGS, "v5e:1x1", tmp_path, ["update"])


def test_the_table_is_filled_step_by_step(monkeypatch, tmp_path):
    """A step compiled by itself joins those that are saved; other settings begin a new table."""
    monkeypatch.setattr(chips, "devices", lambda target: jax.devices()[:1])
    made = []

    def measure(step, *_):
        made.append(step.name)
        return measured(step=step.name, date=f"day {len(made)}", roofline={"rest": {"bytes": 1.0}})

    monkeypatch.setattr(aot, "measure", measure)
    for name in ("update", "rollout"):
        found = aot.check(SETTINGS, "v5e:1x1", tmp_path, [name])
    assert made == ["update", "rollout"]
    assert [(m.step, m.date) for m in found] == [("rollout", "day 2"), ("update", "day 1")]
    assert found[1].roofline == {"rest": {"bytes": 1.0}}
    other = dataclasses.replace(SETTINGS, seed=1)
    assert len(aot.check(other, "v5e:1x1", tmp_path, ["update"])) == 1
    with pytest.raises(ConfigError, match="aot_steps=sleep is unknown: this run has coldstart, "):
        aot.check(SETTINGS, "v5e:1x1", tmp_path, ["sleep"])


@pytest.mark.slow
def test_the_command(tmp_path):
    """Two CPU devices, one step: nothing but the default requirements."""
    command = [sys.executable, "train.py", "--config=configs/demo.py", f"--workdir={tmp_path}"]
    command += ["--aot=cpu:2", "--aot_steps=coldstart", "--config.prpo.steps=0"]
    env = {"PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "aot-cpu-2.json").read_text())
    (step,) = saved["steps"]
    assert step["step"] == "coldstart" and step["fits"] and step["temporaries"] > 0
    assert "extrapolat" not in saved["method"] and "by hand / compiled" in done.stdout


def test_the_command_for_no_target():
    command = [sys.executable, "train.py", "--config=configs/demo.py", "--workdir=x", "--aot=tpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: --aot=tpu is no target" in done.stderr
