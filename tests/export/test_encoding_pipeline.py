"""The stages of an encoding: their order, their ends, and that a GPU does not wait for them."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from olvae.data.pixels.size_and_range import EIGHT_BITS, from_uint8
from olvae.data.shards.tar_reading import Shard
from olvae.data.shards.write import ResumableShards
from olvae.export.encode_inputs import EncodeOptions, Item, ReadImage, ShardInputs, find_inputs
from olvae.export.encoding import EncodeJob
from tests.cuda_guard import stand_in_for_cuda_guard
from tests.data.images import write_shards
from tests.export.latents import Blocks, encode, everything, tiny_vae

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
