import pytest

from olvae.models.linear_code import LinearDecoder, LinearEncoder
from olvae.modules.base import check_counts, copy_plain
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder, WaveletEncoder
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.sdvae import SDDecoder, SDEncoder


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (LiteVAE_Encoder, {"dct_levels": -1}, "dct_levels must be at least 1, got -1"),
        (WaveletEncoder, {"dct_levels": 0}, "dct_levels must be at least 1, got 0"),
        (LiteVAE_Decoder, {"channel_mult": []}, r"channel_mult must be at least 1, got \[\]"),
        (SDEncoder, {"channel_mult": []}, r"channel_mult must be at least 1, got \[\]"),
        (SDDecoder, {"channel_mult": [0]}, r"channel_mult must be at least 1, got \[0\]"),
        (TinyEncoder, {"blocks": []}, r"blocks must be at least 0, got \[\]"),
        (TinyDecoder, {"blocks": []}, r"blocks must be at least 0, got \[\]"),
        (LinearEncoder, {"downscale": 0}, "downscale must be at least 1, got 0"),
        (
            LinearEncoder,
            {"downscale": 12, "image_size": 256},
            "image_size 256 is not a multiple of 12",
        ),
        (LinearDecoder, {"upscale": -8}, "upscale must be at least 1, got -8"),
    ],
)
def test_networks_refuse_counts_that_no_network_has(network, arguments, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        network(**arguments)


def test_check_counts_names_the_setting():
    check_counts(1, channels=8, channel_mult=[1, 2], other=(3,))
    check_counts(0, num_res_blocks=0)
    assert (LinearEncoder(downscale=12).image_size, LinearEncoder().image_size) == (384, 256)
    with pytest.raises(ValueError, match=r"channel_mult must .*\[1, -1\]"):
        check_counts(1, channels=8, channel_mult=(1, -1))


def test_a_networks_node_keeps_the_arguments_as_they_were():
    """Lists and dicts, at any depth, are copies: changing them later changes no saved config."""
    widths, inner = [1, 2], {"a": [1]}
    copied = copy_plain({"widths": widths, "inner": inner, "x": (1,)})
    decoder = LiteVAE_Decoder(channels=8, z_channels=4, channel_mult=widths, num_res_blocks=0)
    widths.append(3)
    inner["a"].append(2)
    assert copied == {"widths": [1, 2], "inner": {"a": [1]}, "x": (1,)}
    assert decoder.node["params"]["channel_mult"] == [1, 2]
