"""The data sets: what is in them, how they are scaled, and which rows are held out."""

import re
import sys
from pathlib import Path

import pytest
import torch
from samples import load

from mlp_ext.commands import data as mlp_data
from mlp_ext.commands.data import DATASETS, Dataset, load_csv

SHAPES = {  # rows to train on, rows held out, features, targets, classes
    "tutorial": (10, 0, 10, 1, 0),
    "breast_cancer": (455, 114, 30, 1, 2),
    "digits": (1437, 360, 64, 10, 10),
    "mnist5k": (4000, 1000, 784, 10, 10),
}
LARGE = pytest.param("mnist5k", marks=pytest.mark.slow)
LABELED = ["breast_cancer", "digits", LARGE]


def tensors(data: Dataset) -> dict[str, torch.Tensor]:
    return {name: getattr(data, name) for name in ("x", "y", "x_test", "y_test")}


def labels(y: torch.Tensor) -> torch.Tensor:
    return y.flatten() if y.shape[1] == 1 else y.argmax(1)


def test_every_data_set_is_covered_here() -> None:
    assert SHAPES.keys() == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_data_has_its_shapes(name: str) -> None:
    data = load(name)
    n, t, features, targets, classes = SHAPES[name]
    shapes = {
        "x": (n, features),
        "y": (n, targets),
        "x_test": (t, features),
        "y_test": (t, targets),
    }
    assert {key: tuple(value.shape) for key, value in tensors(data).items()} == shapes
    assert (data.name, data.classes) == (name, classes)


def test_tutorial_is_the_tutorials() -> None:
    data = load("tutorial", seed=3)
    assert torch.equal(data.x, torch.randn(10, 10, generator=torch.Generator().manual_seed(3)))
    assert data.y.flatten().tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("name", LABELED)
