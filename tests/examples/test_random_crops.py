import numpy as np
import pytest
from PIL import Image

from olvae.config import save
from tests.examples.loading import load_example


@pytest.fixture
def example():
    return load_example("random_crops")


def crops(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("of_config", [False, True])
def test_random_crops_are_several_an_image_and_a_seed_gives_them_again(
    example, tmp_path, image_folder, of_config
):
    """In the size that is asked for, whatever a config's own is.

    A config's validation images are left out.
    """
    src = image_folder
    if of_config:
        src = tmp_path / "data.yaml"
        params = {"root": str(image_folder), "size": 32, "batch_size": 4}
        save({"data": {"target": "olvae.data.picture_folder.FolderSource", "params": params}}, src)
    for out, seed in {"a": 0, "again": 0, "b": 1}.items():
        example.main(
            [str(src), "--size=16", "--count=30", f"--seed={seed}", "--out", str(tmp_path / out)]
        )
    a, again, b = (crops(tmp_path / out) for out in ("a", "again", "b"))
    assert len(a) == len({crop.tobytes() for crop in a}) == 30
    assert {crop.shape for crop in a} == {(16, 16, 3)}
    assert all(np.array_equal(one, other) for one, other in zip(a, again, strict=True))
    assert not {crop.tobytes() for crop in a} & {crop.tobytes() for crop in b}
    with pytest.raises(ValueError, match=r"b: .*00000029\.png.* 29 "):
        example.main([str(src), "--size=16", "--count=29", "--out", str(tmp_path / "b")])


def test_random_crops_names_a_missing_folder(example, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such"):
        example.main(
            [str(tmp_path / "none"), "--size=16", "--count=1", "--out", str(tmp_path / "out")]
        )
