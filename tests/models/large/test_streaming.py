import tempfile

import pytest
import torch

from olvae import LiteVAE
from olvae.models.autoencoder import Quantizer
from olvae.models.large.streaming import Stream, Strips, encode_within
from olvae.models.large.tiling import peak_bytes
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder, WaveletEncoder
from tests.models.large.test_tiling import sd


def autoencoder(quantizer: bool = False, **encoder) -> LiteVAE:
    widths = {
        "extractor_channels": 8,
        "extractor_mult": (1, 2),
        "aggregate_channels": 8,
        "aggregate_mult": (1, 2),
    }
    if encoder.get("variant") != "paper":  # which has two blocks for each width
        widths |= {"extractor_mult": (1, 2, 3), "extractor_resblocks": 1, "aggregate_resblocks": 1}
    vae = LiteVAE(
        LiteVAE_Encoder(8, **widths, **encoder),
        LiteVAE_Decoder(channels=8, z_channels=4, channel_mult=(1, 1, 1, 1), num_res_blocks=0),
        Quantizer(8, 4, 4) if quantizer else None,
    )
    for p in vae.parameters():  # no scale is 1 and no shift 0
        p.data.add_(0.05 * torch.randn_like(p))
    return vae.eval()


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ({}, 100_000),
        ({"variant": "paper", "pool": "conv"}, 1),
        pytest.param({"wavelet": "db2"}, 1, marks=pytest.mark.slow),
        pytest.param({"quantizer": True}, 1, marks=pytest.mark.slow),
        ({"shared_extractor": True, "skip_levels": 1, "linear": True}, 1),
        ({"packets": True}, 1),
    ],
)
def test_streamed_strips_give_the_posterior_of_the_whole(arguments, memory):
    vae = autoencoder(**arguments)
    # Statistics differ from strip to strip.
    x = torch.randn(2, 3, 40, 16) * torch.linspace(0.1, 2.0, 40)[:, None]
    assert peak_bytes(vae.encoder, lambda e, images: e(images), x.shape) > memory
    with torch.no_grad():
        whole = vae.encode(x)
    streamed = vae.encode_within(x, memory)
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(streamed.logvar, whole.logvar, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_streaming_planes_are_float32_whatever_torchs_default_is(dtype):
    """Also those in files, with less memory than there is."""
    vae, x = autoencoder(), torch.randn(1, 3, 24, 16)
    expected = vae.encode_within(x, 1).mean
    torch.set_default_dtype(dtype)
    try:
        found = [vae.encode_within(x, memory).mean for memory in (1, -5)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(mean, expected) for mean in found)


def test_streaming_no_images_and_an_encoder_without_weights():
    assert autoencoder().encode_within(torch.zeros(0, 3, 56, 24), 1).mean.shape == (0, 4, 7, 3)
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(encode_within(WaveletEncoder(), x, 2**30), WaveletEncoder()(x))


def test_streaming_keeps_layers_in_memory_as_far_as_it_goes(monkeypatch):
    counts = []
    for memory in (1, 200_000, 400_000):
        files, make = [], tempfile.TemporaryFile
        monkeypatch.setattr(
            tempfile, "TemporaryFile", lambda files=files, make=make, **_: files.append(0) or make()
        )
        autoencoder().encode_within(torch.randn(1, 3, 64, 64), memory)
        monkeypatch.undo()
        counts.append(len(files))
    assert counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "done"),
    [
        ({}, [64 / 88, 80 / 88, 84 / 88, 1]),
        ({"skip_levels": 1}, [16 / 24, 20 / 24, 1]),
        ({"packets": True}, [1]),
    ],
)
def test_streaming_progress_is_by_positions_of_each_network(arguments, done):
    """Levels of 8, 4 and 2 positions in height, the aggregator's of 2; twice that in width."""
    found = []
    autoencoder(**arguments).encode_within(torch.randn(2, 3, 16, 32), 1, found.append)
    assert found == pytest.approx([(image + part) / 2 for image in (0, 1) for part in done])


