"""The loaders of omniglot.py and corel5k.py in bench/evidence, on files of the right form that are written here."""

import io
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image

from bench.evidence import corel5k, omniglot
from bench.evidence.data import DataError, padded
from bench.evidence.digits import digits

SMALL1 = {"Balinese": 24, "Early_Aramaic": 22, "Greek": 24, "Korean": 40, "Latin": 26}
SMALL2 = {"Greek": 24, "Japanese_(katakana)": 47, "Latin": 26, "Sanskrit": 42, "Tagalog": 17}


def png(number: int, side: int = 105) -> bytes:
    """Paper, and a stroke of ink whose place tells characters apart."""
    pixels = np.full((side, side), 255, np.uint8)
    pixels[number % side, : 20 + number // side] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def entries(folder: str, alphabets: dict[str, int]) -> dict[str, bytes]:
    found, number = {}, 0
    for alphabet, characters in alphabets.items():
        for character in range(1, characters + 1):
            number += 1
            drawing = png(number)
            for copy in range(1, 21):
                found[f"{folder}/{alphabet}/character{character:02}/{number:04}_{copy:02}.png"] = drawing
    return found


def write_zip(path, contents: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir(path.stem)
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def omniglot_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("omniglot")
    for path, alphabets in ((root / omniglot.SMALL1.name, SMALL1), (root / omniglot.SMALL2.name, SMALL2)):
        write_zip(path, entries(path.stem, alphabets))
    return root


def one_character(name: str = "small") -> dict[str, bytes]:
    return entries(name, {"Greek": 1})


def test_omniglot_holds_characters_out_of_training_and_then_trains_on_all(omniglot_root):
    tuning, final = (omniglot.omniglot(omniglot_root, hold_out) for hold_out in (True, False))
    assert (tuning.num_classes, final.num_classes) == (448, 544)
    assert [len(split.target) for split in (tuning.train, tuning.validation, tuning.test)] == [8960, 480, 2120]
    assert final.validation is None
    assert torch.equal(final.test.inputs, tuning.test.inputs)
    for split, classes in ((tuning.train, 448), (tuning.validation, 24), (final.train, 544), (final.test, 106)):
        assert split.inputs.shape[1:] == (1, 28, 28)
        assert split.target.bincount().tolist() == [20] * classes

    def looks(split):  # every character of the files above looks different, at 105 pixels and at 28
        return {tuple(image.flatten().tolist()) for image in split.inputs}

    assert not looks(tuning.train) & looks(tuning.validation)
    assert len(looks(tuning.validation)) == 24
    assert looks(tuning.train) | looks(tuning.validation) <= looks(final.train)


def test_every_quarter_turn_of_a_character_is_an_identity(tmp_path):
    drawings = list(omniglot.read_drawings(write_zip(tmp_path / "small.zip", one_character()), 1).values())
    split = omniglot.identities(drawings, turns=4)
    assert split.target.tolist() == [turn for turn in range(4) for _ in range(20)]
    for turn in range(4):
        torch.testing.assert_close(split.inputs[20 * turn, 0], drawings[0][0].rot90(turn))


def test_ink_is_one_and_paper_zero(tmp_path):
    (drawings,) = omniglot.read_drawings(write_zip(tmp_path / "small.zip", one_character()), 1).values()
    assert drawings.shape == (20, 28, 28)
    assert drawings.dtype == torch.float32
    ink = drawings[0].sum().item() * (105 / 28) ** 2  # in pixels of the file
    assert ink == pytest.approx(20, rel=0.1)
    assert drawings[0, 10:].eq(0).all()


@pytest.mark.parametrize(
    "name",
    [
        "../small/Greek/c/1.png",
        "/small/Greek/c/1.png",
        "other/Greek/c/1.png",
        "small/../../c/1.png",
        "small\\..\\1.png",
    ],
)
def test_a_zip_entry_outside_of_the_folder_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "small.zip", {**one_character(), name: png(1)})
    with pytest.raises(DataError, match="outside of its folder small"):
        omniglot.read_drawings(path, 1)


def test_a_link_in_the_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "small.zip", one_character())
    link = zipfile.ZipInfo("small/Greek/character01/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="outside of its folder"):
        omniglot.read_drawings(path, 1)


def test_omniglot_swapped_tests_on_what_only_the_first_file_has(omniglot_root):
    first, swapped = omniglot.omniglot(omniglot_root, False), omniglot.omniglot_swapped(omniglot_root, False)
    assert (swapped.name, swapped.settings_of, swapped.num_classes) == ("omniglot-swapped", "omniglot", 624)
    assert swapped.test.target.bincount().tolist() == [20] * 86
    assert len(omniglot.omniglot_swapped(omniglot_root, True).validation.target) == 24 * 20
    assert first.settings_of is None


def test_omniglot_files_that_are_missing_or_not_zip_files(tmp_path):
    with pytest.raises(DataError, match=r"images_background_small1.zip is missing: it comes from https"):
        omniglot.omniglot(tmp_path, hold_out=True)
    (tmp_path / "small.zip").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="not a readable zip file"):
        omniglot.read_drawings(tmp_path / "small.zip", 1)


