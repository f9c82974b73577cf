"""Many ranks, accumulated gradients, bf16 and --compile; and what happens when a process of a run is killed."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import SMALL, paint

import hpseg
from hpseg.methods.hp import HiddenPositives
from hpseg.models.heads import Projection, SegmentationHead
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Ranks, Share

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

# In fp32, largest deviation of any trained tensor as a share of its largest entry. Products of half as many rows round
# differently; eight steps of Adam leave 2e-7 of that, a hundred a few times more. k-means sums 65,536 rows in fp32.
TOLERANCE, KMEANS_TOLERANCE = 1e-5, 1e-4
CASES = {
    "hp": dict(batch=4, accumulate=2),
    "two_losses": dict(batch=4, weighting="separate", consistency_weight=0.0, crop="five", pool_images=5),
    "uneven": dict(batch=5, clusters="kmeans"),
    "cached": dict(batch=4, cache_features=True, consistency_weight=0.0, local_scale=14.0),
    "stego": dict(batch=4, preset="stego-small", consistency_weight=0.0, neighbors=3),
    "fs4": dict(batch=4, preset="fs4-small", cache_features=False, consistency_weight=1.0, dropout=0.1, pixel_epochs=2),
    "fs4_uneven": dict(batch=5, preset="fs4-small", cache_features=False, pixel_update="running", clusters="probe"),
    "stego_uneven": dict(batch=5, preset="stego-small", consistency_weight=0.0, neighbors=3),
}

# Every case on each rank, within a process group of its own: argv holds the folders, stdin the cases.
DRIVER = """
import gc, json, sys, weakref, torch, hpseg, hpkernels
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
group = weakref.ref(torch.distributed.group.WORLD)
for name, (photos, settings) in json.load(open(sys.argv[1])).items():
    hpseg.train(photos, f"{sys.argv[2]}/{name}", **settings)
torch.distributed.barrier()
gc.collect()
torch.distributed.destroy_process_group()
assert group() is None, gc.get_referrers(group())  # its threads would abort the process now and then
"""

# Two ranks that wait for one another no longer than five seconds fill a cache, one photograph a shard, then fail at it.
FILL = """
import datetime, logging, sys, time, torch
import torch.distributed as dist
from pathlib import Path
from hpseg.features import cache as feature_cache
from hpseg.models.backbone import load_backbone
from hpseg.run.config import make_config
from hpseg.data.folder import PhotoFolder, find_images
from hpseg.runtime.distributed import Ranks
from hpseg.features.tokens import Encoder

photos, weights, folder = sys.argv[1:]
torch.set_num_threads(1)
feature_cache.SHARD_BYTES = 1
dist.init_process_group("gloo")
backbone, made = load_backbone(weights=weights), 0
config = make_config(classes=3, crop="random", cache_features=True, workers=0)
dataset, folder, device = PhotoFolder(find_images(photos), 32, "random", 0, False), Path(folder), torch.device("cpu")
encoder = Encoder(backbone, dataset, config, device, folder)
def slow(*args, forward=backbone.forward, **options):
    global made
    made += 1
    time.sleep(1.7)
    return forward(*args, **options)
backbone.forward = slow
dist.barrier()
ranks = Ranks(dist.new_group(timeout=datetime.timedelta(seconds=5)))
lines = []
class Kept(logging.Handler):
    emit = lines.append
logging.getLogger("hpseg").addHandler(Kept())
logging.getLogger("hpseg").setLevel(logging.INFO)
encoder.fill(ranks)
assert encoder.cache.missing() == [] and len(lines) == (1 if ranks.writes else 0), lines
counts = ranks.collect(made)
assert counts == [3, 2], counts
if ranks.rank == 1:
    feature_cache.write_atomically = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
encoder = Encoder(backbone, dataset, config, device, folder / "again")
try:
    encoder.fill(ranks)
except Exception as error:
    print(ranks.rank, type(error).__name__, str(error)[:60], file=sys.stderr)
dist.barrier()
ranks.group = encoder = None  # a group that outlives its destruction may abort the process at its end
dist.destroy_process_group()
"""


def spawn(command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.update(options.pop("env", {}))
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, seconds=90):
    """Exit status and what was said; a process that hangs fails the test."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail("the run hangs")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, said


def wait_for(path, process):
    while not path.is_file():
        assert process.poll() is None, f"ended too soon: {process.communicate()[1]}"
        time.sleep(0.005)


def marked(marker):
    """Processes that inherited the marker, youngest first: {pid: environment}."""
    found = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: -int(folder.name)):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in environment:
            found[int(folder.name)] = environment
    return found


def flags(settings):
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        else:
            yield from (flag, str(value))


