"""The stages of an encoding: their order, their ends, and that a GPU does not wait for them."""

import json
import multiprocessing
import os
import threading
import time
import warnings
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import EIGHT_BITS, from_uint8
from olvae.data.shards.offsets import KIND
from olvae.data.shards.tar_reading import Shard
from olvae.data.shards.write import ResumableShards
from olvae.export import encoding as module
from olvae.export.encode_inputs import EncodeOptions, Item, ReadImage, ShardInputs, find_inputs
from olvae.export.encoding import EncodeJob, mirrored, taken_from
from olvae.pool import Cancelled
from tests.cuda_guard import stand_in_for_cuda_guard
from tests.data.images import noise, write_photos, write_shards
from tests.export.latents import Blocks, Shrunk, encode, everything, tiny_vae

MODES = [
    {"size": 16, "flip": True, "images": True},
    {"size": [16, 24], "moments": False, "dtype": "bfloat16"},
    {"size": 0, "flip": True, "dtype": "float32"},
]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_files_do_not_depend_on_the_readers(tmp_path, image_folder, source, options):
    """The images of a shard are more than one reader takes at a time; some can't be read."""
    if source == "shards":
        image_folder = tmp_path / "shards"
        write_shards(image_folder, (9, 4, 5))
    else:
        (image_folder / "class0/0.png").write_bytes(b"no picture")
    made = []
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        encode(image_folder, out, Blocks(), workers=workers, batch_size=4, **options)
        made.append(everything(out) | everything(out / ".encode"))
    assert made[0] == made[1] == made[2]
    assert any(name.endswith(".tar") for name in made[0])


def test_readers_end_with_an_encoding_and_with_its_process(tmp_path, image_folder):
    def children(pid: int) -> list[int]:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in listed]

    before = children(os.getpid())
    encode(image_folder, tmp_path / "out", workers=2)
    assert set(children(os.getpid())) <= set(before)

    # A killed process: its readers notice.
    context = multiprocessing.get_context("fork")
    begun, begin = context.Pipe(duplex=False)

    class Endless(Blocks):
        def encode(self, x):
            begin.send(True)
            time.sleep(60)

    process = context.Process(
        target=encode, args=(image_folder, tmp_path / "killed", Endless()), kwargs={"workers": 2}
    )
    process.start()
    assert begun.poll(30)
    readers = children(process.pid)
    assert len(readers) == 2
    process.kill()
    process.join()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cwd").exists() for pid in readers):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_error_in_the_writer_or_in_the_encoder_ends_an_encoding(
    tmp_path, image_folder, monkeypatch
):
    """With the error itself, no thread left, and the shards that were finished before."""
    write = ResumableShards.write
    before = threading.enumerate()  # other tests' and their libraries' may still be there

    def full(self, number, samples, details):
        if number == 1:
            next(iter(samples))
            raise OSError(28, "No space left on device", "000001.tar")
        return write(self, number, samples, details)

    monkeypatch.setattr(ResumableShards, "write", full)
    with pytest.raises(OSError, match=r"No space .*'000001\.tar'"):
        encode(image_folder, tmp_path / "full", shard_size=1, batch_size=1, workers=2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full").glob("*.tar")] == ["000000.tar"]

    class Interrupted(Blocks):
        batches = 0

        def encode(self, x):
            self.batches += 1
            if self.batches == 5:
                raise KeyboardInterrupt
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        encode(
            image_folder,
            tmp_path / "stopped",
            Interrupted(),
            shard_size=2,
            batch_size=1,
            workers=2,
        )
    # What was before it is finished; nothing of the third shard is left.
    found = {path.name for path in (tmp_path / "stopped").rglob("*") if path.is_file()}
    assert found == {
        "plan.json",
        *(f"00000{i}.{kind}" for i in (0, 1) for kind in ("tar", "json", "offsets")),
    }
    assert not [t for t in threading.enumerate() if "Executor" in t.name and t not in before]
    encode(image_folder, tmp_path / "stopped", Blocks(), shard_size=2, batch_size=1)
    encode(image_folder, tmp_path / "whole", Blocks(), shard_size=2, batch_size=1)
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


def test_an_error_of_a_later_shard_comes_after_the_shards_before_it(tmp_path):
    """The readers are far ahead of the writer."""
    shards = write_shards(tmp_path / "shards", (5, 3))
    urls = [f"pipe:cat {shards[0]}", f"pipe:cat {shards[1]}; false"]
    inputs = ShardInputs([Shard(url) for url in urls], 3)
    job = EncodeJob(tiny_vae(), inputs, EncodeOptions(16), tmp_path / "out", {})
    with pytest.raises(OSError, match="to continue"):
        job.run(batch_size=2, workers=2)
    assert job.shards.finished(0).record.images == 5
    assert job.shards.finished(1) is None


def test_bytes_become_the_floats_that_the_formula_gives():
    """All of them, in place of the first copy: the same operations in float32, on any device."""
    x = torch.arange(256, dtype=torch.uint8)
    expected = x.to(torch.float32) / torch.tensor(127.5) - torch.tensor(1.0)
    assert torch.equal(from_uint8(x), expected)
    assert torch.equal(EIGHT_BITS.normalise(x.expand(3, 2, 256)), expected.expand(3, 2, 256))
    assert torch.equal(x, torch.arange(256, dtype=torch.uint8))


class Stream:
    """A stream of a fake GPU, which notes what is asked of it."""

    device = torch.device("cuda:0")

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def wait_stream(self, _) -> None:
        self.calls.append("wait for the encoder, on the device")


def test_no_batch_waits_for_a_gpu(tmp_path, image_folder, monkeypatch):
    """On a fake GPU: pixels leave as bytes without a wait, and latents are waited for later."""
    stand_in_for_cuda_guard()
    calls = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, _) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            calls.append("wait")

    class Using:
        def __init__(self, _) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_) -> None: ...

    moved = torch.Tensor.to

    def to(self, where, *args, **kwargs):
        calls.append(f"{self.dtype} from {self.device.type} to {where}, {kwargs}")
        return moved(self, where, *args, **kwargs)

    job = EncodeJob(
        Blocks(), find_inputs(str(image_folder), 3, 5), EncodeOptions(16), tmp_path / "out", {}
    )
    job._copies = Stream(calls)
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr("olvae.export.encoding.device_of", lambda _: torch.device("cuda:0"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "stream", Using)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: calls.append("kept"))
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "cpu", lambda _: pytest.fail("waits for the GPU"))
        job.model.gain = torch.nn.Parameter(torch.empty((), device="cuda:0"))
        pixels = torch.empty(3, 16, 16, dtype=torch.uint8)
        window = [ReadImage(Item(str(i), str(i), i), pixels, (16, 16)) for i in range(2)]
        (batch,) = job.begin_window(window, 4, 2**30)
    there = ["torch.float32 from cuda to cpu, {'non_blocking': True}"] * 2
    assert calls == [
        "pinned",
        "torch.uint8 from cpu to cuda:0, {'non_blocking': True}",
        "wait for the encoder, on the device",
        *there,
        "event",
        "kept",
        "kept",
    ]
    mean, std = batch.latents()
    assert calls[-1] == "wait"
    assert mean.shape == std.shape == (2, 48, 4, 4)


