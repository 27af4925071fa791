from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from olvae.data.mapped.samples import HELD_OUT, PHOTOGRAPHS, SamplePhotographs


def test_the_photographs_are_there():
    for photograph in (*PHOTOGRAPHS, *HELD_OUT):
        with Image.open(photograph.path) as image:
            assert min(image.size) >= 300, photograph
        assert photograph.licence


def test_none_is_in_both_parts():
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)
    assert len(set(PHOTOGRAPHS)) == 11


def test_batches():
    source = SamplePhotographs(size=32, batch_size=8)
    (batch,) = islice(source.train_loader(), 1)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8


def test_an_epoch_has_each_photograph_as_often():
    source = SamplePhotographs(size=8, crops_per_photograph=3, batch_size=1)
    drawn = Counter(batch["key"][0] for batch in islice(source.train_loader(), 33))
    assert drawn == {Path(photograph.file).name: 3 for photograph in PHOTOGRAPHS}


def test_the_tiles():
    source = SamplePhotographs(size=64, batch_size=22)
    (batch,) = source.test_loader()
    assert batch["image"].shape == (22, 3, 64, 64)
    chelsea = Image.open(HELD_OUT[1].path).convert("RGB").resize((192, 128), Image.Resampling.BICUBIC)
    assert np.array_equal(batch["image"][4].permute(1, 2, 0).numpy(), np.asarray(chelsea.crop((0, 0, 64, 64))))