def test_omniglot_counts_are_checked(tmp_path):
    path = write_zip(tmp_path / "small.zip", one_character())
    with pytest.raises(DataError, match="should hold 2 characters, found 1"):
        omniglot.read_drawings(path, 2)
    fewer = dict(list(one_character().items())[:-1])
    with pytest.raises(DataError, match="should hold 20 drawings of Greek/character01, found 19"):
        omniglot.read_drawings(write_zip(path, fewer), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("small/Greek/character01/21.png", b"no image", "not a readable PNG"),
        ("small/Greek/character01/21.png", png(1)[:60], "not a readable PNG"),
        ("small/Greek/character01/21.png", png(1, side=64), r"is \(64, 64\), expected 105 x 105"),
        ("small/Greek/character01/21.png", b"0" * (2 << 20), "too many for a drawing"),
        ("small/Greek/21.png", png(1), "expected small/ALPHABET/CHARACTER/DRAWING.png"),
        ("small/Greek/character01/notes.txt", b"hello", "expected small/ALPHABET/CHARACTER/DRAWING.png"),
    ],
)
def test_what_is_no_drawing_is_named(tmp_path, name, content, message):
    path = write_zip(tmp_path / "small.zip", {**one_character(), name: content})
    with pytest.raises(DataError, match=message):
        omniglot.read_drawings(path, 1)


def test_a_damaged_drawing_is_named(tmp_path):
    path = write_zip(tmp_path / "small.zip", one_character())
    content = path.read_bytes()
    stream = content.index(b"IDAT")
    path.write_bytes(content[:stream] + b"XXXX" + content[stream + 4 :])
    with pytest.raises(DataError, match="not a readable zip file: Bad CRC-32"):
        omniglot.read_drawings(path, 1)


def arff(rows: list[str], attributes: int = 873) -> str:
    header = "\n".join(f"@attribute a{number} {{0,1}}" for number in range(attributes))
    return f"@relation test\n% a remark\n\n{header}\n\n@data\n" + "\n".join(rows) + "\n"


def test_sparse_rows_become_zeros_and_ones(tmp_path):
    path = tmp_path / "some.arff"
    path.write_text(arff(["{0 1,498 1,499 1}", "{}", "{ 3 1 , 872 1 }"]))
    names, table = corel5k.read_sparse_arff(path, 3)
    assert names == [f"a{number}" for number in range(873)]
    assert table.shape == (3, 873)
    assert table.nonzero().tolist() == [[0, 0], [0, 498], [0, 499], [2, 3], [2, 872]]
    assert set(table.unique().tolist()) == {0, 1}
    _, split = corel5k.read_split(path, 3)
    assert split.inputs.nonzero().tolist() == [[0, 0], [0, 498], [2, 3]]
    assert split.target.nonzero().tolist() == [[0, 0], [2, 373]]


def corel5k_root(tmp_path):
    for name, rows in ((corel5k.TRAIN, 4500), (corel5k.TEST, 500)):
        (tmp_path / name).write_text(arff([f"{{{row % 499} 1,{499 + row % 374} 1}}" for row in range(rows)]))
    return tmp_path


def test_corel5k_holds_rows_out_of_training_and_then_trains_on_all(tmp_path):
    root = corel5k_root(tmp_path)
    tuning, final = corel5k.corel5k(root, hold_out=True), corel5k.corel5k(root, hold_out=False)
    assert [split.inputs.shape for split in (tuning.train, tuning.validation, tuning.test)] == [
        (4000, 499), (500, 499), (500, 499)
    ]  # fmt: skip
    assert final.validation is None
    assert final.train.target.shape == (4500, 374)
    together = torch.cat([tuning.train.target, tuning.validation.target])
    assert torch.equal(together.sum(0), final.train.target.sum(0))
    assert tuning.multi_hot


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (arff(["{0 1}", "{1 1}"]), "should have 1 rows, found 2"),
        (arff(["{0 1}"], attributes=800), "should have 499 features and 374 labels, found 800 attributes"),
        (arff(["{0 2}"]), r"line 879: expected \{index 1,index 1,...\}, found '\{0 2\}'"),
        (arff(["0,1,0,1"]), r"expected \{index 1,index 1,...\}"),
        (arff(["{873 1}"]), "stay below 873"),
        (arff(["{5 1,3 1}"]), "indices should rise"),
        (arff(["{5 1,5 1}"]), "indices should rise"),
        (arff([]).replace("a7 {0,1}", "a7 numeric"), r"line 11: expected @relation, @data or a \{0,1\} @attribute"),
    ],
)
def test_what_is_no_sparse_row_is_named(tmp_path, text, message):
    path = tmp_path / "some.arff"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        corel5k.read_sparse_arff(path, 1)


def test_corel5k_files_must_be_there_and_agree(tmp_path):
    with pytest.raises(DataError, match=r"Corel5k-train-sparse.arff is missing: it comes from https"):
        corel5k.corel5k(tmp_path, hold_out=True)
    root = corel5k_root(tmp_path)
    test = root / corel5k.TEST
    test.write_text(test.read_text().replace("a500 ", "sky "))
    with pytest.raises(DataError, match="do not have the same attributes"):
        corel5k.corel5k(root, hold_out=True)


def test_padding_adds_classes_that_are_never_a_target():
    data = digits()
    more = padded(data, 1000)
    assert (more.name, more.num_classes) == ("digits-1000", 1000)
    assert more.train is data.train
    with pytest.raises(ValueError, match="digits cannot be padded to 10 classes"):
        padded(data, 10)