def test_a_queue_is_taken_from_until_its_end_or_is_cancelled():
    queue: Queue = Queue()
    windows = [(0, [], []), (1, [], [])]
    for item in (*windows, None):
        queue.put(item)
    assert list(taken_from(queue)) == windows
    queue.put(Cancelled())
    with pytest.raises(Cancelled):
        list(taken_from(queue))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_mirrored_pixels_are_numpys(dtype):
    image = torch.arange(2 * 3 * 5).view(2, 3, 5).to(dtype)
    assert np.array_equal(mirrored(image).numpy(), image.numpy()[..., ::-1])


def job_of(folder: Path, out: Path, model=None, part: range | None = None, **options) -> EncodeJob:
    """On five images a shard."""
    inputs = find_inputs(str(folder), 3, 5)
    model = Shrunk() if model is None else model
    return EncodeJob(model, inputs, EncodeOptions(**{"size": 16, **options}), out, {}, part)


def test_images_are_counted_once_also_those_of_finished_shards(tmp_path, image_folder):
    """With an unreadable one, by a command that continues and by one that begins."""
    (image_folder / "class0/0.png").write_bytes(b"no picture")
    done: list[int] = []
    job_of(image_folder, tmp_path / "out").run(batch_size=4, workers=0, advance=done.append)
    assert done == [1] * 12
    (tmp_path / "out/000001.tar").unlink()
    done.clear()
    job_of(image_folder, tmp_path / "out").run(batch_size=4, workers=0, advance=done.append)
    assert done == [5 + 2, *[1] * 5]


def test_parts_of_the_shards_are_complete_together(tmp_path, image_folder):
    one, other = (job_of(image_folder, tmp_path / "out", None, p) for p in (range(2), range(2, 3)))
    one.run(batch_size=4, workers=0)
    assert not one.is_complete()
    assert other.is_complete()
    other.run(batch_size=4, workers=0)
    assert one.is_complete()
    with pytest.raises(ConfigError, match=r"`shards` 2-3: .* 3 shards of latents, 0-2$"):
        job_of(image_folder, tmp_path / "out", None, range(2, 4))

    # The index of all of them, with the place of each image; the usual filter is in no plan.
    # What other parts are writing at the moment stays; alone, it is of a killed command.
    partial = tmp_path / "out" / ".partial-000001.tar"
    partial.touch()
    other.finish()
    assert partial.exists()
    job_of(image_folder, tmp_path / "out").finish()
    assert not partial.exists()
    encode(image_folder, tmp_path / "whole", Shrunk())
    (index, offsets), (whole, places) = (
        (json.loads((folder / "index.json").read_text()), (folder / "index.offsets").read_bytes())
        for folder in (tmp_path / "out", tmp_path / "whole")
    )
    assert (index, offsets) == (whole, places)
    assert len(offsets) == 12 * np.dtype(KIND).itemsize
    assert {**index, "shards": 0} == {
        "version": 1,
        "images": 12,
        "offsets": True,
        "image_key": "latent.safetensors",
        "shards": 0,
    }
    plan = json.loads((tmp_path / "out/.encode/plan.json").read_text())
    assert "resample" not in plan["options"]