def test_targets_are_classes(name: str) -> None:
    data = load(name)
    for y in (data.y, data.y_test):
        assert set(y.unique().tolist()) == {0, 1}
        assert set(labels(y).tolist()) == set(range(data.classes))
        if data.classes > 2:
            assert torch.equal(y.sum(1), torch.ones(len(y)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELED)
def test_held_out_rows_have_the_classes_in_proportion(name: str) -> None:
    data = load(name)
    train, test = (labels(y).long().bincount() for y in (data.y, data.y_test))
    assert (test - (train + test) / 5).abs().max() <= 1


@pytest.mark.parametrize("name", ["digits", LARGE])
def test_pixels_lie_between_0_and_1(name: str) -> None:
    data = load(name)
    for x in (data.x, data.x_test):
        assert (x.min(), x.max()) == (0, 1)


def test_breast_cancer_is_standardized_by_its_training_rows() -> None:
    load_breast_cancer = pytest.importorskip("sklearn.datasets").load_breast_cancer
    data = load("breast_cancer", dtype=torch.float64)
    std, mean = torch.std_mean(data.x, dim=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(std, torch.ones_like(std))

    # All rows together are the first ones, moved and scaled alike, so none is lost, none is twice
    # there, and those held out had no part in the scale.
    def normal(x: torch.Tensor) -> torch.Tensor:
        return ((x - x.mean(0)) / x.std(0)).sort(dim=0).values

    raw = torch.from_numpy(load_breast_cancer().data)
    torch.testing.assert_close(normal(torch.cat([data.x, data.x_test])), normal(raw))


@pytest.mark.parametrize("name", ["tutorial", "breast_cancer", "digits"])
def test_rows_follow_the_seed(name: str) -> None:
    first, again, other = load(name, seed=1), load(name, seed=1), load(name, seed=2)
    assert all(torch.equal(t, tensors(again)[key]) for key, t in tensors(first).items())
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tutorial", "breast_cancer", "digits"])
def test_dtype_changes_no_row(name: str, dtype: torch.dtype) -> None:
    data = load(name, dtype=dtype)
    for key, value in tensors(load(name)).items():
        converted = tensors(data)[key]
        assert converted.dtype == dtype
        torch.testing.assert_close(converted.float(), value, atol=0, rtol=torch.finfo(dtype).eps)


def test_unknown_data_set_is_named() -> None:
    known = "tutorial, breast_cancer, digits, mnist5k"
    with pytest.raises(ValueError, match=f"load: name must be one of {known}, got 'iris'"):
        load("iris")


def test_tutorial_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sklearn.datasets", "sklearn.model_selection", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(load("tutorial").x) == 10
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        mlp_data.load("digits")


# --- Own data ---


def write_csv(folder: Path, header: str, *rows: str) -> Path:
    path = folder / "own.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("targets", "classes", "outputs", "names"),
    [
        (["0", "1"], 2, 1, ("0", "1")),
        (["0.0", "1.0"], 2, 1, ("0", "1")),
        (["no", "yes"], 2, 1, ("no", "yes")),
        (["2", "10"], 2, 1, ("2", "10")),  # in the order of numbers
        (["a", "c", "b"], 3, 3, ("a", "b", "c")),
        (["3", "1", "2"], 3, 3, ("1", "2", "3")),
        ([str(value) for value in range(20)], 20, 20, tuple(map(str, range(20)))),
        ([str(value) for value in range(21)], 0, 1, ()),
        (["1.5", "2", "3"], 0, 1, ()),
        (["1.0", "2.0"], 2, 1, ("1", "2")),
        (["1_1", "2_1"], 2, 1, ("1_1", "2_1")),  # Python's float reads 11 and 21
    ],
    ids=lambda value: str(value)[:20],
)
def test_csv_target_is_classes_or_numbers(
    targets: list[str], classes: int, outputs: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    rows = [f"{i},{targets[i % len(targets)]},{i * i}" for i in range(210)]
    path = write_csv(tmp_path, "a,what,b", *rows)
    data = load_csv(path, "what", dtype=torch.float64)
    assert (data.name, data.classes, data.names) == ("own.csv", classes, names)
    assert data.is_number is (classes == 0)
    assert (data.x.shape, data.y.shape) == ((168, 2), (168, outputs))
    assert (data.x_test.shape, data.y_test.shape) == ((42, 2), (42, outputs))
    # Each row has its own target, and unscaled features are those of the file.
    for x, y in ((data.x, data.y), (data.x_test, data.y_test)):
        index, square = (x * data.std + data.mean).unbind(1)
        torch.testing.assert_close(square, index**2)
        expected = [targets[round(i) % len(targets)] for i in index.tolist()]
        if names:
            assert [names[int(label)] for label in labels(y)] == [
                text.removesuffix(".0") for text in expected
            ]
        else:
            numbers = torch.tensor([float(text) for text in expected], dtype=torch.float64)
            torch.testing.assert_close(y.squeeze(1) * data.y_std + data.y_mean, numbers)


def test_csv_is_standardized_by_its_training_rows(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    rows = [f"{i},7,{i / 3}" for i in range(50)]
    data = load_csv(write_csv(tmp_path, "a,constant,y", *rows), "y", dtype=torch.float64)
    for t in (data.x[:, 0], data.y):
        assert (t.mean().item(), t.std().item()) == pytest.approx((0, 1))
    assert not torch.cat([data.x, data.x_test])[:, 1].any()


def test_csv_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """With a byte order mark, CRLF, quotes, spaces and blank lines."""
    pytest.importorskip("sklearn")
    path = tmp_path / "own.csv"
    rows = ['"1", 2, "a"', "", *(f"{i}, {i}, {'ab'[i % 2]}" for i in range(9))]
    path.write_bytes(("\ufeff" + "\r\n".join(['"x, 1",y,class', *rows])).encode())
    data = load_csv(path, "class")
    assert (len(data.x) + len(data.x_test), data.x.shape[1], data.names) == (10, 2, ("a", "b"))


GOOD = ["1,2,0", "4,5,1", "7,8,1", "1,1,1", "2,2,0", "3,3,0"]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("a,b,z", GOOD, "{} has no column 'y'; it has a, b, z"),
        ("a,b,yy", GOOD, "{} has no column 'y'; did you mean yy?"),
        ("a,y,y", GOOD, "{} has two columns 'y'"),
        ("a;b;y", ["1;2;3"], "{} has only the column 'a;b;y'; expected features and a target"),
        ("a,b,y", [], "{} has 0 rows; at least 5 are required"),
        ("a,b,y", GOOD[:5], "{} has 5 rows; at least 6 are required"),
        ("a,b,y", [*GOOD, "x,1,1"], "{}, line 8: column 'a' must be a finite number, got 'x'"),
        ("a,b,y", [*GOOD, "1,nan,1"], "{}, line 8: column 'b' must be a finite number, got 'nan'"),
        ("a,b,y", [*GOOD, "inf,1,1"], "{}, line 8: column 'a' must be a finite number, got 'inf'"),
        ("a,b,y", [*GOOD, "1_5,1,1"], "{}, line 8: column 'a' must be a finite number, got '1_5'"),
        ("a,b,y", [*GOOD, "", ",1,1"], "{}, line 9: column 'a' is empty"),
        ("a,b,y", [*GOOD, "1,1,"], "{}, line 8: column 'y' is empty"),
        ("a,b,y", [*GOOD, "1,1,NA"], "{}, line 8: column 'y' must be a finite number, got 'NA'"),
        ("a,b,y", [*GOOD, "1,1"], "{}, line 8: 2 cells, expected 3"),
        (
            "a,b,y",
            [*GOOD, *GOOD, "1,1,2"],
            "{}: column 'y' has only one row of class 2; at least two",
        ),
        ("a,b,y", ["1,2,same"] * 6, "{}: column 'y' has only one value, same"),
    ],
)
def test_csv_that_cannot_be_used_is_told(
    header: str, rows: list[str], message: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path, header, *rows)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(path))}"):
        load_csv(path, "y")


def test_csv_target_is_a_number_if_the_user_says_so(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = write_csv(tmp_path, "a,rooms", *(f"{i},{i % 8}" for i in range(80)))
    assert load_csv(path, "rooms").classes == 8
    data = load_csv(path, "rooms", regression=True)
    assert (data.classes, data.is_number, data.y.shape[1]) == (0, True, 1)
    path = write_csv(tmp_path, "a,kind", *(f"{i},red" for i in range(80)))
    with pytest.raises(ValueError, match="column 'kind' must be a finite number, got 'red'"):
        load_csv(path, "kind", regression=True)


def test_csv_that_is_empty_or_no_text(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"own.csv is empty$"):
        load_csv(path, "y")
    path.write_bytes(b"\xff\xfea\x00,\x00")
    with pytest.raises(ValueError, match=r"own.csv is not text in UTF-8$"):
        load_csv(path, "y")