@pytest.mark.parametrize("arguments", [{"linear": True}, {"variant": "paper", "pool": "conv"}])
def test_strips_are_as_much_wider_as_their_convolution_reaches(arguments, monkeypatch):
    """By one row for each 3x3 convolution, and nowhere else."""
    vae, reaches = autoencoder(**arguments), []
    sweep = Stream.sweep

    def note(self, inputs, channels, reach, run, shrink=1):
        reaches.append(reach)
        return sweep(self, inputs, channels, reach, run, shrink)

    monkeypatch.setattr(Stream, "sweep", note)
    vae.encode_within(torch.randn(1, 3, 16, 16), 1)
    wide = [m for m in vae.encoder.modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert reaches.count(1) == len(wide)
    assert set(reaches) == {0, 1}


@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("memory", [-5, 600, 4 * 5 * 720, 10**6])
def test_a_sweep_in_strips_is_a_convolution_by_rows(reach, memory):
    """Of two planes of 3 and 2 channels, in files or in memory, with the sums of its output.

    A row of 5 pixels takes 5 * 16 * (3 + 2 + 4) = 720 bytes; of the half, with four pixels of the
    whole for each, 2 * 16 * (4 * 4 + 4) = 640.
    """
    x, y = torch.randn(1, 3, 13, 5), torch.randn(1, 2, 13, 5)
    stream = Stream(memory, torch.device("cpu"), torch.float32)
    planes = []
    for values in (x, y):
        planes.append(stream.plane(values.shape[1], 13, 5))
        planes[-1].write(6, values[:, :, 6:])
        planes[-1].write(0, values[:, :, :6])
    size, heights = 2 * reach + 1, []
    conv = torch.nn.Conv2d(5, 4, size, padding=reach)

    def run(*strips: torch.Tensor) -> torch.Tensor:
        heights.append(strips[0].shape[2])
        return conv(torch.cat(strips, dim=1))

    with torch.no_grad():
        out = stream.sweep(planes, 4, reach, run)
        expected = conv(torch.cat((x, y), dim=1))
        found = stream.conv(conv, planes).read(0, 13)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    rows = max(1, stream.strip // 720 - 2 * reach)
    starts = range(0, 13, rows)
    assert heights == [min(13, s + rows + reach) - max(0, s - reach) for s in starts]
    torch.testing.assert_close(out.read(0, 13), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.read(3, 7), expected[:, :, 3:7], rtol=0, atol=1e-5)
    wide = expected.double().squeeze(0).flatten(1)
    torch.testing.assert_close(out.sums, torch.stack((wide.sum(1), wide.square().sum(1))))
    del heights[:]

    def halve(h: torch.Tensor) -> torch.Tensor:
        heights.append(h.shape[2])
        return torch.nn.functional.avg_pool2d(h, 2)

    halved = stream.sweep([out], 4, 0, halve, 2)
    assert halved.shape == (4, 6, 2)
    rows = max(1, stream.strip // 640)
    assert heights == [2 * (min(6, start + rows) - start) for start in range(0, 6, rows)]
    wanted = torch.nn.functional.avg_pool2d(expected, 2)
    torch.testing.assert_close(halved.read(0, 6), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("wavelet", "strip", "reads"),
    [
        ("haar", 1, [(0, 16), (0, 24), (8, 32), (16, 40), (24, 40)]),
        ("haar", 2 * 12_288 - 1, [(0, 16), (0, 24), (8, 32), (16, 40), (24, 40)]),
        ("haar", 2 * 12_288, [(0, 24), (8, 40), (24, 40)]),
        ("db2", 1, [(0, 40)]),
    ],
)
@torch.no_grad()
def test_an_image_is_read_in_strips_of_whole_latent_rows(wavelet, strip, reads):
    """A row of positions of 16 pixels in width takes 8 * 16 * 3 * 32 bytes; db2 needs the whole."""
    encoder, x = autoencoder(wavelet=wavelet, linear=True).encoder, torch.randn(1, 3, 40, 16)
    stream, asked = Stream(0, torch.device("cpu"), torch.float32), []
    stream.strip = strip
    image = Strips((3, 40, 16), lambda *rows: asked.append(rows) or x[:, :, slice(*rows)])
    planes = stream.look(encoder, image)
    assert asked == reads
    for plane, values in zip(planes, [*encoder.seen(x), encoder.linear(x)], strict=True):
        torch.testing.assert_close(plane.read(0, plane.shape[1]), values, rtol=0, atol=1e-5)
    # What a UNet has read may be freed.
    (first, *_), *_ = encoder.stages()
    inputs = planes[:1]
    stream.unet(first, inputs)
    assert inputs == []


def test_as_many_whole_images_are_encoded_at_once_as_fit():
    encoder, x = autoencoder().encoder, torch.randn(5, 3, 16, 24)
    needs = peak_bytes(encoder, lambda e, images: e(images), (1, 3, 16, 24))
    sizes: list[int] = []
    encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for memory, count, expected in (
        (2 * needs + 1, 5, [2, 2, 1]),
        (needs, 5, [1] * 5),
        (needs - 1, 1, []),
        (1, 0, [0]),
    ):
        del sizes[:]
        assert len(encode_within(encoder, x[:count], memory)) == count
        assert sizes == expected


def test_planes_take_their_memory_and_give_it_back():
    """A quarter of it is for strips; a plane of 4 x 2 x 3 x 5 bytes fits exactly, or is a file."""
    for memory, left, in_memory in ((160, 120, True), (156, 117, False)):
        stream = Stream(memory, torch.device("cpu"), torch.float32)
        assert (stream.strip, stream.left) == (memory // 4, left)
        plane = stream.plane(2, 3, 5)
        assert (plane.file is None) == in_memory
        assert stream.left == (0 if in_memory else left)
        assert plane.rows.shape == (3 if in_memory else 0, 2, 5)
        del plane
        assert stream.left == left


def test_streaming_refuses_whole_image_encoders_training_and_float64():
    with pytest.raises(ValueError, match=r"SDEncoder .*24x16"):
        sd().encode_within(torch.randn(1, 3, 16, 24), 1)
    vae = autoencoder()
    with pytest.raises(ValueError, match=r"call model\.eval"):
        vae.train().encode_within(torch.randn(1, 3, 16, 16), 1)
    with pytest.raises(ValueError, match="float32 or half"):
        vae.eval().double().encode_within(torch.randn(1, 3, 16, 16).double(), 1)


def test_streaming_one_latent_position_in_the_narrowest_networks():
    """Eight groups of eight channels of one position: every group is one value, which torch's
    module refuses.
    """
    for variant in ("open_litevae", "paper"):
        vae = autoencoder(variant=variant)
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            whole = vae.train().encode(x).mean
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(vae.eval().encode_within(x, 1).mean, whole, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_streamed_strips_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = autoencoder().cuda()
    x = torch.randn(1, 3, 88, 40, device="cuda")
    with torch.no_grad():
        whole = vae.encode(x).mean
    torch.testing.assert_close(vae.encode_within(x, 300_000).mean, whole, rtol=0, atol=1e-4)