def moments(run):
    optimizers = torch.load(run / "state.pt", weights_only=True)["optimizers"]
    return {
        f"{name}.{number}.{moment}": state[moment]
        for name, optimizer in optimizers.items()
        for number, state in optimizer["state"].items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def assert_runs_agree(one, other, tolerance, kmeans=False):
    """model.safetensors, gradients in the optimizers (Adam's steps hide their scale) and log.csv but for its times."""
    a, b = ({**load_file(run / "model.safetensors"), **moments(run)} for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        allowed = max(tolerance, KMEANS_TOLERANCE) if kmeans and name == "clusters.centroids" else tolerance
        # What starts at 0 is a few of Adam's steps, as large for a gradient that is rounding as for any other: it is
        # held to the scale at which linear layers start.
        usual = a[name].shape[-1] ** -0.5 if name.startswith("head.context.out.") else 0.0
        assert (a[name] - b[name]).abs().max() <= allowed * max(a[name].abs().max().item(), usual), name
    rows, others = (list(csv.DictReader((run / "log.csv").read_text().splitlines())) for run in (one, other))
    assert len(rows) == len(others)
    for row, other_row in zip(rows, others, strict=True):
        for name in row.keys() - {"images_per_s", "seconds"}:
            assert row[name] == other_row[name] or float(row[name]) == pytest.approx(
                float(other_row[name]), rel=tolerance + 1e-5, abs=tolerance
            ), (row["step"], name)


@needs_gloo
def test_two_ranks_equal_one_process_with_twice_the_batch(photos, vit_file, tmp_path):
    more = shutil.copytree(photos, tmp_path / "photos")
    for i in range(4):
        paint(64, 48, 10 + i).save(more / f"{i}.png")
    cases, common = {}, {**SMALL, "weights": str(vit_file), "steps": 8, "crop": "random", "renew_interval": 3}
    for name, case in CASES.items():
        settings = {**common, **case}
        batch = settings.pop("batch")
        # Batches of five pictures come from a folder that holds no more: rank 0 gets two of them, rank 1 three.
        folder = photos if batch % 2 else more
        hpseg.train(folder, tmp_path / "one" / name, **{**settings, "batch_size": batch})
        cases[name] = (str(folder), {**settings, "batch_size": (batch + 1) // 2})
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    status, said = finish(spawn([*TORCHRUN, tmp_path / "driver.py", tmp_path / "cases.json", tmp_path / "two"]))
    assert status == 0, said
    for name, case in CASES.items():
        kmeans = case.get("clusters") == "kmeans"
        assert_runs_agree(tmp_path / "one" / name, tmp_path / "two" / name, TOLERANCE, kmeans)
        assert json.loads((tmp_path / "two" / name / "results.json").read_text())["ranks"] == 2


@needs_gloo
def test_ranks_fill_a_cache_together_and_hear_of_each_other_after_every_shard(photos, vit_file, tmp_path):
    """Longer in all than a rank waits for another; and where it fails on one, the others know why."""
    (tmp_path / "fill.py").write_text(FILL)
    status, said = finish(spawn([*TORCHRUN, tmp_path / "fill.py", photos, vit_file, tmp_path]))
    assert status == 0, said
    assert "0 ReportedElsewhere rank 1: cache_dir: cannot write to" in said
    assert "1 UsageError rank 1: cache_dir: cannot write to" in said


@needs_gloo
@needs_proc
def test_a_killed_rank_ends_the_run_which_then_goes_on(photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file, "steps": 60, "save_every": 4, "renew_interval": 8}
    del settings["quiet"]
    hpseg.train(photos, tmp_path / "one", **{**settings, "batch_size": 4}, quiet=True)
    two, marker = tmp_path / "two", f"HPSEG_TEST_{uuid.uuid4().hex}"
    command = [*TORCHRUN, "-m", "hpseg", "train", photos, "--out", two, *flags(settings)]
    process = spawn(command, env={marker: "1"})
    wait_for(two / "state.pt", process)
    ranks = [pid for pid, environment in marked(marker).items() if b"\0RANK=1\0" in environment]
    os.kill(min(ranks), signal.SIGKILL)
    status, said = finish(process)
    assert status != 0 and "Signal 9" in said and not (two / "results.json").exists()
    shutil.copytree(two, tmp_path / "alone")

    with pytest.raises(UsageError, match=r"batch_size \(of all ranks together\): .* was started with 4, got 2"):
        hpseg.train(photos, tmp_path / "alone", resume=True, quiet=True, **settings)
    hpseg.train(photos, tmp_path / "alone", resume=True, **{**settings, "batch_size": 4}, quiet=True)
    status, said = finish(spawn([*command, "--resume"]))
    assert status == 0, said
    assert "going on from step" in said and said.count("trained; the run is in") == 1
    for run in (two, tmp_path / "alone"):
        assert_runs_agree(tmp_path / "one", run, 10 * TOLERANCE)


@needs_gloo
def test_an_error_on_one_rank_ends_all_with_its_message(photos, vit_file, tmp_path):
    (tmp_path / "driver.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[2] = 'nowhere'\n"
        "from hpseg.cli.main import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    command = [*TORCHRUN, tmp_path / "driver.py", "train", photos, "--out", tmp_path / "run", "--classes", "3"]
    status, said = finish(spawn([*command, "--weights", vit_file, "--device", "cpu"]))
    assert status != 0 and not (tmp_path / "run").exists()
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: error:"))
    assert line.startswith(f"hpseg train: error: rank 1: images: no folder {str(Path.cwd() / 'nowhere')!r}; expected")


def test_ranks_must_hold_the_same_pictures_and_weights(photos, vit_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "collect", lambda ranks, value: [value, (4, "abc") if type(value) is tuple else value])
    with pytest.raises(UsageError, match=r"expected the same on every rank, got .* \[\(5, '.*'\), \(4, 'abc'\)\]"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    assert not (tmp_path / "run").exists()


@needs_proc
def test_a_killed_loader_process_ends_the_run_which_then_goes_on(photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file, "steps": 150, "save_every": 6, "workers": 2}
    del settings["quiet"]
    hpseg.train(photos, tmp_path / "whole", quiet=True, **settings)
    cut, marker = tmp_path / "cut", f"HPSEG_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "hpseg", "train", photos, "--out", cut, *flags(settings)]
    process = spawn(command, env={marker: "1"})
    wait_for(cut / "state.pt", process)
    os.kill(next(iter(marked(marker))), signal.SIGKILL)  # the youngest is a loader process
    status, said = finish(process)
    assert status == 1 and "Traceback" not in said
    assert "hpseg train: error: workers: a data loading process was killed" in said and "--resume" in said
    hpseg.train(photos, cut, resume=True, quiet=True, **settings)
    assert_runs_agree(tmp_path / "whole", cut, 0.0)


def test_accumulated_gradients_are_the_mean_over_batches(photos, vit_file, tmp_path, monkeypatch):
    from hpseg.training import loop as training

    gradients = []

    def kept(parameters, limit, clip=torch.nn.utils.clip_grad_norm_):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip([torch.nn.Parameter(torch.zeros(1))], limit)

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", lambda parameters, limit: kept(list(parameters), limit))
    still = {**SMALL, "weights": vit_file, "lr": 0.0, "projection_lr": 0.0, "cluster_lr": 0.0, "weight_decay": 0.0}
    hpseg.train(photos, tmp_path / "apart", steps=2, **still)
    hpseg.train(photos, tmp_path / "together", steps=1, accumulate=2, **still)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    apart, together = (
        list(csv.DictReader((tmp_path / run / "log.csv").read_text().splitlines())) for run in ("apart", "together")
    )
    for name in ("loss", *HiddenPositives.TERMS):
        assert float(together[0][name]) == pytest.approx(sum(float(row[name]) for row in apart) / 2, rel=1e-5)


def test_bf16_is_autocast_of_heads_and_projection():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    for part in (SegmentationHead(32, 16, "bf16"), Projection(32, "bf16")):
        low = part(x)
        part.dtype = "fp32"
        high = part(x)
        assert low.dtype == torch.float32 and not torch.equal(low, high)
        torch.testing.assert_close(low, high, rtol=0.02, atol=0.02)
    method = HiddenPositives(32, make_config(classes=3, dim=16, dtype="bf16"))
    assert [part.dtype for part in (method.head, method.momentum_head, method.projection)] == ["bf16"] * 3


def test_shares_are_slices_of_what_one_process_draws():
    class Rank(type(ALONE)):
        def __init__(self, rank, size):
            self.group, self.rank, self.size = None, rank, size

    whole = Share(ALONE, 5, torch.Generator().manual_seed(3)).rand(1, 4)
    parts = [Share(Rank(rank, 3), 5, torch.Generator().manual_seed(3)).rand(1, 4) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and sorted(len(part) for part in parts) == [1, 2, 2]
    assert [len(range(2)[Rank(rank, 3).rows(2)]) for rank in range(3)] == [0, 1, 1]


def test_compiled_once_and_not_per_step(photos, vit_file, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    frames = []

    def traced(backend, function, torch_compile=torch.compile, **options):
        return torch_compile(function, **{**options, "backend": backend})

    settings = {**SMALL, "weights": vit_file, "renew_interval": 3, "clusters": "kmeans"}
    hpseg.train(photos, tmp_path / "eager", steps=12, **settings)
    for steps in (3, 12):
        torch._dynamo.reset()
        counter = CompileCounter()  # runs what was traced as it is
        monkeypatch.setattr(torch, "compile", functools.partial(traced, counter))
        hpseg.train(photos, tmp_path / str(steps), steps=steps, compile=True, **settings)
        frames.append(counter.frame_count)
    assert 3 < frames[0] == frames[1]
    assert_runs_agree(tmp_path / "eager", tmp_path / "12", TOLERANCE)
    torch._dynamo.reset()


def test_without_a_compiler(photos, vit_file, tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(UsageError, match="compile: .* cannot compile for cpu here .*no-such-compiler.*--no-compile"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, compile=True, **SMALL)
    assert not (tmp_path / "run").exists()
    torch._dynamo.reset()