def test_another_jobs_folder_is_refused_before_anything_is_encoded(tmp_path, image_folder):
    job_of(image_folder, tmp_path / "out").run(batch_size=4, workers=0)
    with pytest.raises(ConfigError, match="begun with"):
        job_of(image_folder, tmp_path / "out", flip=True)


@pytest.mark.parametrize(("workers", "started"), [(100, 4), (3, 3)])
def test_readers_are_no_more_than_their_units(
    tmp_path, image_folder, monkeypatch, workers, started
):
    """Of twelve images, three at a time."""

    def loader(*_, num_workers, **__):
        warnings.warn("more processes than cores", stacklevel=1)
        raise LookupError(num_workers)

    monkeypatch.setattr(module, "DataLoader", loader)
    job = job_of(image_folder, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LookupError, match=f"^{started}$"):
            job.run(batch_size=3, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_are_stopped_at_the_end(tmp_path, image_folder, monkeypatch, workers):
    stopped = []

    def loader(reader, sampler, **_):
        return (reader[unit] for unit in sampler)

    monkeypatch.setattr(module, "DataLoader", loader)
    monkeypatch.setattr(module, "stop_workers", stopped.append)
    job_of(image_folder, tmp_path / "out").run(batch_size=3, workers=workers)
    assert len(stopped) == (workers > 0)


class Noting(Blocks):
    """Notes how it was called, and on how many images."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def encode(self, x):
        self.calls.append(("whole", len(x)))
        return super().encode(x)

    def encode_within(self, x, memory, progress=None):
        self.calls.append((memory, len(x)))
        return super().encode(x)


def windows_by(monkeypatch) -> list[int]:
    """How many images each window has, from now on."""
    lengths = []
    begin = EncodeJob.begin_window

    def noting(self, window, *given):
        lengths.append(len(window))
        return begin(self, window, *given)

    monkeypatch.setattr(EncodeJob, "begin_window", noting)
    return lengths


def test_images_of_one_size_are_encoded_as_they_come(tmp_path, image_folder, monkeypatch):
    lengths = windows_by(monkeypatch)
    model = Noting()
    job_of(image_folder, tmp_path / "out", model).run(batch_size=3, workers=0)
    assert lengths == [3, 2, 3, 2, 2]
    assert model.calls == [("whole", n) for n in lengths]


def test_images_of_their_own_sizes_make_batches_of_one_padded_size(tmp_path, monkeypatch):
    """In a window of eight batches: two of 16x24 pixels, after padding to multiples of 4."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(24, 16), (16, 24), (23, 15), (16, 21), (21, 16)]):
        noise(number, size).save(folder / f"{number}.png")
    lengths = windows_by(monkeypatch)
    model = Noting()
    job_of(folder, tmp_path / "out", model, size=0).run(batch_size=2, workers=0, memory=12345)
    assert lengths == [5]
    assert model.calls == [(12345, 2), (12345, 1), (12345, 2)]
    write_photos(folder, [f"more/{number}.png" for number in range(6)])
    lengths.clear()
    inputs = find_inputs(str(folder), 3, 20)
    job = EncodeJob(Shrunk(), inputs, EncodeOptions(0), tmp_path / "more", {})
    job.run(batch_size=1, workers=0)
    assert lengths == [8, 3]


def test_errors_of_the_encoder_are_passed_on_or_name_a_dead_reader(
    tmp_path, image_folder, monkeypatch
):
    class Broken(Blocks):
        def encode(self, x):
            raise RuntimeError("out of memory")

    job = job_of(image_folder, tmp_path / "out", Broken())
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        job.run(batch_size=3, workers=0)

    def death(error, remedy):
        return f"{error}: {remedy}"

    monkeypatch.setattr(module, "worker_death", death)
    with pytest.raises(ChildProcessError, match=r"^out of memory: lower `threads`$"):
        job.run(batch_size=3, workers=0)

    # Other processes are looked after meanwhile.
    def ended():
        raise RuntimeError("another process ended")

    monkeypatch.undo()
    monkeypatch.setattr(module, "check_others", ended)
    with pytest.raises(RuntimeError, match="another process"):
        job_of(image_folder, tmp_path / "other").run(batch_size=3, workers=0)


def test_shards_without_an_image_are_refused(tmp_path):
    class Empty(ShardInputs):
        def read(self, shard):
            return iter(())

    job = EncodeJob(Shrunk(), Empty([Shard("pipe:true")], 3), EncodeOptions(16), tmp_path, {})
    job.run(workers=0)
    with pytest.raises(ValueError, match="no images in these shards"):
        job.finish()
